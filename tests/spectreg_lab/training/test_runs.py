import errno
import json
import random
import threading
import time

import forked
import pytest
import torch

from spectreg_lab.settings.config import Data
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.training.runs import run
from spectreg_lab.training.train import Training


def lines(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in RunFolder(folder).metrics()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adversarial", "spectral"])
def test_a_run_killed_at_a_random_moment_ends_with_the_numbers_and_weights_of_one_that_was_not(tmp_path, tiny, method):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    data = Data(train_size=320, test_size=60)
    config = tiny({"name": method}, data=data, batch_size=16, epochs=8)
    run(config, whole)
    random.seed(method)
    kills = 0
    for _ in range(3):
        process = forked.process(run, config, killed)
        seen = len(lines(killed)) if killed.exists() else 0
        while process.is_alive() and len(lines(killed)) == seen:
            time.sleep(0.002)
        time.sleep(random.random() * 0.3)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills, "the run was over before it could be killed"
    process = forked.process(run, config, killed)
    process.join()
    assert process.exitcode == 0
    assert lines(killed) == lines(whole)
    ends = [RunFolder(folder).resume() for folder in (whole, killed)]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(torch.equal(ends[0].tensors[key], ends[1].tensors[key]) for key in ends[0].tensors)
    assert RunFolder(killed).outcome() == {"status": "finished"}


def test_a_finished_run_is_not_repeated(tmp_path, tiny):
    config = tiny(epochs=2)
    assert run(config, tmp_path) == {"status": "finished"}
    files = {
        p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.suffix in (".json", ".jsonl", ".safetensors")
    }
    assert run(config, tmp_path) == {"status": "finished"}
    assert files == {name: (tmp_path / name).stat().st_mtime_ns for name in files}


def test_a_run_goes_on_after_an_interruption_in_this_process(tmp_path, tiny):
    def stop(metrics):
        if metrics["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path / "stopped", on_epoch=stop)
    run(tiny(), tmp_path / "stopped")
    run(tiny(), tmp_path / "whole")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_the_next_epoch_is_trained_while_one_is_written_and_a_run_ends_with_all_of_them_on_disk(
    tmp_path, tiny, monkeypatch
):
    begun, save = threading.Event(), RunFolder.save

    def slow_save(place, checkpoint):
        assert begun.wait(60), "the second epoch waits for the first one's checkpoint"
        save(place, checkpoint)

    def epoch(training, number):
        if number == 2:
            begun.set()
        return train_epoch(training, number)

    train_epoch = Training.epoch
    monkeypatch.setattr(RunFolder, "save", slow_save)
    monkeypatch.setattr(Training, "epoch", epoch)
    assert run(tiny(), tmp_path) == {"status": "finished"}
    assert [line["epoch"] for line in RunFolder(tmp_path).metrics()] == [1, 2, 3]
    assert RunFolder(tmp_path).resume().epoch == 3


def test_an_epoch_that_cannot_be_written_stops_the_run_which_goes_on_when_it_can(tmp_path, tiny, monkeypatch):
    def full(place, checkpoint):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(tiny(), tmp_path / "stopped")
    assert RunFolder(tmp_path / "stopped").outcome() is None
    run(tiny(), tmp_path / "stopped")
    run(tiny(), tmp_path / "whole")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_loss_that_is_not_finite_is_recorded_as_a_failure(tmp_path, tiny):
    outcome = run(tiny(learning_rate=1e30), tmp_path)
    assert outcome["status"] == "failed"
    assert outcome["error"].startswith("NonFiniteLossError: epoch 1: the training ")
    assert RunFolder(tmp_path).outcome() == outcome


def test_a_network_that_does_not_fit_the_images_is_recorded_as_a_failure(tmp_path, tiny):
    outcome = run(tiny(model={"name": "vgg"}), tmp_path)
    assert "too small for the 5 poolings" in outcome["error"]


def test_data_that_cannot_be_had_are_recorded_as_a_failure(tmp_path, tiny):
    assert "no such folder" in run(tiny(data=Data(name="./absent")), tmp_path)["error"]


def test_two_processes_cannot_have_one_run(tmp_path, tiny):
    with RunFolder(tmp_path).claimed(), pytest.raises(RunError, match="another process"):
        run(tiny(), tmp_path)


def test_a_run_records_versions_machine_and_command(tmp_path, tiny):
    run(tiny(epochs=1), tmp_path)
    versions = RunFolder(tmp_path).versions()
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"spectreg", "python", "commit", "machine", "command", "threads", "started"} < set(versions)


def test_nothing_in_a_run_folder_is_a_pickle(tmp_path, tiny):
    run(tiny(epochs=1), tmp_path)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".jsonl", ".safetensors"}
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
