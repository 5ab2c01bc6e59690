"""Two gloo processes on the CPU: what several devices do to a run."""

import json
import os
import subprocess
import sys

import forked
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from small_study import STUDY
from test_cli import in_process

from spectreg_lab import measures
from spectreg_lab.data import batches, load
from spectreg_lab.settings.config import VGG, Adversarial, Config, Data, Measuring, Spectral, Vanilla
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.studies.local import LocalEngine
from spectreg_lab.training import runs
from spectreg_lab.training.devices import DeviceError, one_device, several_devices, shape
from spectreg_lab.training.runs import run
from spectreg_lab.training.train import Training, train

METHODS = [Vanilla(), Adversarial(), Spectral(strength=0.1)]


def config(method, **settings):
    defaults = {
        "model": VGG(width=4, stages=(1, 1), hidden=8, batch_norm=False),
        "data": Data(train_size=70, test_size=40),
        "batch_size": 33,
        "learning_rate": 0.05,
        "epochs": 2,
        "precision": "64-true",
    }
    return Config.model_validate({**defaults, "method": method, **settings})


class Remembering(Training):
    """Keeps the running statistics of its own process, as they are before those of all become one."""

    own = None

    def _average_buffers(self):
        self.own = statistics(self.model)
        super()._average_buffers()


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def two_epochs(fabric, place, environment):
    """Train each method and write its weights, from the first process; from each its running statistics."""
    os.environ.update(environment)
    setting = config(Vanilla(), model=VGG(width=4, stages=(1, 1), hidden=8))
    training = Remembering(setting, load(setting.data), fabric)
    training.epoch(1)
    torch.save((training.own, statistics(training.model)), place / f"statistics-{fabric.global_rank}.pt")
    for method in METHODS:
        setting = config(method)
        training = Training(setting, load(setting.data), fabric)
        for x, y in batches(training.train, setting.batch_size, 0, 1):
            training.step(x, y)
        if fabric.global_rank == 0:
            torch.save(training.tensors(), place / f"{method.name}.pt")
    outcome = run(config(Spectral()), place / "run", fabric)
    if fabric.global_rank == 0:
        (place / "outcome.json").write_text(json.dumps(outcome))
    # Fabric leaves this to `atexit`, which a forked process skips: its gloo threads would then now and then abort it.
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_leave_one_run_folder(tmp_path, fabric):
    forked.context()
    strategy = DDPStrategy(start_method="forkserver")
    several = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision="64-true")
    several.launch(two_epochs, tmp_path, {"SPECTREG_CACHE": os.environ["SPECTREG_CACHE"]})
    for method in METHODS:
        setting = config(method)
        training = Training(setting, load(setting.data), fabric)
        for x, y in batches(training.train, setting.batch_size, 0, 1):
            training.step(x, y)
        found = torch.load(tmp_path / f"{method.name}.pt", weights_only=True)
        for name, tensor in training.tensors().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)
    (own, mean), (other, same) = (torch.load(tmp_path / f"statistics-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in own:
        assert not torch.equal(own[name], other[name])
        torch.testing.assert_close(mean[name], (own[name] + other[name]) / 2)
        assert torch.equal(mean[name], same[name])
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"status": "finished"}
    run(config(Spectral()), tmp_path / "alone")
    together, alone = (RunFolder(tmp_path / name).metrics() for name in ("run", "alone"))
    for a, b in zip(together, alone, strict=True):
        for name in ("objective", "test_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-6)


@pytest.mark.slow
def test_the_command_under_torchrun_takes_the_processes_that_were_started(tmp_path):
    precision = "bf16-mixed"
    (tmp_path / "small.toml").write_text(STUDY.replace("seeds = [0, 1]", "seeds = [0]"))
    words = ["reproduce", "small.toml", "--method", "vanilla", "--accelerator", "cpu", "--precision", precision]
    words += ["--devices", "2"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "spectreg_lab.cli"]
    ended = subprocess.run(
        [sys.executable, *launcher, *words, "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report: ") == 1
    assert ended.stderr.count("2 runs to do") == 1
    places = [RunFolder(path.parent) for path in (tmp_path / "out").rglob("outcome.json")]
    assert [place.finished() for place in places] == [True, True]
    assert {place.config().precision for place in places} == {precision}


@pytest.mark.parametrize(
    ("environment", "asked", "expected"),
    [
        ({}, (None, None), (1, 1)),
        ({}, (8, 2), (8, 2)),
        ({"SLURM_NNODES": "2"}, (None, None), (1, 1)),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, (None, None), (1, 1)),  # two workers of a study
        ({"SLURM_NTASKS": "64"}, (None, None), (1, 1)),
        ({"SLURM_NTASKS": "64"}, (1, 1), (1, 1)),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, (2, None), (2, 1)),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, (8, None), (8, 2)),
        ({"WORLD_SIZE": "4"}, (2, 2), (2, 2)),  # as Fabric tells the processes that it starts itself
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, (4, 2), (4, 2)),
    ],
)
def test_a_run_has_one_device_unless_several_are_asked_for_by_their_own_option(
    monkeypatch, environment, asked, expected
):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shape(*asked) == expected


