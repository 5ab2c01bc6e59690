"""The batches of an epoch, in an order that resumes exactly.

Each random choice of an epoch (order, crops, mirror images) follows from the run's seed and the epoch's number alone:
nothing of it needs to be saved.
"""

import hashlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectreg_lab.data.images import Split
from spectreg_lab.settings.config import Augmentation


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator that depends on the run's seed, the epoch and what it is for, and on nothing that happened before."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batches(
    split: Split, size: int, seed: int, epoch: int, augmentation: Augmentation | None = None
) -> Iterator[tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]]:
    """The batches of one epoch: a new order each epoch, the remainder dropped (other images each time).

    A ``size`` above the number of images gives one batch of them all.
    """
    order = torch.randperm(len(split), generator=generator(seed, epoch, "order")).to(split.labels.device)
    draws = generator(seed, epoch, "augmentation")
    for start in range(0, max(len(split) - size, 0) + 1, size):
        chosen = order[start : start + size]
        images = split.images[chosen]
        yield augmented(images, augmentation, draws) if augmentation else images, split.labels[chosen]


def steps_per_epoch(n: int, size: int) -> int:
    """How many batches `batches` makes of ``n`` images."""
    return max(n // size, 1)


def augmented(
    images: Float[Tensor, "b c h w"], setting: Augmentation, draws: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """A random crop of each zero-padded image, back at its own size, and a random mirror image."""
    b, _, h, w = images.shape
    device = images.device
    if setting.pad:
        padded = torch.nn.functional.pad(images, [setting.pad] * 4)
        top, left = (torch.randint(2 * setting.pad + 1, (b, 1), generator=draws).to(device) for _ in range(2))
        rows = (top + torch.arange(h, device=device))[:, None, :, None]
        columns = (left + torch.arange(w, device=device))[:, None, None, :]
        images = padded[torch.arange(b, device=device)[:, None, None, None], _channels(images), rows, columns]
    if setting.flip:
        mirrored = torch.rand(b, generator=draws).to(device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def _channels(images: Float[Tensor, "b c h w"]) -> Int[Tensor, "1 c 1 1"]:
    return torch.arange(images.shape[1], device=images.device)[None, :, None, None]
