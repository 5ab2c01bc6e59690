import csv
import errno
import io
import json
import math

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectreg_lab.storage import checkpoints, files, run_folder, store
from spectreg_lab.storage.checkpoints import Checkpoint
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.files import write
from spectreg_lab.storage.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path, tiny):
    place = RunFolder(tmp_path / "run")
    with place.claimed():
        place.begin(tiny(), {"torch": "2"})
    return place


def advance(folder, epochs):
    for epoch in epochs:
        folder.append({"epoch": epoch, "loss": 1 / epoch})
        folder.save(Checkpoint(epoch, {"model/w": torch.full((2,), float(epoch)), "method/n": torch.tensor(epoch)}))


def test_what_is_stored_is_what_comes_back(folder, tiny):
    advance(folder, [1, 2, 3])
    found = folder.resume()
    assert found.epoch == 3
    assert torch.equal(found.part("model")["w"], torch.full((2,), 3.0))
    assert found.part("method")["n"].item() == 3
    assert folder.config() == tiny()
    assert folder.versions() == {"torch": "2"}
    assert [line["epoch"] for line in folder.metrics()] == [1, 2, 3]


def test_only_the_last_two_checkpoints_are_kept_and_one_at_the_end(folder):
    advance(folder, range(1, 12))
    assert sorted(p.name for p in folder.path.glob("*.safetensors")) == [
        "checkpoint-10.safetensors",
        "checkpoint-11.safetensors",
    ]
    folder.end("finished")
    assert [p.name for p in folder.path.glob("*.safetensors")] == ["checkpoint-11.safetensors"]
    assert folder.outcome() == {"status": "finished"}


def test_a_line_without_its_checkpoint_is_dropped_on_resuming(folder):
    advance(folder, [1, 2])
    folder.append({"epoch": 3, "loss": 0.0})
    assert folder.resume().epoch == 2
    assert [line["epoch"] for line in folder.metrics()] == [1, 2]


def test_a_line_cut_short_is_dropped(folder):
    advance(folder, [1, 2])
    with (folder.path / run_folder.METRICS).open("a") as file:
        file.write('{"epoch": 3, "lo')
    assert len(folder.metrics()) == 2
    assert folder.resume().epoch == 2


def test_a_line_damaged_in_the_middle_is_said_and_costs_no_checkpoint(folder):
    advance(folder, [1, 2])
    file = folder.path / run_folder.METRICS
    file.write_bytes(b"\x00" + file.read_bytes()[1:])
    before = sorted(path.name for path in folder.path.iterdir())
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 1 is damaged: delete its folder and run again"):
        folder.resume()
    assert sorted(path.name for path in folder.path.iterdir()) == before


@pytest.mark.parametrize("kept", [0, 7, 60, 150])
def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(folder, kept, caplog):
    advance(folder, [1, 2])
    newest = folder.path / "checkpoint-2.safetensors"
    newest.write_bytes(newest.read_bytes()[:kept])
    assert folder.resume().epoch == 1
    assert [line["epoch"] for line in folder.metrics()] == [1]
    assert not newest.exists()
    assert "checkpoint-2.safetensors is damaged" in caplog.text


def rewrite(path, drop=(), **metadata):
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(tensors, path, metadata or None)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


