"""Ray as an engine: a cluster of two machines on this one, and none."""

import getpass
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from small_study import STUDY
from test_cli import start
from test_engines import claimed, equal_to_uninterrupted, wait_for

from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.studies.means import EngineName, Means
from spectreg_lab.studies.worker import Job
from spectreg_lab.training.devices import DeviceError
from spectreg_lab.training.runs import run

EPOCHS = 40
ONE_RUN_AT_A_TIME = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture
def study(tmp_path):
    """Two runs, each of a second or two."""
    path = tmp_path / "small.toml"
    path.write_text(
        STUDY.replace("epochs = 2", f"epochs = {EPOCHS}")
        .replace("seeds = [0, 1]", "seeds = [0]")
        .replace("[regimes.large]\nbatch_size = 64\n", "")
        .replace(", large = 0.1", "")
        .replace("[methods.decay]\n", "")
    )
    return path


@pytest.fixture(scope="module")
def private_ray():
    """Ray that listens to this machine only, in a folder of its own with a short name, as its sockets need."""
    pytest.importorskip("ray")
    place = Path("/tmp") / f"sr-{getpass.getuser()}-{os.getpid()}"
    (place / "ray").mkdir(parents=True)
    settings = {
        "RAY_TMPDIR": str(place),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": "0" * 32,
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(private_ray):
    """A machine with room for one run; a test may add others."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**ONE_RUN_AT_A_TIME, "include_dashboard": False})
    yield made
    made.shutdown()


def finished(folder):
    return [RunFolder(path.parent).finished() for path in folder.rglob("outcome.json")]


@pytest.mark.slow
def test_a_run_of_ray_whose_process_is_killed_goes_on_to_the_same_bits(cluster, study, tmp_path):
    process = start("reproduce", study, "--out", tmp_path / "out", "--engine", "ray", "--address", cluster.address)
    lost, owner = wait_for(claimed(tmp_path / "out"))
    os.kill(owner.process, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("trying once more") == 1
    assert "died" in err
    assert finished(tmp_path / "out") == [True] * 2
    assert equal_to_uninterrupted(lost, tmp_path / "alone")


@pytest.mark.slow
def test_a_study_goes_through_on_two_machines_of_a_ray_cluster_while_one_is_removed(cluster, study, tmp_path):
    second = cluster.add_node(**ONE_RUN_AT_A_TIME)
    process = start("reproduce", study, "--out", tmp_path / "out", "--engine", "ray", "--address", cluster.address)
    lost, _ = wait_for(claimed(tmp_path / "out", second.node_id))
    cluster.remove_node(second, allow_graceful=False)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("of the cluster is gone; trying once more") == 1
    places = [RunFolder(path.parent) for path in (tmp_path / "out").rglob("outcome.json")]
    assert finished(tmp_path / "out") == [True] * 2
    assert [[line["epoch"] for line in place.metrics()] for place in places] == [list(range(1, EPOCHS + 1))] * 2
    assert equal_to_uninterrupted(lost, tmp_path / "alone")
    assert "Traceback" not in err
    assert "raylet" not in out + err


@pytest.mark.slow
def test_control_c_stops_a_cluster_of_rays_own_says_how_to_go_on_and_leaves_no_process(private_ray, study, tmp_path):
    process = start("reproduce", study, "--out", tmp_path / "out", "--engine", "ray", start_new_session=True)
    begun, owner = wait_for(claimed(tmp_path / "out"))
    others = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"what is finished is kept in {tmp_path / 'out'}. The same command goes on from there" in err
    assert "Traceback" not in out + err
    assert psutil.wait_procs(others, timeout=30)[1] == []
    assert owner.process in [other.pid for other in others]
    assert run(RunFolder(begun).config(), begun) == {"status": "finished"}  # its claim is free at once
    assert equal_to_uninterrupted(begun, tmp_path / "alone")


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
