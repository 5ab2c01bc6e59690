"""What a study would do, without doing it: runs, sizes, memory and time, from a few measured steps on this machine."""

import time
from collections.abc import Callable

import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from spectreg_lab import data
from spectreg_lab.data import Images, Split, steps_per_epoch
from spectreg_lab.settings.config import Config
from spectreg_lab.settings.studies import Point, Selection, Study
from spectreg_lab.training.train import Training

STEPS = 3  # timed; the fastest counts, the first one warms up
BATCH = 16  # images in a timed step; longer batches are taken to cost in proportion
SHAPES = {"cifar10": ((3, 32, 32), 50_000, 10_000, 10), "cifar100": ((3, 32, 32), 50_000, 10_000, 100)}
SHAPES |= {"stl10": ((3, 96, 96), 5_000, 8_000, 10)}


def plan(study: Study, only: Selection, progress: Callable[[str], None]) -> str:
    """A table of what is to be run, one line a setting, regime and method, and the sums.

    Hours are those of training with one process on this CPU, in the study's precision. GiB are those of the weights,
    their gradients and momentum, of a micro-batch on its way and of the images of both splits.

    Images of hub data sets are drawn at random in the shapes these are known to have: nothing is downloaded.
    """
    points = only.of(study)
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.setting, point.regime, point.method), []).append(point)
    rows = []
    for (setting, regime, method), group in groups.items():
        progress(f"timing {setting} {regime} {method}")
        rows.append({"setting": setting, "regime": regime, "method": method, **_estimate(group[0].config, len(group))})
    frame = pd.DataFrame(rows)
    unmeasured = "" if study.measure is None else "; what [measure] asks for comes on top and is not estimated"
    return (
        f"{frame.to_string(index=False)}\n\n{len(points)} runs of {study.name}, "
        f"{frame['hours'].sum():.3g} hours of one process on this CPU{unmeasured}"
    )


def _estimate(config: Config, runs: int) -> dict[str, object]:
    images, sizes = _images(config)
    training = Training(config, images, Fabric(accelerator="cpu", devices=1, precision=config.precision))
    x, y = training.train.images[:BATCH], training.train.labels[:BATCH]
    per_image = min(_seconds(training, x, y) for _ in range(STEPS)) / len(y)
    seen = steps_per_epoch(sizes[0], config.batch_size) * min(config.batch_size, sizes[0])
    evaluated = sum(sizes) / config.evaluate_every
    epoch = per_image * (seen + evaluated / 3)  # a forward pass over everything is about a third of a step
    return {
        "runs": runs,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "steps an epoch": steps_per_epoch(sizes[0], config.batch_size),
        "GiB": round((_memory(training, x, y, config) + sum(sizes) * x[0].nbytes) / 2**30, 2),
        "hours": float(f"{runs * config.epochs * epoch / 3600:.2g}"),
    }


def _seconds(training: Training, x: Tensor, y: Tensor) -> float:
    start = time.perf_counter()
    training.step(x, y)
    return time.perf_counter() - start


def _images(config: Config) -> tuple[Images, tuple[int, int]]:
    """A few images of the right shape, and how many there are of each split."""
    if config.data.name in SHAPES:
        shape, train, test, classes = SHAPES[config.data.name]
        draws = torch.Generator().manual_seed(0)
        split = Split(torch.randn(BATCH, *shape, generator=draws), torch.randint(classes, (BATCH,), generator=draws))
        images = Images(split, split, config.data.classes or classes)
        return images, (config.data.train_size or train, config.data.test_size or test)
    images = data.load(config.data)
    return images, (len(images.train), len(images.test))


def _memory(training: Training, x: Tensor, y: Tensor, config: Config) -> int:
    """Bytes of weights, gradients and momentum, and of what a forward pass keeps for the backward one."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    parameters = {parameter.data_ptr() for parameter in training.model.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor if tensor.data_ptr() in parameters else count(tensor), lambda tensor: tensor
    )
    with hooks, training.fabric.autocast():
        training.method.loss(x, y)
    return 3 * _bytes(training.model) + kept * min(config.micro_batch, config.batch_size) // len(x)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
