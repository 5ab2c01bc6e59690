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
from itertools import count

import pytorch_lightning as lightning
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import ROUNDS, Call, Times, in_turn, ratio, record, same
from spectreg_lab import models
from spectreg_lab.data import Images, batches, load
from spectreg_lab.settings.config import VGG, Augmentation, Config, Data, DenseNet, Vanilla
from spectreg_lab.training.train import Training

NAME = "the loop"
NETWORKS = {"VGG": VGG(width=16, stages=(1, 1, 2), hidden=64), "DenseNet": DenseNet(depth=10, growth=8)}
LAB, HAND, TRAINER = "spectreg's loop", "by hand", "Lightning Trainer"
EPOCHS, WARMUP = 2 * ROUNDS, 2


def network(training: Training) -> tuple[nn.Module, torch.optim.Optimizer]:
    config, images = training.config, training.train.images
    model = models.build(config.model, tuple(images.shape[1:]), 10, config.seed).to(memory_format=torch.channels_last)
    settings = {"lr": config.learning_rate, "momentum": config.momentum, "nesterov": True, "fused": True}
    return model, torch.optim.SGD(model.parameters(), **settings)


def epochs(training: Training) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """The batches of each epoch."""
    config = training.config
    for number in count(1):
        yield batches(training.train, config.batch_size, config.seed, number, config.data.augmentation)


def by_hand(training: Training, model: nn.Module, optimizer: torch.optim.Optimizer) -> Call:
    each = epochs(training)

    def epoch() -> None:
        model.train()
        total = torch.zeros(())
        for x, y in next(each):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()

    return epoch


def by_trainer(training: Training, calls: dict[str, Call]) -> Times:
    """Seconds of the Trainer's epochs, and of one of each of ``calls`` after every one of them."""
    each, times = epochs(training), {name: [] for name in (TRAINER, *calls)}
    model, optimizer = network(training)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    class Epoch(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return next(each)

    class Clock(lightning.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.start = time.process_time()

        def on_train_epoch_end(self, *_: object) -> None:
            times[TRAINER].append(time.process_time() - self.start)
            for name, taken in in_turn(calls, 1, 0).items():
                times[name] += taken

    loader = torch.utils.data.DataLoader(Epoch(), batch_size=None)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=EPOCHS + WARMUP, callbacks=[Clock()], **off)
    trainer.fit(Module(), loader)
    return {name: taken[WARMUP:] for name, taken in times.items()}


def compare(case: str, config: Config, images: Images) -> None:
    training = Training(config, images, Fabric(accelerator="cpu", devices=1))
    model, optimizer = network(training)
    numbers, hand = count(1), by_hand(training, model, optimizer)

    def lab() -> None:
        training.epoch(next(numbers))

    lab()
    hand()
    flat = [torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (training.model, model)]
    error = same("the weights after an epoch", *flat, 1e-3)
    times = by_trainer(training, {LAB: lab, HAND: hand})
    images_an_epoch = len(training.train) // config.batch_size * config.batch_size
    for other, limit in ((HAND, 1.05), (TRAINER, 1.0)):
        rates = [images_an_epoch / statistics.median(times[name]) for name in (LAB, other)]
        note = f"{rates[0]:.0f} images a second for {rates[1]:.0f}"
        record(ratio(NAME, case, LAB, other, times, at_most=limit, note=note, error=error))


def main() -> None:
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = Data(augmentation=Augmentation(pad=1, flip=True))
    images = load(data)
    for name, model in NETWORKS.items():
        for size in (16, 128):
            method = {"method": Vanilla(), "learning_rate": 0.01, "epochs": 1000}
            config = Config(model=model, data=data, batch_size=size, **method)
            compare(f"{name}, B={size}, augmented", config, images)
