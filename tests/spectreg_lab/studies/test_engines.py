"""Options of engines, and what an engine must not do."""

import os
import signal
import sys
import time

import pytest
from small_study import STUDY
from test_cli import in_process
from test_execution import numbers

from spectreg_lab.storage.claims import holder
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.studies import local
from spectreg_lab.studies.local import LocalEngine
from spectreg_lab.studies.means import EngineName, Means
from spectreg_lab.training.devices import DeviceError
from spectreg_lab.training.runs import run


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace("epochs = 2", "epochs = 40").replace("seeds = [0, 1]", "seeds = [0]"))
    return path


def wait_for(find, patience=120.0):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.02)
    raise TimeoutError


def claimed(folder, node=None):
    """A run that is being done, on ``node`` if one is given, and has stored an epoch."""

    def find():
        for path in folder.rglob("checkpoint-*.safetensors"):
            owner = holder(path.parent)
            if owner is not None and node in (None, owner.node):
                return path.parent, owner
        return None

    return find


def equal_to_uninterrupted(place, alone):
    run(RunFolder(place).config(), alone)
    return numbers(RunFolder(place)) == numbers(RunFolder(alone))


@pytest.mark.parametrize(
    ("means", "message"),
    [
        (Means(address="auto"), r"--address is for --engine ray .*: leave it out"),
        (Means(cpus_per_run=2), r"--cpus-per-run is for --engine ray \(here: --processes and --threads\)"),
        (Means(EngineName.RAY, processes=2, threads=2), r"--processes and --threads are for --engine local .*Ray"),
        (Means(devices=2, threads=1), r"--threads is for runs side by side, but each run is to have 2 devices"),
        (Means(EngineName.RAY, devices=2), r"--engine is for runs side by side"),
    ],
    ids=lambda x: "" if isinstance(x, str) else None,
)
def test_options_that_would_have_no_effect_are_refused(means, message):
    with pytest.raises(DeviceError, match=message):
        means.shape()


def test_a_cpu_has_no_share_of_a_gpu():
    with pytest.raises(DeviceError, match="--per-gpu 2, but the accelerator here is cpu: leave --per-gpu out"):
        Means(per_gpu=2, accelerator="cpu").start()


@pytest.mark.parametrize(
    ("processes", "per_gpu", "expected"),
    [(None, None, ["3", "5"]), (None, 2, ["3", "5", "3", "5"]), (3, None, ["3", "5", "3"])],
)
def test_there_is_a_place_for_a_run_on_each_gpu(monkeypatch, processes, per_gpu, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("spectreg_lab.training.devices.one_device", lambda accelerator: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    engine = LocalEngine.for_machine(processes, None, "cuda", per_gpu)
    assert [place.gpu for place in engine.places] == expected
    with pytest.raises(DeviceError, match="--processes and --per-gpu both say"):
        LocalEngine.for_machine(2, None, "cuda", 2)


def test_a_process_is_told_its_gpu_and_threads_before_torch_is_imported(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    local._prepare(3, "7")
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]) == ("7", "3")
    import subprocess

    code = "import sys, spectreg_lab.studies.local; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_an_unknown_engine_is_one_line(study, tmp_path):
    code, _, err = in_process("reproduce", study, "--out", tmp_path / "out", "--engine", "slurm")
    assert (code, err.strip()) == (2, "spectreg: --engine slurm: no such engine; known: local, ray")
