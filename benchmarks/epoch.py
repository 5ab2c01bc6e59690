"""What a run costs beyond its steps: evaluations, norms of all weights, copies, lines and checkpoints.

For the networks of studies/cpu.toml and the paper's VGG at 50,000 images, with the numbers of images and
``evaluate_every`` that these studies have, without any method but gradient descent: with one, the steps take longer.
Some batches of random images are timed and counted for an epoch of them. Times are of the processor, so that writing to
disk while training goes on counts too.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric

from benchmarks.harness import Call, in_turn, record, spread
from spectreg_lab.data import Images, Split
from spectreg_lab.settings.config import Config, Vanilla
from spectreg_lab.settings.studies import Study, read_study
from spectreg_lab.storage.checkpoints import Checkpoint
from spectreg_lab.storage.store import RunFolder
from spectreg_lab.training.evaluation import evaluate, portion, read, spectral_norms
from spectreg_lab.training.train import Training

NAME = "an epoch"
SECONDS = 60
STUDIES = Path(__file__).parents[1] / "studies"
ROUNDS = 3
IMAGES = {  # training and test images, side in pixels
    "vgg": (12_500, 10_000, 16),
    "nin": (7_500, 1_250, 16),
    "densenet40": (7_500, 1_250, 16),
    "densenet22": (3_500, 2_000, 32),
}
PAPERS = (50_000, 10_000, 32)
WHY = (
    "an evaluation is a forward pass of every training and test image, a third of the arithmetic that a step does for "
    "an image, at the speed of the convolutions in the steps: nothing but a larger `evaluate_every` makes it less"
)


def timed(config: Config, size: tuple[int, int, int], fabric: Fabric, folder: Path) -> dict[str, list[float]]:
    """Seconds of an epoch's steps, of an evaluation of both sets, and of what every epoch has beside, in each round."""
    count, tested, side = size
    some = max(config.batch_size, 256) if size != PAPERS else config.batch_size
    draws = torch.Generator().manual_seed(0)
    split = Split(torch.randn(some, 3, side, side, generator=draws), torch.randint(10, (some,), generator=draws))
    training, place = Training(config, Images(split, split, 25), fabric), RunFolder(folder)

    def keep() -> None:
        place.append({"epoch": 1, "sigma": read(spectral_norms(training.model))})
        place.save(Checkpoint(1, training.tensors()))

    folder.mkdir()
    calls: dict[str, Call] = {
        "steps": lambda: training.epoch(1),
        "evaluation": lambda: evaluate(training.model, training.train, portion(config.micro_batch, fabric), fabric),
        "norms, copy and files": keep,
    }
    times = in_turn(calls, ROUNDS, 1)
    steps = count // config.batch_size * config.batch_size
    whole = {"steps": steps / (some // config.batch_size * config.batch_size), "evaluation": (count + tested) / some}
    return {name: [whole.get(name, 1) * seconds for seconds in taken] for name, taken in times.items()}


def compare(case: str, config: Config, times: dict[str, list[float]], most: float, goal: str) -> None:
    tell = partial(spread, NAME, case, against="the steps", unit="%")
    rounds = [dict(zip(times, taken, strict=True)) for taken in zip(*times.values(), strict=True)]
    evaluations, rest = ([100 * one[name] / one["steps"] for one in rounds] for name in list(times)[1:])
    beyond = [evaluation / config.evaluate_every + other for evaluation, other in zip(evaluations, rest, strict=True)]
    note = f"an evaluation every {config.evaluate_every} epochs"
    record(tell("all beyond the steps", values=beyond, note=note, at_most=most, goal=f"an epoch: {goal}", why=WHY))
    record(tell("one evaluation of both sets", values=evaluations))
    record(tell("norms, copy and files", values=rest))


def settings(study: Study) -> dict[tuple[str, str], Config]:
    """The first run of each setting and regime, without a method."""
    first: dict[tuple[str, str], Config] = {}
    for point in study.points():
        first.setdefault((point.setting, point.regime), point.config.model_copy(update={"method": Vanilla()}))
    return first


def main() -> None:
    os.environ.setdefault("SPECTREG_TEST_DATA", "photographs")  # named by the study, not read
    fabric = Fabric(accelerator="cpu", devices=1)
    with tempfile.TemporaryDirectory() as folder:
        for (setting, regime), config in settings(read_study(STUDIES / "cpu.toml")).items():
            size = IMAGES[setting]
            case = f"{setting} of studies/cpu.toml, {size[0]} and {size[1]} images, B={config.batch_size}"
            times = timed(config, size, fabric, Path(folder) / f"{setting}-{regime}")
            compare(case, config, times, 10, "all beyond the steps at most 10 % of them for the networks of cpu.toml")
        config = settings(read_study(STUDIES / "paper.toml"))["vgg", "small"]
        case = f"the paper's VGG, {PAPERS[0]} and {PAPERS[1]} images, B={config.batch_size}"
        times = timed(config, PAPERS, fabric, Path(folder) / "paper")
        compare(case, config, times, 5, "all beyond the steps at most 5 % of them for the paper's VGG")
