"""The lab's loop beside a loop written by hand and the Lightning Trainer: same network, batches and augmented images.

The loop by hand is what anyone would write who has read torch's tuning guide: channels last, a fused optimizer, no
value read back. The Trainer runs without logger, checkpoints, progress bar and summary. The three take turns an epoch
at a time; shuffling, cropping and mirroring are part of it, evaluation is not.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import ROUNDS, Call, failed, in_turn, ratio, record, same, spread
from spectreg_lab import models
from spectreg_lab.data import Images, batches, load
from spectreg_lab.settings.config import VGG, Augmentation, Config, Data, DenseNet, Vanilla
from spectreg_lab.training.train import Training

NAME = "the loop"
SECONDS = 100
NETWORKS = {"VGG": VGG(width=16, stages=(1, 1, 2), hidden=64), "DenseNet": DenseNet(depth=10, growth=8)}
LAB, HAND, TRAINER = "spectreg's loop", "by hand", "Lightning Trainer"
EPOCHS, WARMUP = 2 * ROUNDS, 2


def network(training: Training) -> tuple[nn.Module, torch.optim.Optimizer]:
    config, images = training.config, training.train.images
    model = models.build(config.model, tuple(images.shape[1:]), 10, config.seed).to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, nesterov=True, fused=True
    )


def epoch_of(training: Training, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    config = training.config
    return batches(training.train, config.batch_size, config.seed, number, config.data.augmentation)


def by_hand(training: Training, made: tuple[nn.Module, torch.optim.Optimizer] | None = None) -> Call:
    model, optimizer = made or network(training)
    done = [0]

    def epoch() -> None:
        done[0] += 1
        model.train()
        total = torch.zeros(())
        for x, y in epoch_of(training, done[0]):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()

    return epoch


def by_lab(training: Training) -> Call:
    done = [0]

    def epoch() -> None:
        done[0] += 1
        training.epoch(done[0])

    return epoch


def trainer(training: Training, callback: Any, **settings: Any) -> Call:
    """What fits the same network with the Lightning Trainer."""
    import pytorch_lightning as lightning

    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    network_, optimizer = network(training)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network_

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    class Epoch(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            done[0] += 1
            return epoch_of(training, done[0])

    done = [0]
    loader = torch.utils.data.DataLoader(Epoch(), batch_size=None)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    made = lightning.Trainer(accelerator="cpu", devices=1, callbacks=[callback], **off, **settings)
    return lambda: made.fit(Module(), loader)


def with_the_trainer(training: Training, calls: dict[str, Call]) -> dict[str, list[float]]:
    """Seconds of the Trainer's epochs, and of one of each of ``calls`` after every one of them."""
    import pytorch_lightning as lightning

    times: dict[str, list[float]] = {TRAINER: [], **{name: [] for name in calls}}

    class Clock(lightning.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.start = time.process_time()

        def on_train_epoch_end(self, *_: object) -> None:
            times[TRAINER].append(time.process_time() - self.start)
            for name, taken in in_turn(calls, 1, 0).items():
                times[name] += taken

    trainer(training, Clock(), max_epochs=EPOCHS + WARMUP)()
    return {name: taken[WARMUP:] for name, taken in times.items()}


def first_steps(config: Config, images: Images, fabric: Fabric) -> dict[str, Call]:
    """From nothing but the images to the end of the first step."""
    training = Training(config, images, fabric)

    def lab() -> None:
        training = Training(config, images, fabric)
        training.step(*next(epoch_of(training, 1)))

    def hand() -> None:
        model, optimizer = network(training)
        x, y = next(epoch_of(training, 1))
        cross_entropy(model(x), y).backward()
        optimizer.step()

    def lightning() -> None:
        from pytorch_lightning import Callback

        trainer(training, Callback(), max_steps=1)()

    return {LAB: lab, HAND: hand, TRAINER: lightning}


def check(config: Config, images: Images, fabric: Fabric) -> float:
    """How far apart an epoch of the lab's loop and one by hand leave the weights; an error if that is far."""
    training = Training(config, images, fabric)
    training.epoch(1)
    made = network(training)
    by_hand(training, made)()
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (training.model, made[0])]
    return same("the weights after an epoch", *flat, 1e-3)


def compare(case: str, config: Config, images: Images, fabric: Fabric) -> None:
    error = check(config, images, fabric)
    training = Training(config, images, fabric)
    calls, starts = {LAB: by_lab(training), HAND: by_hand(training)}, first_steps(config, images, fabric)
    try:
        times = with_the_trainer(training, calls)
    except Exception as said:
        record(failed(NAME, case, LAB, TRAINER, said))
        times = in_turn(calls, EPOCHS, WARMUP)
        del starts[TRAINER]
    count = len(training.train) // config.batch_size * config.batch_size
    for other, limit, goal in (
        (HAND, 1.05, "at most 1.05 × a loop by hand"),
        (TRAINER, 1.0, "faster than the Trainer"),
    ):
        if other in times:
            rates = [count / statistics.median(times[name]) for name in (LAB, other)]
            note = f"{rates[0]:.0f} images a second for {rates[1]:.0f}"
            record(
                ratio(NAME, case, LAB, other, times, at_most=limit, goal=f"the loop: {goal}", note=note, error=error)
            )
    for name, taken in in_turn(starts, ROUNDS, 1, clock=time.perf_counter).items():
        record(spread(NAME, case, name, "the first step", "ms", [1e3 * t for t in taken]))


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    data = Data(augmentation=Augmentation(pad=1, flip=True))
    images = load(data)
    for name, setting in NETWORKS.items():
        for size in (16, 128):
            config = Config(
                model=setting, method=Vanilla(), data=data, batch_size=size, learning_rate=0.01, epochs=1000
            )
            compare(f"{name}, B={size}, augmented", config, images, fabric)
