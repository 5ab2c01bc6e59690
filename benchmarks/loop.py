"""The lab's loop beside a hand-written PyTorch loop and the Lightning Trainer: same network, batches and images."""

import logging
import statistics
import time
import warnings
from collections.abc import Iterator

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import ROUNDS, Call, Row, failed, in_turn, ratio, record
from spectreg_lab import models
from spectreg_lab.config import VGG, Augmentation, Config, Data, DenseNet, Vanilla
from spectreg_lab.data import batches, load
from spectreg_lab.train import Training

NAME = "the loop"
NETWORKS = {"VGG": VGG(width=16, stages=(1, 1, 2), hidden=64), "DenseNet": DenseNet(depth=10, growth=8)}


def network(training: Training) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and optimizer that anyone would write who has read torch's tuning guide."""
    config, images = training.config, training.train.images
    model = models.build(config.model, tuple(images.shape[1:]), 10, config.seed).to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, nesterov=True, fused=True
    )


def epoch_of(training: Training, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    config = training.config
    return batches(training.train, config.batch_size, config.seed, number, config.data.augmentation)


def by_hand(training: Training) -> Call:
    model, optimizer = network(training)
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


def by_trainer(training: Training) -> Call:
    """Lightning's Trainer without logger, checkpoints, progress bar and summary; one epoch a call, set up each time."""
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

    done, module = [0], Module()
    loader = torch.utils.data.DataLoader(Epoch(), batch_size=None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    class Clock(lightning.Callback):
        """Runs the Trainer an epoch at a time: the time of setting it up is none of an epoch's."""

        def on_train_epoch_start(self, *_: object) -> None:
            self.start = time.process_time()

        def on_train_epoch_end(self, *_: object) -> None:
            taken.append(time.process_time() - self.start)

    taken: list[float] = []
    trainer = lightning.Trainer(max_epochs=ROUNDS + 2, accelerator="cpu", devices=1, callbacks=[Clock()], **quiet)
    trainer.fit(module, loader)
    return lambda: taken


def first_step(make: Call) -> float:
    start = time.perf_counter()
    make()
    return time.perf_counter() - start


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


def compare(case: str, config: Config, images: object, fabric: Fabric) -> None:
    training = Training(config, images, fabric)  # type: ignore[arg-type]
    times = in_turn({"spectreg's loop": by_lab(training), "by hand": by_hand(training)}, ROUNDS, 2)
    count = len(training.train) // config.batch_size * config.batch_size
    rate = count / statistics.median(times["spectreg's loop"])
    note = f"{rate:.0f} images a second"
    record(ratio(NAME, case, "spectreg's loop", "by hand", times, at_most=1.05, note=note))
    try:
        times["Lightning Trainer"] = by_trainer(training)()[-ROUNDS:]  # type: ignore[index]
        rate = count / statistics.median(times["Lightning Trainer"])
        note = f"the Trainer {rate:.0f} images a second; one after the other"
        record(ratio(NAME, case, "spectreg's loop", "Lightning Trainer", times, at_most=1.0, note=note))
    except Exception as error:
        record(failed(NAME, case, "Lightning Trainer", "by hand", error))
    x, y = next(iter(epoch_of(training, 1)))
    begin = [first_step(lambda: Training(config, images, fabric).step(x, y)) for _ in range(5)]  # type: ignore[arg-type]
    record(Row(NAME, case, "spectreg's loop", "", "s to the first step", statistics.median(begin), rounds=5))