def test_one_device_is_alone_whatever_slurm_or_torchrun_have_started(monkeypatch):
    names = ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "RANK", "LOCAL_RANK", "SLURM_PROCID")
    for name, value in zip(names, "222111", strict=True):
        monkeypatch.setenv(name, value)
    for set_ in (names, names[:2], names[1:2]):
        for name in names:
            if name not in set_:
                monkeypatch.delenv(name, raising=False)
        alone = one_device("cpu")
        assert (alone.global_rank, alone.world_size) == (0, 1)


def test_other_devices_than_those_started_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(DeviceError, match=r"--devices 8, but 4 processes .* 4 on a machine: say --devices 4 --nodes 1"):
        shape(8, None)
    with pytest.raises(DeviceError, match="--nodes 2, but 4 processes"):
        shape(None, 2)


@pytest.mark.parametrize("devices", [1, 2])
def test_an_accelerator_that_is_not_there_is_refused_with_those_that_are(devices):
    def start(accelerator):
        if devices == 1:
            LocalEngine.for_machine(None, None, accelerator)
        else:
            with several_devices(accelerator, devices, 1, "32-true"):
                pass

    with pytest.raises(DeviceError, match=r"--accelerator foo: .*invalid accelerator.*cpu"):
        start("foo")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match=r"--accelerator cuda: .*not available.*\['cpu'\]"):
            start("cuda")


def test_a_batch_of_fewer_images_than_processes_is_refused(monkeypatch, fabric):
    setting = config(Vanilla(), batch_size=2)
    monkeypatch.setattr(Fabric, "world_size", 3)
    with pytest.raises(ValueError, match="a batch of 2 images cannot be shared out among 3 processes: use at most 2"):
        next(train(setting, load(setting.data), fabric, None))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("meta", torch.float64)])
def test_a_finished_run_is_measured_on_the_device_that_trained_it(tmp_path, monkeypatch, device, dtype):
    setting = config(Vanilla(), epochs=1)
    run(setting, tmp_path)
    seen = []

    def after(model, images, _):
        seen.extend([*model.parameters(), images.train.images, images.test.images])
        return {}

    monkeypatch.setattr(measures, "after", after)
    place = RunFolder(tmp_path)
    last = runs._last(place, setting)
    runs._measure(place, setting, last, load(setting.data), Measuring(), torch.device(device))
    assert {(tensor.device.type, tensor.dtype) for tensor in seen} == {(device, dtype)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--devices", "2", "--processes", "3"), "--processes is for runs side by side"),
        (("--accelerator", "foo"), "--accelerator foo: "),
        (("--accelerator", "foo", "--devices", "2"), "--accelerator foo: "),
        (
            ("--dry-run", "--devices", "8", "--precision", "64-true"),
            "--devices would change nothing, so leave that out",
        ),
        (("--dry-run", "--precision", "foo"), "training.precision: Input should be"),
        (("--dry-run", "--setting", "vg"), "no setting 'vg', did you mean 'vgg'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_options_that_cannot_be_followed_are_one_line_before_anything_is_written(tmp_path, words, message):
    (tmp_path / "small.toml").write_text(STUDY)
    code, _, err = in_process("reproduce", tmp_path / "small.toml", "--out", tmp_path / "out", *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
