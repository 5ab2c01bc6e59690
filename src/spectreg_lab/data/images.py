"""From a data setting to normalised tensors, decoded once and cached.

The cache lies under ``SPECTREG_CACHE``, else in the user's cache folder; a changed file makes a new entry.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import avg_pool2d

from spectreg_lab.data.sizes import classes_of, held_out, shrunk, size_of
from spectreg_lab.data.sources import decode, locate
from spectreg_lab.settings.config import Data
from spectreg_lab.storage.files import write

DECODED = "gcn3"  # changes with what is made of a file's content
FLOOR = 1e-6  # under the standard deviation: an image of one colour becomes zero, not infinite


@dataclass(frozen=True)
class Split:
    """Normalised images (n, channels, height, width) and their labels (n,)."""

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Split":
        """On ``device``, the images as ``dtype``; with channels last where convolutions want it, on accelerators."""
        layout = torch.preserve_format if device.type == "cpu" else torch.channels_last
        return Split(self.images.to(device, dtype, memory_format=layout), self.labels.to(device))


@dataclass(frozen=True)
class Images:
    """A training and a test split of the same shape and number of classes."""

    train: Split
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


def global_contrast_normalization(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Each image minus its mean, divided by its own standard deviation (over all its pixels and channels).

    >>> x = global_contrast_normalization(torch.arange(12.0).view(1, 3, 2, 2))
    >>> abs(x.mean()) < 1e-6, abs(x.std(correction=0) - 1) < 1e-6
    (tensor(True), tensor(True))
    """
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    return (images - mean) / deviation.clamp_min(FLOOR)


def load(setting: Data, progress: Callable[[str], None] = lambda text: None) -> Images:
    """The images of ``setting``, from the cache where it has them.

    Args:
        progress: Called with a line of text now and then while images are being decoded.

    Raises:
        DataError: no such data, an unreadable file, images of differing sizes, labels out of range, or fewer images
            than asked for.
    """
    source, files = locate(setting.name)
    cached = _cache(source, files)
    with FileLock(cached.with_suffix(".lock")):
        if not _readable(cached):
            progress(f"reading {setting.name}")
            write(cached, save(_normalised(source, files, progress), {"source": source}))
    with safe_open(cached, framework="pt") as file:
        classes = classes_of(setting, int(file.get_tensor("classes")))
        train = _take(file, "train", setting.train_size, classes, setting)
        test = _take(file, "test", setting.test_size, classes, setting)
    if count := held_out(setting, len(train)):
        held = _held_out(train.labels, count)
        test = Split(train.images[held], train.labels[held])
        train = Split(train.images[~held], train.labels[~held])
    return Images(train, test, classes)


def _held_out(labels: Int[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """``count`` images to hold out: of each class its share, the same ones every time, in whatever order they come.

    A class of two images or more has at least one on either side, if ``count`` is enough for that.
    """
    place = torch.zeros(len(labels), dtype=torch.float64)  # of each image in its class, from 0 to 1
    draws = torch.Generator().manual_seed(0)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=draws)
        place[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        place[members[order[-1]]] += 1
        if len(members) > 1:
            place[members[order[0]]] -= 1
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[place.argsort(stable=True)[:count]] = True
    return held


def _take(file: Any, split: str, size: int | None, classes: int, setting: Data) -> Split:
    """The first ``size`` images of these classes in an order shuffled once and for all: the same ones in every run."""
    chosen = _chosen(file, split, size, classes)
    if setting.shrink is None:
        return chosen
    shrunk(setting, *chosen.images.shape[2:])
    return Split(global_contrast_normalization(avg_pool2d(chosen.images, setting.shrink)), chosen.labels)


def _chosen(file: Any, split: str, size: int | None, classes: int) -> Split:
    images, labels = file.get_tensor(f"{split}/images"), file.get_tensor(f"{split}/labels")
    if not (kept := labels < classes).all():
        images, labels = images[kept], labels[kept]
    size = size_of(split, size, len(labels))
    if size == len(labels):
        return Split(images, labels)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:size]
    return Split(images[chosen], labels[chosen])


def _cache(source: str, files: list[Path]) -> Path:
    folder = Path(os.environ.get("SPECTREG_CACHE") or Path.home() / ".cache" / "spectreg")
    folder.mkdir(parents=True, exist_ok=True)
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([source, stamps, DECODED, FLOOR]).encode()).hexdigest()[:16]
    return folder / f"{key}.safetensors"


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "classes" in file.keys()  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return False


def _normalised(source: str, files: list[Path], progress: Callable[[str], None]) -> dict[str, Tensor]:
    splits, classes = decode(source, files, progress)
    tensors = {"classes": torch.tensor(classes)}
    for name, (pixels, labels) in splits.items():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        tensors[f"{name}/images"] = global_contrast_normalization(images).contiguous()
        tensors[f"{name}/labels"] = torch.from_numpy(labels).long()
    return tensors
