"""Two gloo processes on the CPU: what several devices do to a run."""

import json

import pytest
import torch
from lightning_fabric import Fabric

from spectreg_lab.config import VGG, Adversarial, Config, Data, Spectral, Vanilla
from spectreg_lab.data import batches, load
from spectreg_lab.runs import run
from spectreg_lab.store import RunFolder
from spectreg_lab.train import Training

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


def two_epochs(fabric, place):
    """Train each method and write its weights, from the first process."""
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
    # Fabric leaves this to `atexit`, which a spawned process skips: its gloo threads would then now and then abort it.
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_leave_one_run_folder(tmp_path, fabric):
    several = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn", precision="64-true")
    several.launch(two_epochs, tmp_path)
    for method in METHODS:
        setting = config(method)
        training = Training(setting, load(setting.data), fabric)
        for x, y in batches(training.train, setting.batch_size, 0, 1):
            training.step(x, y)
        found = torch.load(tmp_path / f"{method.name}.pt", weights_only=True)
        for name, tensor in training.tensors().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"status": "finished"}
    run(config(Spectral()), tmp_path / "alone")
    together, alone = (RunFolder(tmp_path / name).metrics() for name in ("run", "alone"))
    for a, b in zip(together, alone, strict=True):
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-6)
