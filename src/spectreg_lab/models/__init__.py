"""The paper's networks, built from a setting: ``build(setting, image_shape, classes, seed)``."""

import psutil
import torch
from torch import nn

from spectreg_lab.models.densenet import densenet
from spectreg_lab.models.nin import nin
from spectreg_lab.models.vgg import vgg
from spectreg_lab.settings.config import NIN, VGG, Model


def build(setting: Model, image_shape: tuple[int, int, int], classes: int, seed: int = 0) -> nn.Sequential:
    """The network of ``setting`` for images of ``image_shape`` (channels, height, width), freshly initialized.

    Weights are He normal (fan in, ReLU gain), biases zero, drawn from a generator of their own: the same ``seed`` gives
    the same network and the global generator is left alone.

    >>> from spectreg_lab.settings.config import DenseNet
    >>> network = build(DenseNet(depth=40, growth=12), (3, 32, 32), classes=10)
    >>> sum(p.numel() for p in network.parameters())
    1019722

    Raises:
        ValueError: the image is too small for the network's poolings, or the memory for the network; the message says
            what fits.
    """
    outline(setting, image_shape, classes)
    with torch.random.fork_rng(devices=[]):
        network = _make(setting, image_shape, classes)
    initialize(network, torch.Generator().manual_seed(seed))
    return network


def outline(setting: Model, image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """The network of ``setting`` without memory for its weights, on the meta device.

    Raises:
        ValueError: as `build`.
    """
    with torch.device("meta"):
        network = _make(setting, image_shape, classes)
    _check_memory(network)
    return network


def _make(setting: Model, image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    make = vgg if isinstance(setting, VGG) else nin if isinstance(setting, NIN) else densenet
    return make(setting, image_shape, classes)  # type: ignore[arg-type]


def _check_memory(network: nn.Module) -> None:
    """Refuse a network whose weights, gradients and momentum are more than all memory here."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    needed, there = 3 * 4 * parameters / 2**30, psutil.virtual_memory().total / 2**30
    if needed > there:
        raise ValueError(
            f"the network has {parameters:.3g} parameters and needs {needed:.3g} GiB with gradients and momentum, but "
            f"this machine has {there:.3g}: make it narrower or shallower"
        )


def initialize(network: nn.Module, generator: torch.Generator) -> None:
    """He normal weights and zero biases for every convolution and linear layer, in the order of the modules."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
