import csv
import io
import json
import math

import pandas as pd
import pytest
import torch

from spectreg_lab.storage import files, store
from spectreg_lab.storage.files import write
from spectreg_lab.storage.store import Checkpoint, RunError, RunFolder


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
    with (folder.path / store.METRICS).open("a") as file:
        file.write('{"epoch": 3, "lo')
    assert len(folder.metrics()) == 2
    assert folder.resume().epoch == 2


@pytest.mark.parametrize("kept", [0, 7, 60, 150])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(folder, kept):
    advance(folder, [1, 2])
    newest = folder.path / "checkpoint-2.safetensors"
    newest.write_bytes(newest.read_bytes()[:kept])
    assert folder.resume().epoch == 1
    assert [line["epoch"] for line in folder.metrics()] == [1]
    assert not newest.exists()


def test_with_no_readable_checkpoint_the_run_starts_anew(folder):
    advance(folder, [1])
    (folder.path / "checkpoint-1.safetensors").write_bytes(b"")
    assert folder.resume() is None
    assert folder.metrics() == []


def test_a_checkpoint_newer_than_the_metrics_is_not_used(folder):
    advance(folder, [1, 2])
    (folder.path / store.METRICS).write_text('{"epoch": 1}\n')
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
    (folder.path / store.CONFIG).write_text(json.dumps({"format": 99, "config": {}}))
    with pytest.raises(RunError, match="has format 99; this version reads format 1"):
        folder.begin(tiny(), {})


def test_a_broken_setting_is_refused_by_name(folder):
    (folder.path / store.CONFIG).write_text("{")
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
