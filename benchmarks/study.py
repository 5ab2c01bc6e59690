"""A step of each of the paper's methods beside one of vanilla, through the lab's own loop, on the paper's VGG."""

import torch
from lightning_fabric import Fabric

from benchmarks.harness import ROUNDS, Call, compare
from spectreg_lab.data import Images, Split
from spectreg_lab.settings.config import VGG, Adversarial, Config, Data, Decay, Method, Spectral, Vanilla
from spectreg_lab.training.train import Training

NAME = "a study"
PAPERS: dict[str, tuple[Method, float | None]] = {  # and the most a step may take, × one of vanilla
    "vanilla": (Vanilla(), None),
    "weight decay": (Decay(strength=1e-4), 1.01),
    "adversarial": (Adversarial(epsilon=1.0, alpha=0.5), 3.0),
    "spectral": (Spectral(strength=0.01), 1.01),
}
WHY = "What spectral adds is told more exactly by the training step above; a whole step varies by more than that."


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    calls: dict[str, Call] = {}
    for name, (method, _) in PAPERS.items():
        setting = Config(model=VGG(), data=Data(), method=method, batch_size=64, learning_rate=0.01, epochs=1)
        training = Training(setting, Images(Split(x, y), Split(x, y), 10), Fabric(accelerator="cpu", devices=1))
        calls[name] = lambda training=training: training.step(x, y)
    rows = [(name, "vanilla", {"at_most": most, "why": WHY}) for name, (_, most) in PAPERS.items() if most]
    compare(NAME, "the paper's VGG, B=64", calls, rows, rounds=2 * ROUNDS + 1)
