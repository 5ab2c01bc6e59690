"""A study in one file: the report, and going on from it, are as from the folder."""

import gzip
import json
from pathlib import Path

import folders
import pandas as pd
import pytest

from spectreg_lab.page import report
from spectreg_lab.settings.config import Config
from spectreg_lab.storage import archive, store
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.run_folder import RunFolder


def curve(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
    return [(0.5 + len(method) / 100 + n / 7, 0.4 + seed / 30 + n / 9) for n in range(3)]


def study_in(folder: Path) -> Path:
    study = folders.write_study(folder, curve, line=lambda *point: {"sigma": {"a": point[3] / 3}})
    folders.fail(study, "vgg-large-spectral-1", f"{study}/runs: the loss became nan")
    folders.lose(study, "vgg-small-decay-0")
    return study


def test_the_report_of_an_exported_file_has_the_tables_of_the_folders_report(tmp_path: Path) -> None:
    study = study_in(tmp_path / "study")
    file = tmp_path / "elsewhere" / "kept.jsonl.gz"
    file.parent.mkdir()
    assert archive.export(study, file) == 22
    first, second = report.write(study).parent, report.write(file, out=tmp_path / "page").parent
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in sorted(first.glob("*.md")):
        assert path.read_text().replace(f"{study}/", "") == (second / path.name).read_text()
    for path in sorted(first.glob("*.csv")):
        a, b = pd.read_csv(path), pd.read_csv(second / path.name)
        pd.testing.assert_frame_equal(
            a.drop(columns="error", errors="ignore"), b.drop(columns="error", errors="ignore")
        )


def test_an_unpacked_study_has_every_finished_run_and_its_numbers(tmp_path: Path) -> None:
    study = study_in(tmp_path / "study")
    archive.export(study, tmp_path / "kept.jsonl.gz")
    assert archive.unpack(tmp_path / "kept.jsonl.gz", tmp_path / "again") == 22
    before, after = store.read_study(study), store.read_study(tmp_path / "again")
    assert before.study == after.study
    for old, new in zip(before.runs, after.runs, strict=True):
        assert new.status == ("finished" if old.status == "finished" else "missing")
        if old.status == "finished":
            assert RunFolder(new.folder).finished()
            assert Config.model_validate(new.config) == Config.model_validate(old.config)
            for a, b in zip(old.metrics, new.metrics, strict=True):
                assert a["test_accuracy"] == pytest.approx(b["test_accuracy"], rel=1e-6)


def test_two_exports_of_one_study_are_the_same_bytes(tmp_path: Path) -> None:
    study = study_in(tmp_path / "study")
    archive.export(study, tmp_path / "a")
    archive.export(study, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("place", ["study.json", "runs/vgg-small-vanilla-0/metrics.jsonl", "search.csv", "report/new"])
def test_an_export_never_lies_among_a_studys_own_files(tmp_path: Path, place: str) -> None:
    study = study_in(tmp_path / "study")
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    for target in (study / place, study / "runs" / ".." / place):
        with pytest.raises(RunError, match=r"lies in the study folder, where an export is named runs\.jsonl\.gz"):
            archive.export(study, target)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "content",
    [b"mine", gzip.compress(b"mine", mtime=0), gzip.compress(b'{"format": 1}\n', mtime=0)[:-9]],
    ids=["no gzip", "no JSON", "cut"],
)
def test_an_export_replaces_earlier_ones_and_no_other_file(tmp_path: Path, content: bytes) -> None:
    study, kept = study_in(tmp_path / "study"), tmp_path / "kept"
    for target in (kept, study / archive.NAME):
        assert [archive.export(study, target) for _ in range(2)] == [22, 22]
        target.write_bytes(content)
        with pytest.raises(RunError, match="is there already and is no earlier export"):
            archive.export(study, target)
        assert target.read_bytes() == content
        target.write_bytes(b"")  # as mktemp makes it
        assert archive.export(study, target) == 22


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", *(gzip.compress(text, mtime=0) for text in (b"{", b"[]\n", b'{"format": 1}\n'))],
    ids=["empty", "no gzip", "no JSON", "no object", "no study"],
)
def test_a_file_that_is_no_export_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"some\.jsonl\.gz is not a study that `spectreg export` wrote"):
        archive.read(file)


def test_a_cut_or_newer_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl.gz"
    archive.export(study_in(tmp_path / "study"), file)
    whole = file.read_bytes()
    for broken in (whole[:-20], whole[:200] + b"\0" * 50 + whole[250:]):
        file.write_bytes(broken)
        with pytest.raises(RunError, match="is not a study"):
            archive.read(file)
    head, *runs = gzip.decompress(whole).splitlines()
    newer = json.dumps(json.loads(head) | {"format": 99}).encode()
    file.write_bytes(gzip.compress(b"\n".join([newer, *runs])))
    with pytest.raises(RunError, match="has format 99"):
        archive.read(file)


def test_a_fault_in_a_run_of_an_exported_file_is_told_with_the_runs_name(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl.gz"
    archive.export(study_in(tmp_path / "study"), file)
    head, first, *others = gzip.decompress(file.read_bytes()).splitlines()
    empty = json.dumps(json.loads(first) | {"measures": {"spectra": {"features.0.weight": []}}}).encode()
    file.write_bytes(gzip.compress(b"\n".join([head, empty, *others])))
    said = r"kept\.jsonl\.gz is not a study .*vgg-small-vanilla-0 has a wrong measures\.spectra\.features\.0\.weight"
    with pytest.raises(RunError, match=said):
        report.write(file)


def test_unpacking_never_touches_a_folder_that_has_something_in_it(tmp_path: Path) -> None:
    study = study_in(tmp_path / "study")
    archive.export(study, tmp_path / "kept.jsonl.gz")
    with pytest.raises(RunError, match="is not empty"):
        archive.unpack(tmp_path / "kept.jsonl.gz", study)


def test_a_device_that_never_ends_is_no_study():
    with pytest.raises(RunError, match="/dev/zero is not a study folder"):
        archive.read(Path("/dev/zero"))


def test_a_file_that_is_not_there_is_told_as_such(tmp_path):
    for use in (archive.read, lambda path: archive.unpack(path, tmp_path / "new")):
        with pytest.raises(RunError, match=r"gone\.gz: there is no such file or folder"):
            use(tmp_path / "gone.gz")
