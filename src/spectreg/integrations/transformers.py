"""The regularizer as a callback of the Trainer of Hugging Face transformers."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from spectreg.regularizer import SpectralNormRegularizer

FILE = "spectral_norm.pt"


class SpectralNorm(TrainerCallback):
    """Attaches a `spectreg.SpectralNormRegularizer` for the time of a training.

    ``Trainer(..., callbacks=[SpectralNorm(0.01)])``. What `SpectralNormRegularizer.log` returns joins the trainer's
    logs; the vectors are saved as ``spectral_norm.pt`` in the trainer's checkpoints and restored from them.

    Args:
        strength: λ; with 0 it only logs.
        log: Whether to log.
        checkpoint: The folder to restore from, where it is not ``output_dir/checkpoint-<step>``.
        settings: Of the regularizer.
    """

    def __init__(self, strength: Any, *, log: bool = True, checkpoint: str | None = None, **settings: Any) -> None:
        self.strength, self.log, self.checkpoint, self.settings = strength, log, checkpoint, settings
        self.regularizer: SpectralNormRegularizer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Build, restore and attach; one of a training that was broken off lets go of its optimizer first."""
        if self.regularizer:
            self.regularizer.detach()
        self.regularizer = SpectralNormRegularizer(given["model"], self.strength, **self.settings)
        if state.global_step > 0:
            self._restore(self.regularizer, Path(self.checkpoint or _folder(args, state)) / FILE)
        self.regularizer.attach(given["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add how the weights stand to the training logs."""
        if self.log and self.regularizer and logs is not None and "loss" in logs:
            numbers = self.regularizer.log()
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the vectors into the checkpoint just saved."""
        if self.regularizer and state.is_world_process_zero:
            folder = _folder(args, state)
            if not folder.is_dir():
                warnings.warn(f"{folder} does not exist: the vectors are not saved.", stacklevel=2)
                return
            target = folder / FILE
            part = target.with_suffix(".part")
            torch.save(self.regularizer.state_dict(), part)
            os.replace(part, target)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach; the regularizer stays to be looked at."""
        if self.regularizer:
            self.regularizer.detach()

    @staticmethod
    def _restore(regularizer: SpectralNormRegularizer, file: Path) -> None:
        if file.exists():
            regularizer.load_state_dict(torch.load(file, weights_only=True))
        else:
            warnings.warn(
                f"{file} does not exist: the vectors start anew. Give SpectralNorm(checkpoint=…) the folder to resume "
                "from if it is another.",
                stacklevel=2,
            )


def _folder(args: Any, state: Any) -> Path:
    """The checkpoint of this step; in a hyperparameter search the newest, in the folder of a trial."""
    name = f"checkpoint-{state.global_step}"
    trials = Path(args.output_dir).glob(f"*/{name}") if state.is_hyper_param_search else ()
    return max(trials, key=lambda folder: folder.stat().st_mtime, default=Path(args.output_dir) / name)
