"""VGG (Simonyan & Zisserman, arXiv:1409.1556), with one hidden linear layer as is usual for small images."""

from math import floor, log2

from torch import nn

from spectreg_lab.settings.config import VGG


def vgg(setting: VGG, image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Stages of 3×3 convolutions, each ending in a 2×2 max pooling; then a hidden linear layer and the classifier."""
    channels, height, width = image_shape
    poolings = floor(log2(min(height, width)))
    if len(setting.stages) > poolings:
        raise ValueError(
            f"an image of {height}×{width} is too small for the {len(setting.stages)} poolings of a VGG with stages "
            f"{list(setting.stages)}: at most {poolings} stages fit, such as stages = {list(setting.stages[:poolings])}"
        )
    layers: list[nn.Module] = []
    for stage, convolutions in enumerate(setting.stages):
        out = setting.width * min(2**stage, 8)
        for _ in range(convolutions):
            layers += convolution(channels, out, setting.batch_norm)
            channels = out
        layers.append(nn.MaxPool2d(2))
    scale = 2 ** len(setting.stages)
    return nn.Sequential(
        nn.Sequential(*layers),
        nn.Flatten(),
        nn.Linear(channels * (height // scale) * (width // scale), setting.hidden),
        nn.ReLU(),
        *([nn.Dropout(setting.dropout)] if setting.dropout else []),
        nn.Linear(setting.hidden, classes),
    )


def convolution(channels: int, out: int, batch_norm: bool) -> list[nn.Module]:
    """A 3×3 convolution that keeps the size; a bias only where no batch normalization cancels it."""
    norm = [nn.BatchNorm2d(out)] if batch_norm else []
    return [nn.Conv2d(channels, out, 3, padding=1, bias=not batch_norm), *norm, nn.ReLU()]
