"""Images as normalised tensors, and their batches."""

from spectreg_lab.data.batches import batches, generator, steps_per_epoch
from spectreg_lab.data.images import Images, Split, load
from spectreg_lab.data.sources import DataError

__all__ = ["DataError", "Images", "Split", "batches", "generator", "load", "steps_per_epoch"]
