"""The lab's training loop beside a hand-written PyTorch loop: same network, batches and data, epochs in turn.

python benchmarks/loop.py            prints the ratio of the medians, with quartiles of the paired ratios
"""

import argparse
import statistics
import time

import torch
from lightning_fabric import Fabric
from torch.nn.functional import cross_entropy

from spectreg_lab import models
from spectreg_lab.config import VGG, Config, DenseNet, Vanilla
from spectreg_lab.data import batches, load
from spectreg_lab.train import Training

NETWORKS = {"vgg": VGG(width=16, stages=(1, 1, 2), hidden=64), "densenet": DenseNet(depth=10, growth=8)}


def by_hand(config: Config, training: Training) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The network and optimizer that anyone would write."""
    images = training.train.images
    model = models.build(config.model, tuple(images.shape[1:]), 10, config.seed)
    return model, torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9, nesterov=True)


def epoch_by_hand(model: torch.nn.Module, optimizer: torch.optim.Optimizer, training: Training, number: int) -> None:
    """One epoch of the loop that anyone would write, with the loss summed up as anyone would."""
    config = training.config
    model.train()
    total = torch.zeros(())
    for x, y in batches(training.train, config.batch_size, config.seed, number):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.detach()


def main() -> None:
    """Time epochs A B A B and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fabric, images = Fabric(accelerator="cpu", devices=1), load(Config.model_fields["data"].default)
    for name, network in NETWORKS.items():
        for size in (16, 128):
            config = Config(model=network, method=Vanilla(), batch_size=size, learning_rate=0.01, epochs=1000)
            training = Training(config, images, fabric)
            model, optimizer = by_hand(config, training)
            ours, theirs = [], []
            for number in range(1, arguments.rounds + 3):
                start = time.perf_counter()
                epoch_by_hand(model, optimizer, training, number)
                middle = time.perf_counter()
                training.epoch(number)
                theirs.append(middle - start)
                ours.append(time.perf_counter() - middle)
            ratios = [a / b for a, b in zip(ours[2:], theirs[2:], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            print(f"{name} B={size}: ours / by hand = {median:.3f} ({low:.3f} to {high:.3f}), n = {len(ratios)}")


if __name__ == "__main__":
    main()
