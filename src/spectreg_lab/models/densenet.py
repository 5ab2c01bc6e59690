"""DenseNet (Huang et al., arXiv:1608.06993) without bottleneck and compression: three dense blocks."""

import torch
from torch import Tensor, nn

from spectreg_lab.settings.config import DenseNet

SMALLEST = 4  # two 2×2 poolings


class DenseLayer(nn.Sequential):
    """Batch normalization, ReLU and a 3×3 convolution, whose ``growth`` channels are set beside the input."""

    def __init__(self, channels: int, growth: int, dropout: float) -> None:
        convolution = nn.Conv2d(channels, growth, 3, padding=1, bias=False)
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(), convolution, *([nn.Dropout(dropout)] if dropout else []))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels + growth, height, width)."""
        return torch.cat([x, super().forward(x)], dim=1)


def densenet(setting: DenseNet, image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """A 3×3 convolution, three dense blocks with a 1×1 convolution and 2×2 average pooling between, global average."""
    _, height, width = image_shape
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"an image of {height}×{width} is too small for the two poolings of a DenseNet: "
            f"the least is {SMALLEST}×{SMALLEST}"
        )
    channels = setting.initial
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], channels, 3, padding=1, bias=False)]
    for block in range(3):
        if block:
            layers += transition(channels, setting.dropout)
        for _ in range((setting.depth - 4) // 3):
            layers.append(DenseLayer(channels, setting.growth, setting.dropout))
            channels += setting.growth
    return nn.Sequential(
        *layers,
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


def transition(channels: int, dropout: float) -> list[nn.Module]:
    """Between two blocks: as many channels out as in, half the height and width."""
    return [
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.AvgPool2d(2),
    ]
