"""What a run costs beyond its steps: evaluations, norms of all weights, copies, lines and checkpoints.

For the networks of studies/cpu.toml and the paper's VGG at 50,000 images, with the numbers of images and
``evaluate_every`` that these studies have, without any method but gradient descent: with one, the steps take longer.
Some batches of random images are timed and counted for an epoch of them. Times are of the processor, so that writing to
disk while training goes on counts too.
"""

import os
import tempfile
from pathlib import Path

import torch
from lightning_fabric import Fabric

from benchmarks.harness import in_turn, record, spread
from spectreg_lab.data import Images, Split
from spectreg_lab.settings.config import Config, Vanilla
from spectreg_lab.settings.studies import read_study
from spectreg_lab.storage.checkpoints import Checkpoint
from spectreg_lab.storage.store import RunFolder
from spectreg_lab.training.evaluation import evaluate, portion, read, spectral_norms
from spectreg_lab.training.train import Training

NAME = "an epoch"
STUDIES = Path(__file__).parents[1] / "studies"
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


def measure(setting: str, config: Config, size: tuple[int, int, int], limit: float, rounds: int = 3) -> None:
    """Rows in per cent of an epoch's steps: an evaluation of both sets, and what every epoch has beside."""
    count, tested, side = size
    some = max(config.batch_size, 256) if size != PAPERS else config.batch_size
    draws = torch.Generator().manual_seed(0)
    split = Split(torch.randn(some, 3, side, side, generator=draws), torch.randint(10, (some,), generator=draws))
    fabric = Fabric(accelerator="cpu", devices=1)
    training = Training(config, Images(split, split, 25), fabric)
    with tempfile.TemporaryDirectory() as folder:
        place = RunFolder(Path(folder))

        def keep() -> None:
            place.append({"epoch": 1, "sigma": read(spectral_norms(training.model))})
            place.save(Checkpoint(1, training.tensors()))

        def evaluation() -> None:
            evaluate(training.model, training.train, portion(config.micro_batch, fabric), fabric)

        calls = {"steps": lambda: training.epoch(1), "evaluation": evaluation, "rest": keep}
        times = in_turn(calls, rounds, 1)
    batches = count // config.batch_size / (some // config.batch_size)
    steps = [batches * seconds for seconds in times["steps"]]
    images = (count + tested) / some
    once = [100 * images * seconds / step for seconds, step in zip(times["evaluation"], steps, strict=True)]
    rest = [100 * seconds / step for seconds, step in zip(times["rest"], steps, strict=True)]
    beyond = [a / config.evaluate_every + b for a, b in zip(once, rest, strict=True)]
    case = f"{setting}, {count} and {tested} images, B={config.batch_size}"
    more = {"note": f"an evaluation every {config.evaluate_every} epochs", "at_most": limit, "why": WHY}
    record(spread(NAME, case, "all beyond the steps", "the steps", "%", beyond, **more))
    record(spread(NAME, case, "one evaluation of both sets", "the steps", "%", once))
    record(spread(NAME, case, "norms, copy and files", "the steps", "%", rest))


def settings(study: str) -> dict[tuple[str, str], Config]:
    """The last run of each setting and regime, without a method."""
    points = read_study(STUDIES / study).points()
    return {(p.setting, p.regime): p.config.model_copy(update={"method": Vanilla()}) for p in points}


def main() -> None:
    os.environ.setdefault("SPECTREG_TEST_DATA", "photographs")  # named by the study, not read
    for (setting, _), config in settings("cpu.toml").items():
        measure(f"{setting} of studies/cpu.toml", config, IMAGES[setting], 10)
    measure("the paper's VGG", settings("paper.toml")["vgg", "small"], PAPERS, 5)
