"""What a study would do, without doing it: runs, steps, sizes and arithmetic, counted on networks without memory."""

from collections.abc import Callable
from functools import cache

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spectreg_lab import data, models
from spectreg_lab.data import sizes, steps_per_epoch
from spectreg_lab.settings.config import Config, Model
from spectreg_lab.settings.studies import Point, Selection, Study, StudyError

SHAPES = {"cifar10": ((3, 32, 32), 50_000, 10_000, 10), "cifar100": ((3, 32, 32), 50_000, 10_000, 100)}
SHAPES |= {"stl10": ((3, 96, 96), 5_000, 8_000, 10)}
ABOUT = (
    "GiB: weights, gradients, momentum, a micro-batch on its way and the images. PFLOP: forward and backward passes of "
    "the training alone, without what the method adds; adversarial training takes two and a half times that."
)


def plan(study: Study, only: Selection, progress: Callable[[str], None]) -> str:
    """A table of what is to be run, one line a setting, regime and method, and the sums. Nothing is timed or trained.

    The images of hub data sets have the shapes these are known to have: nothing is downloaded.

    Raises:
        StudyError: a setting's data cannot be had, or its network does not fit them or the memory.
    """
    points = only.of(study)
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.setting, point.regime, point.method), []).append(point)
    rows = []
    for (setting, regime, method), group in groups.items():
        try:
            counted = _count(group[0].config, len(group), progress)
        except (data.DataError, ValueError) as error:
            raise StudyError(f"settings.{setting}: {error}") from None
        rows.append({"setting": setting, "regime": regime, "method": method, **counted})
    frame = pd.DataFrame(rows)
    unmeasured = "" if study.measure is None else " What [measure] asks for comes on top."
    total = f"{len(points)} runs of {study.name}, {frame['PFLOP'].sum():.3g} PFLOP"
    return f"{frame.to_string(index=False)}\n\n{total}\n\n{ABOUT}{unmeasured}"


def _count(config: Config, runs: int, progress: Callable[[str], None]) -> dict[str, object]:
    shape, train, test, classes = _images(config, progress)
    parameters, kept, flops = _of_an_image(config.model, shape, classes)
    bytes_each = 8 if config.precision == "64-true" else 4
    steps = steps_per_epoch(train, config.batch_size)
    seen = steps * min(config.batch_size, train) * config.epochs
    of_a_batch = kept * min(config.micro_batch, config.batch_size, train)
    images = (train + test) * shape[0] * shape[1] * shape[2]
    return {
        "runs": runs,
        "parameters": parameters,
        "steps an epoch": steps,
        "GiB": round((3 * parameters + of_a_batch + images) * bytes_each / 2**30, 2),
        "PFLOP": float(f"{runs * seen * flops / 1e15:.2g}"),
    }


@cache
def _of_an_image(setting: Model, shape: tuple[int, int, int], classes: int) -> tuple[int, float, float]:
    """Parameters of a network; numbers kept between its two passes and operations of both, for an image."""
    network = models.outline(setting, shape, classes)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.empty(2, *shape, device="meta")  # batch normalization needs two
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        network(x).sum().backward()
    return sum(parameter.numel() for parameter in network.parameters()), sum(kept) / 2, counter.get_total_flops() / 2


def _images(config: Config, progress: Callable[[str], None]) -> tuple[tuple[int, int, int], int, int, int]:
    """Shape, numbers of training and test images, and classes."""
    setting = config.data
    if setting.name not in SHAPES:
        images = data.load(setting, progress)
        return images.shape, len(images.train), len(images.test), images.classes
    (channels, height, width), train, test, there = SHAPES[setting.name]
    classes = sizes.classes_of(setting, there)  # of as many images each
    train, test = (
        sizes.size_of(split, asked, images * classes // there)
        for split, asked, images in (("train", setting.train_size, train), ("test", setting.test_size, test))
    )
    held = sizes.held_out(setting, train)
    return (channels, *sizes.shrunk(setting, height, width)), train - held, held or test, classes