BROKEN = {
    "no metadata": rewrite,
    "no epoch": lambda path: rewrite(path, format="1"),
    "epoch -1": lambda path: rewrite(path, epoch="-1"),
    "epoch of another": lambda path: rewrite(path, epoch="1"),
    "epoch no number": lambda path: rewrite(path, epoch="²"),
    "no checksum": lambda path: rewrite(path, format="1", epoch="2"),
    "a tensor less": lambda path: rewrite(path, ["model/w"], **metadata_of(path)),
    "a tensor more": lambda path: save_file(load_file(path) | {"x": torch.ones(2)}, path, metadata_of(path)),
    "another shape": lambda path: save_file(
        {name: t.reshape(1, -1) for name, t in load_file(path).items()}, path, metadata_of(path)
    ),
    "no file of tensors": lambda path: path.write_bytes(b"<html>not found</html>"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_is_not_what_was_written_falls_back_to_the_one_before(folder, broken, caplog):
    advance(folder, [1, 2])
    broken(folder.path / "checkpoint-2.safetensors")
    assert folder.newest().epoch == 1
    assert folder.resume().epoch == 1
    assert "checkpoint-2.safetensors is damaged" in caplog.text
    advance(folder, [2])
    assert folder.resume().epoch == 2


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_checkpoint_with_one_flipped_bit_is_the_same_or_falls_back(folder, position, bit):
    if not folder.metrics():
        advance(folder, [1, 2])
    path = folder.path / "checkpoint-2.safetensors"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[int(position * len(whole))] ^= 1 << bit
    path.write_bytes(changed)
    found = folder.newest()
    path.write_bytes(whole)
    assert found.epoch == 1 or (
        found.epoch == 2 and torch.equal(found.part("model")["w"], torch.full((2,), 2.0)) and len(found.tensors) == 2
    )


def test_a_run_all_of_whose_checkpoints_are_damaged_says_so_when_it_is_to_be_measured(folder):
    advance(folder, [1])
    path = folder.path / "checkpoint-1.safetensors"
    rewrite(path, **(metadata_of(path) | {"checksum": "0"}))
    before = snapshot(folder.path)
    with pytest.raises(RunError, match=r"checkpoint-1\.safetensors is damaged \(its checksum .* another folder"):
        folder.newest()
    assert snapshot(folder.path) == before


@pytest.mark.parametrize("name", ["checkpoint-x", "checkpoint--3", "checkpoint-²", "checkpoint-", "checkpoint-2.old"])
def test_a_file_whose_name_is_no_checkpoints_is_left_alone(folder, name):
    advance(folder, [1, 2])
    stranger = folder.path / f"{name}.safetensors"
    stranger.write_bytes(b"mine")
    assert folder.resume().epoch == 2
    advance(folder, [3])
    folder.end("finished")
    assert stranger.read_bytes() == b"mine"


@pytest.mark.parametrize("reading", ["resume", "newest"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(folder, monkeypatch, reading):
    advance(folder, [1, 2])
    before = snapshot(folder.path)

    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    for name in ("safe_open", "_checksum"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, name, fail)
            with pytest.raises(OSError, match="Too many open files"):
                getattr(folder, reading)()
    assert snapshot(folder.path) == before
    assert folder.resume().epoch == 2


def test_checkpoints_that_lie_ahead_of_the_metrics_do_not_push_out_those_that_are_needed(folder):
    advance(folder, range(1, 7))
    lines = (folder.path / run_folder.METRICS).read_text().splitlines(keepends=True)
    (folder.path / run_folder.METRICS).write_text("".join(lines[:2]))
    assert folder.resume() is None
    advance(folder, [1, 2])
    assert sorted(path.name for path in folder.path.glob("checkpoint-*")) == [
        "checkpoint-1.safetensors",
        "checkpoint-2.safetensors",
    ]


def snapshot(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_numbers_that_are_not_finite_are_json_and_come_back_as_they_were(folder):
    folder.append({"epoch": 1, "train_loss": math.inf, "test_loss": -math.inf, "sigma": {"w": math.nan}})
    folder.save_measures({"hessian": {"test": {"value": math.nan, "residual": math.inf}}})
    for name in (run_folder.METRICS, run_folder.MEASURES):

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        json.loads((folder.path / name).read_text(), parse_constant=refuse)
    (line,) = folder.metrics()
    assert (line["train_loss"], line["test_loss"]) == (math.inf, -math.inf)
    assert math.isnan(line["sigma"]["w"])
    assert folder.measures()["hessian"]["test"]["residual"] == math.inf


def test_bare_nan_of_older_files_is_read(folder):
    (folder.path / run_folder.METRICS).write_text('{"epoch": 1, "train_loss": NaN}\n')
    assert math.isnan(folder.metrics()[0]["train_loss"])


def test_with_no_readable_checkpoint_the_run_starts_anew(folder):
    advance(folder, [1])
    (folder.path / "checkpoint-1.safetensors").write_bytes(b"")
    assert folder.resume() is None
    assert folder.metrics() == []


def test_a_checkpoint_newer_than_the_metrics_is_not_used(folder):
    advance(folder, [1, 2])
    (folder.path / run_folder.METRICS).write_text('{"epoch": 1}\n')
    assert folder.resume().epoch == 1


@pytest.mark.parametrize(("surplus", "finished"), [(-1, False), (0, True), (3, True)])
def test_a_run_is_finished_if_it_has_the_numbers_of_all_its_epochs(folder, surplus, finished):
    epochs = folder.config().epochs
    advance(folder, range(1, epochs + surplus + 1))
    folder.end("finished")
    assert folder.finished() is finished
    assert folder.lost() == (0 if finished else 1)


def test_a_second_process_is_told_that_the_run_is_in_use(folder):
    with (
        folder.claimed(),
        pytest.raises(RunError, match=r"another process is working on .*run"),
        RunFolder(folder.path).claimed(),
    ):
        pass


def test_versions_are_those_of_the_first_epoch_and_later_ones_are_said_beside_them(folder, tiny):
    folder.begin(tiny(), {"torch": "3", "started": "later"})
    assert folder.versions() == {"torch": "3", "started": "later"}
    advance(folder, [1])
    folder.begin(tiny(), {"torch": "4", "started": "later still"})
    assert folder.versions() == {"torch": "3", "started": "later", "continued": "torch 4"}
    folder.begin(tiny(), {"torch": "3"})
    assert folder.versions()["continued"] == "torch 4"


def test_a_folder_of_another_setting_is_refused_with_what_differs(folder, tiny):
    with pytest.raises(RunError, match=r"another setting \(differs in: epochs, seed\)"):
        folder.begin(tiny(seed=3, epochs=9), {})


def test_a_folder_of_another_format_is_refused(folder, tiny):
    (folder.path / run_folder.CONFIG).write_text(json.dumps({"format": 99, "config": {}}))
    with pytest.raises(RunError, match="has format 99; this version reads format 1"):
        folder.begin(tiny(), {})


def test_a_broken_setting_is_refused_by_name(folder):
    (folder.path / run_folder.CONFIG).write_text("{")
    with pytest.raises(RunError, match=r"config.json is not JSON"):
        folder.config()


def test_a_folder_that_is_no_run_or_study_is_refused(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder(tmp_path).config()
    with pytest.raises(RunError, match="not a study folder"):
        store.read_study(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r\n=1"])
def test_no_text_in_a_csv_is_a_formula_and_numbers_stay_numbers(text):
    frame = pd.DataFrame({text: [-0.5, 1.5], "word": [text, "plain = text"], "count": [-3, 2**60]})
    (head, first, second) = csv.reader(io.StringIO(files.csv(frame).decode(), newline=""))
    line = text.replace("\r\n", " ")
    assert head == [f"'{line}", "word", "count"]
    assert first == ["-0.5", f"'{line}", "-3"]
    assert second == ["1.5", "plain = text", str(2**60)]


def test_a_csv_has_the_digits_that_are_alike_on_all_processors():
    assert files.csv(pd.DataFrame({"p": [0.123456789012345, math.nan]})) == b'p\n0.123457\n""\n'


def test_a_run_whose_process_died_before_it_could_begin_is_failed_with_its_cause(tmp_path):
    point = {"setting": "vgg", "regime": "small", "method": "decay", "seed": 0}
    store.begin_study(tmp_path, {"name": "s"}, [point | {"run": "dead"}, point | {"run": "waiting"}], "spectreg")
    (tmp_path / "runs" / "dead").mkdir()
    RunFolder(tmp_path / "runs" / "dead").end("failed", error="its process ended with SIGKILL, 2 times")
    dead, waiting = store.read_study(tmp_path).runs
    assert (dead.status, dead.error) == ("failed", "its process ended with SIGKILL, 2 times")
    assert (waiting.status, waiting.error) == ("missing", None)


def test_a_table_of_a_search_that_is_no_text_is_refused_by_name(tmp_path):
    store.begin_study(tmp_path, {"name": "s"}, [], "spectreg")
    (tmp_path / store.SEARCH).write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"search\.csv is not text .*: `spectreg search` writes it anew"):
        store.read_study(tmp_path)


def test_what_killed_writes_have_left_is_deleted_when_the_run_goes_on(folder):
    advance(folder, [1])
    left = [".checkpoint-2.safetensors.0123456789ab", ".metrics.jsonl.0123456789ab", ".outcome.json.0123456789ab"]
    others = [".claim-1.json.0123456789ab", ".notes", "checkpoint.txt"]
    for name in (*left, *others):
        (folder.path / name).write_bytes(b"?")
    assert folder.resume().epoch == 1
    assert [name for name in (*left, *others) if (folder.path / name).exists()] == others


def test_a_study_of_a_newer_format_is_not_written_over(tmp_path):
    store.begin_study(tmp_path, {"name": "a"}, [], "spectreg")
    file = tmp_path / store.STUDY
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    before = file.read_bytes()
    with pytest.raises(RunError, match="has format 2; this version reads format 1: use the spectreg version"):
        store.begin_study(tmp_path, {"name": "a"}, [], "spectreg")
    assert file.read_bytes() == before


def test_finished_runs_behind_links_are_found(tmp_path, folder):
    folder.end("finished")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "runs").mkdir()
    (tmp_path / "study" / "runs" / "a").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "circle").symlink_to(tmp_path / "study")
    assert [p.resolve() for p in store.finished_runs(tmp_path / "study")] == [(tmp_path / "run").resolve()]
