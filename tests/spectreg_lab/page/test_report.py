"""The page: what it must say in whatever state a study is."""

import json
import re
from pathlib import Path

import folders
import pytest

from spectreg_lab.page import provenance, report
from spectreg_lab.storage import archive, errors, run_folder, store


def text(page: Path) -> str:
    """The page's words, without scripts and tags."""
    source = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", source))


def test_every_run_that_is_missing_failed_or_of_another_format_is_named_with_its_cause(tmp_path: Path) -> None:
    folder = folders.write_study(tmp_path / "s")
    folders.lose(folder, "vgg-small-decay-0")
    folders.fail(folder, "vgg-large-spectral-1", "the loss became nan in epoch 7 <script>")
    folders.age(folder, "vgg-small-vanilla-2")
    (folder / "runs" / "vgg-large-decay-2" / run_folder.OUTCOME).unlink()
    words = text(report.write(folder))
    assert "24 runs: 20 finished, 2 missing, 1 unfinished, 1 failed" in words
    for run in ("vgg-small-decay-0", "vgg-large-spectral-1", "vgg-small-vanilla-2", "vgg-large-decay-2"):
        assert run in words
    assert "the loss became nan in epoch 7 &lt;script&gt;" in words
    assert "has format 99" in words


def test_the_page_is_one_file_that_asks_for_nothing_from_the_network(tmp_path: Path) -> None:
    page = report.write(folders.write_study(tmp_path / "s")).read_text()
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|<link\b|@import|url\((?!#)", markup)


@pytest.mark.parametrize("begun", [True, False])
def test_a_study_with_nothing_finished_has_a_page_that_says_so(tmp_path: Path, begun: bool) -> None:
    folder = folders.write_study(tmp_path / "s", seeds=(0,), finish=False)
    if not begun:
        for run in (folder / "runs").iterdir():
            folders.lose(folder, run.name)
    assert "no run has finished yet" in text(report.write(folder))


def test_the_foot_has_command_commit_versions_and_seeds_and_differing_versions_are_named(tmp_path: Path) -> None:
    folder = folders.write_study(tmp_path / "s")
    other = folder / "runs" / "vgg-small-decay-0" / run_folder.VERSIONS
    run_folder.write_json(other, folders.VERSIONS | {"torch": "2.99.0"})
    words = text(report.write(folder))
    for said in (
        "spectreg reproduce by-hand.toml",
        "0123abc",
        "2.13.0; 2.99.0",
        "0, 1, 2",
        "The runs differ in: torch",
    ):
        assert said in words


@pytest.mark.parametrize("recorded", [True, False])
def test_runs_that_were_measured_with_unlike_settings_are_told_in_one_warning(tmp_path: Path, recorded: bool) -> None:
    def measures(regime: str, method: str, seed: int) -> dict:
        images = 8 if (regime, method, seed) == ("small", "decay", 0) else 64
        taken = {"train_images": images, "test_images": images, "radii": [0.5], "steps": 10}
        return {"jacobian": {"norms": [1.0] * images}} | ({"taken_with": taken} if recorded else {})

    folder = folders.write_study(tmp_path / "s", measures=measures)
    (told,) = [said for said in provenance.warnings(store.read_study(folder)) if "were measured with other" in said]
    assert ("vgg: test images 64 or 8, train images 64 or 8)" if recorded else "vgg: test images 64 or 8)") in told
    assert "`spectreg measure`" in told
    assert "test images 64 or 8" in text(report.write(folder))


def test_runs_measured_alike_before_and_after_that_was_recorded_are_no_warning(tmp_path: Path) -> None:
    def measures(regime: str, method: str, seed: int) -> dict:
        taken = {"train_images": 12, "test_images": 8, "radii": [0.5]}
        return {"jacobian": {"norms": [1.0] * 8}} | ({"taken_with": taken} if seed else {})

    study = store.read_study(folders.write_study(tmp_path / "s", measures=measures))
    assert not [said for said in provenance.warnings(study) if "measured with" in said]


def test_the_foot_has_epochs_learning_rates_strengths_and_the_rule_for_alpha(tmp_path: Path) -> None:
    case = {"model": {}, "data": {}, "epochs": 70, "learning_rate": {"small": 0.03, "large": 0.1}}
    settings = {"deep": case, "vgg": {"model": {}, "data": {}, "alpha": {"small": 0.7}}}
    folder = folders.write_study(tmp_path / "s", settings=settings)
    described = run_folder.read_json(folder / store.STUDY)
    described["study"]["methods"]["adversarial"] = {"name": "adversarial", "epsilon": 0.3, "alpha": 0.5}
    run_folder.write_json(folder / store.STUDY, described)
    foot = dict(provenance.foot(store.read_study(folder)))
    assert foot["epochs"] == "deep: 70; vgg: 2"
    assert foot["learning rates"] == "deep: 0.03 (small batch), 0.1 (large batch); vgg: not recorded"
    assert foot["methods"] == "vanilla; decay; adversarial: epsilon 0.3, alpha 0.5; spectral"
    assert foot["α of the gap"].startswith("deep: the largest multiple of 0.01 that every finished run")
    assert foot["α of the gap"].endswith("; vgg: 0.7 (small batch)")


def test_the_files_of_two_reports_of_one_study_are_the_same_but_for_the_hour(tmp_path: Path) -> None:
    folder = folders.write_study(tmp_path / "s")

    def files() -> dict[str, bytes]:
        page = report.write(folder)
        content = {path.name: path.read_bytes() for path in page.parent.iterdir() if path != page}
        return content | {"page": re.sub(rb"Written [\d-]+ [\d:]+ UTC", b"", page.read_bytes())}

    first = files()
    assert first == files()
    assert {"table1.csv", "figure1.csv", "runs.csv", "figure1-vgg.svg", "table1-vgg.svg"} <= first.keys()
    assert b"**0.850 \xc2\xb1 0.000**" in first["table1.md"]
    assert b"<text" in first["figure1-vgg.svg"]


def test_the_table_of_missing_runs_goes_away_when_they_are_there(tmp_path: Path) -> None:
    folder = folders.write_study(tmp_path / "s", seeds=(0,))
    outcome = folder / "runs" / "vgg-small-decay-0" / run_folder.OUTCOME
    outcome.rename(tmp_path / "kept")
    table = report.write(folder).parent / "runs.md"
    assert "vgg-small-decay-0" in table.read_text() or "unfinished" in table.read_text()
    (tmp_path / "kept").rename(outcome)
    report.write(folder)
    assert not table.exists()


def test_files_of_the_user_stay_in_a_folder_that_is_no_report_yet(tmp_path: Path) -> None:
    folder, notes = folders.write_study(tmp_path / "s", seeds=(0,)), tmp_path / "notes"
    notes.mkdir()
    for name in ("runs.md", "layers.md", "jacobian.md", "sigma.md"):
        (notes / name).write_text("mine")
    assert report.write(folder, out=notes).parent == notes
    assert {(notes / name).read_text() for name in ("runs.md", "layers.md", "jacobian.md", "sigma.md")} == {"mine"}


@pytest.mark.parametrize("exported", [True, False])
def test_a_page_in_a_study_folder_itself_is_refused_and_leaves_it_as_it_is(tmp_path: Path, exported: bool) -> None:
    study, other = (folders.write_study(tmp_path / name, seeds=(0,)) for name in ("s", "other"))
    archive.export(study, study / archive.NAME)
    before = {path.name for path in study.iterdir()}
    for folder in (study, other):
        with pytest.raises(errors.RunError, match=r"is a study folder, .*another with --out"):
            report.write(study / archive.NAME if exported else study, out=folder)
    assert {path.name for path in study.iterdir()} == before
    assert store.read_study(study).search is None


def test_a_folder_that_is_no_study_is_refused_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(errors.RunError, match=r"not a study folder.*spectreg reproduce"):
        report.write(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            run_folder.MEASURES,
            "[1]",
            "measures.json holds no JSON object: delete it and spectreg measure its run again",
        ),
        (run_folder.MEASURES, '{"spectra": {"a": []}}', "measures.json has a wrong spectra.a"),
        (run_folder.METRICS, '{"train_loss": 1}\n', "metrics.jsonl: line 1 has no epoch"),
        (run_folder.METRICS, "[]\n", "metrics.jsonl: line 1 has no epoch"),
        (run_folder.METRICS, "", "2 of its epochs are not in metrics.jsonl"),
        (run_folder.OUTCOME, "{}", "outcome.json has no status"),
        (run_folder.VERSIONS, "3", "versions.json holds no JSON object"),
    ],
)
def test_a_run_with_a_broken_file_is_named_with_it_and_the_others_are_shown(
    tmp_path: Path, file: str, content: str, said: str
) -> None:
    folder = folders.write_study(tmp_path / "s", seeds=(0,))
    (folder / "runs" / "vgg-small-decay-0" / file).write_text(content)
    words = text(report.write(folder)).replace("`", "")
    assert "8 runs: 7 finished, 1 missing" in words
    assert re.sub(r"\s+", " ", said) in re.sub(r" (?=[:;,.])", "", words)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"format": 1, "study": {}, "command": ""}', '{"points": [1]}'])
