"""One run from its setting to its outcome: train, store, and go on after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from spectreg_lab import data
from spectreg_lab.config import Config
from spectreg_lab.provenance import describe
from spectreg_lab.store import Checkpoint, RunFolder
from spectreg_lab.train import NonFiniteLossError, train

FAILURES = (NonFiniteLossError, data.DataError, ValueError, torch.OutOfMemoryError)


def run(
    config: Config,
    folder: Path,
    fabric: Fabric | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train ``config`` in ``folder`` to its end, going on from the last epoch found there; a finished run stays.

    Args:
        fabric: Where to train; one CPU process by default.
        on_epoch: Called with each epoch's metrics, those already on disk included.

    Returns:
        The outcome: ``{"status": "finished"}``, or ``{"status": "failed", "error": …}``.

    Raises:
        RunError: the folder is another run's, is of another format, or is in use.
    """
    fabric = fabric or Fabric(accelerator="cpu", devices=1, precision=config.precision)
    place = RunFolder(folder)
    if fabric.global_rank > 0:
        return _train(config, place, fabric, on_epoch)
    with place.locked():
        place.begin(config, describe(str(fabric.device), torch.get_num_threads()))
        return _train(config, place, fabric, on_epoch)


def _train(
    config: Config, place: RunFolder, fabric: Fabric, on_epoch: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    outcome = place.outcome()
    if outcome is not None and outcome["status"] == "finished":
        return outcome
    checkpoint = place.resume()
    fabric.barrier()
    for metrics in place.metrics():
        on_epoch(metrics)
    try:
        images = data.load(config.data)
        for epoch in train(config, images, fabric, checkpoint and (checkpoint.epoch, checkpoint.tensors)):
            if fabric.global_rank == 0:
                place.append(epoch.metrics)
                place.save(Checkpoint(epoch.number, epoch.tensors))
                on_epoch(epoch.metrics)
    except FAILURES as error:
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    else:
        outcome = {"status": "finished"}
    if fabric.global_rank == 0:
        place.end(**outcome)
    return outcome
