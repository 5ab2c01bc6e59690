"""One run from its setting to its outcome: train, store, and go on after a kill."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from spectreg_lab import data, measures, models
from spectreg_lab.settings.config import Config, Measuring
from spectreg_lab.storage.checkpoints import Checkpoint
from spectreg_lab.storage.claims import ended
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.provenance import describe
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.training.devices import first_decides, one_device
from spectreg_lab.training.memory import keep_freed_memory
from spectreg_lab.training.train import Epoch, train
from spectreg_lab.training.writer import Writer

NOT_THE_RUNS = (OSError, RunError)  # of the machine or the folder: the run may go on from where it is


def run(
    config: Config,
    folder: Path,
    fabric: Fabric | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train ``config`` in ``folder`` to its end, going on from the last epoch found there; a finished run stays.

    Args:
        fabric: Where to train; one CPU process by default.
        on_epoch: Called with each epoch's metrics, those already on disk included. A new epoch's may still be on
            their way to the disk: they are written while the next epoch is trained.

    Returns:
        The outcome: ``{"status": "finished"}``, or ``{"status": "failed", "error": …}``.

    Raises:
        RunError: the folder is another run's, is of another format, or another process is working on it. A process that
            gives no sign of life, as after a power cut, is waited for first.
    """
    fabric, place = fabric or one_device(precision=config.precision), RunFolder(folder)
    with ExitStack() as held:
        first_decides(fabric, lambda: held.enter_context(place.claimed(dead=ended(folder))))
        return go_on(config, place, fabric, on_epoch)


def go_on(
    config: Config, place: RunFolder, fabric: Fabric, on_epoch: Callable[[dict[str, Any]], None] = lambda metrics: None
) -> dict[str, Any]:
    """`run` in a folder that is claimed already."""
    outcome, checkpoint = first_decides(fabric, lambda: _begin(config, place, fabric))
    return outcome or _train(config, place, fabric, checkpoint, on_epoch)


def _begin(config: Config, place: RunFolder, fabric: Fabric) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """The outcome of a run that is finished, and where to go on with one that is not."""
    place.begin(config, describe(str(fabric.device), torch.get_num_threads()))
    if place.finished():
        return place.outcome(), None
    return None, place.resume()


def _train(
    config: Config,
    place: RunFolder,
    fabric: Fabric,
    checkpoint: Checkpoint | None,
    on_epoch: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    first = fabric.global_rank == 0
    for metrics in place.metrics() if first else ():
        on_epoch(metrics)
    outcome: dict[str, Any] = {"status": "finished"}
    if fabric.device.type == "cpu":
        keep_freed_memory()
    try:
        images = data.load(config.data)
        resume = None if checkpoint is None else (checkpoint.epoch, checkpoint.tensors)
        with Writer() as write:
            for epoch in train(config, images, fabric, resume):
                if first:
                    metrics = epoch.metrics | _measures_due(config, epoch)
                    write(partial(_store, place, metrics, epoch.tensors))
                    on_epoch(metrics)
    except NOT_THE_RUNS:
        raise
    except Exception as error:  # whatever else stops a training is its outcome, and the study goes on
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    if first:
        if outcome["status"] == "finished" and config.measure is not None:
            outcome |= _measured(place, config, images, config.measure, fabric.device)
        place.end(**outcome)
    return outcome


def _store(place: RunFolder, metrics: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    place.append(metrics)
    place.save(Checkpoint(metrics["epoch"], tensors))


def _measured(
    place: RunFolder, config: Config, images: data.Images, setting: Measuring, device: torch.device
) -> dict[str, str]:
    """Measure a run that has just ended; what cannot be measured does not make it a failed run."""
    try:
        _measure(place, config, _last(place, config), images, setting, device)
    except NOT_THE_RUNS:
        raise
    except Exception as error:
        return {"measures": f"{type(error).__name__}: {error}"}
    return {}


def _measures_due(config: Config, epoch: Epoch) -> dict[str, Any]:
    every = config.measure and config.measure.every
    if not every or epoch.number % every:
        return {}
    assert config.measure is not None
    return measures.during(epoch.model, epoch.images, config.measure, config.measure.curves)


def measure(folder: Path, setting: Measuring | None = None) -> bool:
    """Measure the finished run in ``folder``, by its own setting unless another is given, and store it beside the run.

    Returns:
        Whether there was anything to do: False for a run that has its measures.

    Raises:
        RunError: the folder is no run, its run is not finished, or it has no weights.
        DataError: its images cannot be had.
    """
    place = RunFolder(folder)
    config = place.config()
    if (place.outcome() or {}).get("status") != "finished":
        raise RunError(f"{folder} is not a finished run: finish it first")
    if place.measures() is not None:
        return False
    checkpoint = _last(place, config)
    images = data.load(config.data)
    with place.claimed(dead=ended(folder)):
        _measure(place, config, checkpoint, images, setting or config.measure or Measuring(), torch.device("cpu"))
    return True


def _last(place: RunFolder, config: Config) -> Checkpoint:
    """The weights after the last epoch."""
    checkpoint = place.newest()
    if checkpoint is None:
        raise RunError(f"{place.path} has no weights to measure: copy them here, or run it in another folder")
    if checkpoint.epoch != config.epochs:
        which = f"epoch {checkpoint.epoch} of {config.epochs}"
        raise RunError(f"{place.path} has the weights of {which}, not the last ones: run it in another folder")
    return checkpoint


def _measure(
    place: RunFolder,
    config: Config,
    checkpoint: Checkpoint,
    images: data.Images,
    setting: Measuring,
    device: torch.device,
) -> None:
    dtype = torch.float64 if config.precision == "64-true" else torch.float32
    model = models.build(config.model, images.shape, images.classes).to(dtype=dtype)
    try:
        model.load_state_dict(checkpoint.part("model"))
    except RuntimeError as error:
        raise RunError(f"the weights in {place.path} are not those of its network: {error}") from None
    train, test = (split.to(device, dtype) for split in (images.train, images.test))
    place.save_measures(measures.after(model.to(device), data.Images(train, test, images.classes), setting))
