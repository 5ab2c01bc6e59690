"""The regularizer as a callback of Lightning's Trainer."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from spectreg.regularizer import SpectralNormRegularizer, log_of


class SpectralNorm(Callback):
    """Attaches a `spectreg.SpectralNormRegularizer` for the time of a fit.

    ``Trainer(callbacks=[SpectralNorm(0.01)])``. What `SpectralNormRegularizer.log` returns is logged at every
    ``log_every_n_steps`` of the trainer; the vectors are saved in the trainer's checkpoints and restored from them.
    Several callbacks with other patterns or settings may act side by side, as on the two networks of a GAN.

    Args:
        strength: λ; with 0 it only logs.
        log: Whether to log.
        settings: Of the regularizer.
    """

    def __init__(self, strength: Any, *, log: bool = True, **settings: Any) -> None:
        self.strength, self.log, self.settings = strength, log, settings
        self.regularizer: SpectralNormRegularizer | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Its name in checkpoints: what it acts on and how, but for λ, which a schedule may have changed."""
        patterns = sorted(self.strength) if isinstance(self.strength, Mapping) else None
        settings = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(self.settings.items())))
        return self._generate_state_key(patterns=patterns, settings=settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build, restore and attach."""
        self.regularizer = SpectralNormRegularizer(pl_module, self.strength, **self.settings)
        if self._restored is not None:
            self.regularizer.load_state_dict(self._restored)
            self._restored = None  # it belongs to this fit
        elif trainer.ckpt_path:
            warnings.warn(
                f"{trainer.ckpt_path} has no vectors of {self.state_key}: they start anew. Give the callback the "
                "patterns and settings that it had when the checkpoint was written.",
                stacklevel=2,
            )
        self.regularizer.attach(*trainer.optimizers)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log how the weights stand when it is the trainer's turn to log."""
        if trainer.global_step % trainer.log_every_n_steps:
            return
        similar = [c for c in trainer.callbacks if isinstance(c, SpectralNorm)]  # type: ignore[attr-defined, unused-ignore]
        logging = [c.regularizer for c in similar if c.log and c.regularizer]
        if logging and logging[0] is self.regularizer:  # for all of them, by one transfer
            pl_module.log_dict({name: torch.tensor(x) for name, x in log_of(*logging).items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach; the regularizer stays to be looked at."""
        if self.regularizer:
            self.regularizer.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach, so that the optimizer is free for another fit."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The vectors, for the trainer's checkpoint."""
        return self.regularizer.state_dict() if self.regularizer else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the vectors of a checkpoint until training starts."""
        self._restored = state_dict or None
