"""The batches of an epoch, in an order that resumes exactly.

Each random choice of an epoch (order, crops, mirror images) follows from the run's seed and the epoch's number alone:
nothing of it needs to be saved.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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

    A ``size`` above the number of images gives one batch of them all. All random numbers go to the images' device
    before the first batch; after that nothing passes between it and the host.
    """
    device = split.labels.device
    order = torch.randperm(len(split), generator=generator(seed, epoch, "order")).to(device)
    chosen = order[: steps_per_epoch(len(split), size) * size].split(size)
    draws = generator(seed, epoch, "augmentation")
    moves = Moves.draw([len(part) for part in chosen], augmentation, draws).to(device) if augmentation else None
    for number, part in enumerate(chosen):
        images = split.images[part]
        if augmentation and moves:
            images = augmented(images, augmentation, moves.part(number * size, len(part)))
        yield images, split.labels[part]


def steps_per_epoch(n: int, size: int) -> int:
    """How many batches `batches` makes of ``n`` images."""
    return max(n // size, 1)


@dataclass(frozen=True)
class Moves:
    """How each image is cropped and mirrored; None for what the setting does not ask for."""

    top: Int[Tensor, " n"] | None
    left: Int[Tensor, " n"] | None
    mirrored: Bool[Tensor, " n"] | None

    @classmethod
    def draw(cls, sizes: list[int], setting: Augmentation, draws: torch.Generator) -> "Moves":
        """Those of the images of batches of these ``sizes``, drawn a batch at a time."""
        top, left, mirrored = [], [], []
        for b in sizes:
            if setting.pad:
                top.append(torch.randint(2 * setting.pad + 1, (b,), generator=draws))
                left.append(torch.randint(2 * setting.pad + 1, (b,), generator=draws))
            if setting.flip:
                mirrored.append(torch.rand(b, generator=draws) < 0.5)
        return cls(*(torch.cat(parts) if parts else None for parts in (top, left, mirrored)))

    def to(self, device: torch.device) -> "Moves":
        """On ``device``."""
        return self._each(lambda drawn: drawn.to(device))

    def part(self, start: int, length: int) -> "Moves":
        """Those of ``length`` images from the one numbered ``start`` on."""
        return self._each(lambda drawn: drawn[start : start + length])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Moves":
        return Moves(*(None if x is None else change(x) for x in (self.top, self.left, self.mirrored)))


def augmented(images: Float[Tensor, "b c h w"], setting: Augmentation, moves: Moves) -> Float[Tensor, "b c h w"]:
    """A crop of each zero-padded image, back at its own size, and the mirror image of some; channels last stay so."""
    b, _, h, w = images.shape
    device = images.device
    if moves.top is not None and moves.left is not None:
        padded = torch.nn.functional.pad(images, [setting.pad] * 4).permute(0, 2, 3, 1)
        rows = (moves.top[:, None] + torch.arange(h, device=device))[:, :, None]
        columns = (moves.left[:, None] + torch.arange(w, device=device))[:, None, :]
        images = padded[torch.arange(b, device=device)[:, None, None], rows, columns].permute(0, 3, 1, 2)
    if moves.mirrored is not None:
        images = torch.where(moves.mirrored[:, None, None, None], images.flip(3), images)
    return images