def test_a_broken_record_of_a_study_is_refused_with_its_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / store.STUDY).write_text(content)
    with pytest.raises(errors.RunError, match=r"study\.json .*give the command that made it again"):
        report.write(tmp_path)


@pytest.mark.slow
@pytest.mark.untraced
def test_the_page_of_a_hundred_runs_of_200_epochs_is_under_12_mb(tmp_path: Path) -> None:
    def curve(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
        return [(1 - 0.9**n, 0.8 - 0.7**n / (seed + 2)) for n in range(1, 201)]

    def line(regime: str, method: str, seed: int, epoch: int) -> dict:
        sigma = {f"features.{i}.weight": 1.0 + i / epoch for i in range(15)}
        measured = {"input_gradient": {"train": 1 / epoch, "test": epoch / 200}} if epoch % 10 == 0 else {}
        return {"sigma": sigma, "objective": 1 / epoch, "train_loss": 1 / epoch, "test_loss": 1 / epoch} | measured

    def measures(regime: str, method: str, seed: int) -> dict:
        return {"spectra": {f"features.{i}.weight": [2.0 / (k + 1) for k in range(256)] for i in range(15)}}

    settings = {name: {"model": {"name": "vgg"}, "data": {"name": "digits"}} for name in ("one", "two")}
    folder = folders.write_study(
        tmp_path / "s", curve, seeds=tuple(range(7)), settings=settings, line=line, measures=measures
    )
    assert len(list((folder / "runs").iterdir())) >= 100
    assert report.write(folder).stat().st_size < 12e6


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["study"], None),
        (["study", "methods"], None),
        (["study", "settings", "vgg", "data", "name"], {}),
        (["study", "regimes", "small", "batch_size"], []),
        (["study", "methods", "decay"], [1]),
        (["points"], None),
        (["points", 0, "run"], "../../elsewhere"),
        (["points", 0, "seed"], "0"),
        (["command"], 3),
    ],
)
def test_a_record_of_a_study_that_was_tampered_with_is_refused_by_name(
    tmp_path: Path, place: list, value: object
) -> None:
    folder = folders.write_study(tmp_path / "s", seeds=(0,), methods=("vanilla", "decay"))
    content = json.loads((folder / store.STUDY).read_text())
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    (folder / store.STUDY).write_text(json.dumps(content))
    with pytest.raises(errors.RunError, match=r"(study\.json|record of the study in .*) has a wrong "):
        report.write(folder)


@pytest.mark.parametrize("kind", ["setting", "regime", "method"])
def test_a_run_that_is_not_of_the_study_is_named(tmp_path: Path, kind: str) -> None:
    folder = folders.write_study(tmp_path / "s")
    content = json.loads((folder / store.STUDY).read_text())
    content["points"][0][kind] = "tiny"
    (folder / store.STUDY).write_text(json.dumps(content))
    with pytest.raises(errors.RunError, match=rf"has a run of the {kind} 'tiny', which its study has not"):
        report.write(folder)


def test_a_search_has_no_page_and_its_table_is_named(tmp_path: Path) -> None:
    folder = folders.write_study(tmp_path / "s")
    content = json.loads((folder / store.STUDY).read_text())
    content["study"]["search"] = {"learning_rate": {"small": [0.1], "large": [0.1, 0.2]}}
    (folder / store.STUDY).write_text(json.dumps(content))
    with pytest.raises(errors.RunError, match=r"holds a search, .* what it chose is in search\.csv"):
        report.write(folder)
    assert not (folder / store.REPORT).exists()
