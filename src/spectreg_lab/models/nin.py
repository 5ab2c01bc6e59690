"""Network in network (Lin, Chen & Yan, arXiv:1312.4400), with the layer sizes of its authors' CIFAR configuration."""

from torch import nn

from spectreg_lab.settings.config import NIN

SMALLEST = 4  # two 3×3 poolings of stride 2 must still see a border pixel and an inner one


def nin(setting: NIN, image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Three blocks of a convolution and two 1×1 convolutions; max and average pooling between, global average last."""
    channels, height, width = image_shape
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"an image of {height}×{width} is too small for the two poolings of a NIN: "
            f"the least is {SMALLEST}×{SMALLEST}"
        )
    wide, middle, narrow = setting.width, round(setting.width * 5 / 6), round(setting.width / 2)
    norm = setting.batch_norm
    return nn.Sequential(
        *mlpconv(channels, (wide, middle, narrow), kernel=5, batch_norm=norm),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Dropout(setting.dropout),
        *mlpconv(narrow, (wide, wide, wide), kernel=5, batch_norm=norm),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.Dropout(setting.dropout),
        *mlpconv(wide, (wide, wide, classes), kernel=3, batch_norm=norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def mlpconv(channels: int, sizes: tuple[int, int, int], kernel: int, batch_norm: bool) -> list[nn.Module]:
    """One k×k convolution and two 1×1 convolutions, each followed by a ReLU (the last one's too, as published)."""
    layers: list[nn.Module] = []
    for out, k in zip(sizes, (kernel, 1, 1), strict=True):
        norm = [nn.BatchNorm2d(out)] if batch_norm else []
        layers += [nn.Conv2d(channels, out, k, padding=k // 2, bias=not batch_norm), *norm, nn.ReLU()]
        channels = out
    return layers
