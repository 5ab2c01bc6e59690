"""Ray as an engine, options of engines, and what an engine must not do."""

import getpass
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_study import STUDY
from test_cli import spectreg, start
from test_execution import numbers

from spectreg_lab.storage.claims import holder
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.studies import local
from spectreg_lab.studies.local import LocalEngine
from spectreg_lab.studies.means import EngineName, Means
from spectreg_lab.studies.worker import Job
from spectreg_lab.training.devices import DeviceError
from spectreg_lab.training.runs import run


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace("epochs = 2", "epochs = 40").replace("seeds = [0, 1]", "seeds = [0]"))
    return path


@pytest.fixture
def private_ray(monkeypatch, tmp_path_factory):
    """Ray that listens to this machine only, in a folder of its own with a short name, as its sockets need."""
    pytest.importorskip("ray")
    place = Path("/tmp") / f"sr-{getpass.getuser()}-{os.getpid()}"
    (place / "ray").mkdir(parents=True)
    for name, value in {
        "RAY_TMPDIR": str(place),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": "0" * 32,
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    yield place
    import shutil

    shutil.rmtree(place, ignore_errors=True)


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


@pytest.mark.slow
def test_a_study_goes_through_on_two_machines_of_a_ray_cluster_while_one_is_removed(private_ray, study, tmp_path):
    from ray.cluster_utils import Cluster

    some = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**some, "include_dashboard": False})
    try:
        second = cluster.add_node(**some)
        words = ["--engine", "ray", "--address", cluster.address]
        process = start("reproduce", study, "--out", tmp_path / "out", *words)
        lost, _ = wait_for(claimed(tmp_path / "out", second.node_id))
        cluster.remove_node(second, allow_graceful=False)
        out, err = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, err
    assert err.count("of the cluster is gone; trying once more") == 1
    places = [RunFolder(path.parent) for path in (tmp_path / "out").rglob("outcome.json")]
    assert [place.finished() for place in places] == [True] * 6
    assert [[line["epoch"] for line in place.metrics()] for place in places] == [list(range(1, 41))] * 6
    assert equal_to_uninterrupted(lost, tmp_path / "alone")
    assert "Traceback" not in err
    assert "raylet" not in out + err


@pytest.mark.slow
def test_a_run_of_ray_whose_process_is_killed_goes_on_and_no_cluster_is_needed(private_ray, study, tmp_path):
    process = start("reproduce", study, "--out", tmp_path / "out", "--engine", "ray", "--regime", "small")
    lost, owner = wait_for(claimed(tmp_path / "out"))
    os.kill(owner.process, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("trying once more") == 1
    assert "died" in err
    assert equal_to_uninterrupted(lost, tmp_path / "alone")


class Nodes:
    """As much of Ray as the choice of a machine needs."""

    def __init__(self, *names):
        self.names, self.selectors = names, []

    def nodes(self):
        return [{"NodeID": name, "Alive": True} for name in self.names]

    def remote(self, function):
        return self

    def options(self, label_selector, **_):
        self.selectors.append(label_selector)
        return SimpleNamespace(remote=lambda *_: None)


def test_a_machine_that_lost_two_runs_gets_no_more_and_a_run_not_the_machine_that_lost_it(tiny, tmp_path):
    from spectreg_lab.studies.ray_engine import RayEngine

    engine = RayEngine.__new__(RayEngine)
    engine.ray, engine.lost, engine._share = Nodes("a", "b", "c"), Counter({"a": 2, "b": 1}), {"num_cpus": 1}
    engine.accelerator, engine.cpus = "cpu", 1
    job = Job(tiny(), tmp_path)
    engine._submit(job)
    engine._submit(job.again("b"))
    engine._submit(job.again("b").again("c"))  # no other machine is left: any that has not lost two
    assert engine.ray.selectors == [{"ray.io/node-id": f"!in({names})"} for names in ("a", "a,b", "a")]
    engine.lost = Counter(dict.fromkeys("abc", 2))
    with pytest.raises(DeviceError, match="on each machine of the cluster 2 processes have died"):
        engine._submit(job)


def test_ray_that_is_not_installed_is_said_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match=r"needs Ray, which is not installed: pip install 'spectreg\[ray\]'"):
        Means(EngineName.RAY).start()


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


@pytest.mark.slow
def test_an_unknown_engine_is_one_line(study, tmp_path):
    code, _, err = spectreg("reproduce", study, "--out", tmp_path / "out", "--engine", "slurm")
    assert (code, err.strip()) == (2, "spectreg: --engine slurm: no such engine; known: local, ray")
