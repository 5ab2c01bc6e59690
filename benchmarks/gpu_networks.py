"""Networks for the GPU's benchmark, in torch alone, and the images they are trained on."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def vgg(width: int = 64, stages: tuple[int, ...] = (2, 2, 3, 3, 3), hidden: int = 512) -> nn.Module:
    """The paper's VGG for images of 32 pixels."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, count in enumerate(stages):
        out = width * min(2**stage, 8)
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    size = channels * (32 // 2 ** len(stages)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 10))


class Dense(nn.Sequential):
    """A layer whose output is set beside its input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def densenet(depth: int = 40, growth: int = 12) -> nn.Module:
    """DenseNet without bottleneck and compression."""
    channels = 16
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for block in range(3):
        if block:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
        for _ in range((depth - 4) // 3):
            convolution = nn.Conv2d(channels, growth, 3, padding=1, bias=False)
            layers.append(Dense(nn.BatchNorm2d(channels), nn.ReLU(), convolution))
            channels += growth
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers, *head)


class Bottleneck(nn.Module):
    """The residual block of ResNet-50."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        sizes = [(channels, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1)]
        parts: list[nn.Module] = []
        for a, b, kernel, step in sizes:
            parts += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*parts[:-1])
        same = stride == 1 and channels == 4 * inner
        self.skip = nn.Identity() if same else nn.Conv2d(channels, 4 * inner, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.body(x))


def resnet(width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """The convolutions of ResNet-50, on images of 32 pixels."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    channels = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            inner = width * 2**stage
            layers.append(Bottleneck(channels, inner, 2 if stage and not number else 1))
            channels = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class GPT(nn.Module):
    """A transformer of GPT-2's shape, its output tied to its embedding."""

    def __init__(self, layers: int = 12, width: int = 768, words: int = 50_304, length: int = 512) -> None:
        super().__init__()
        self.length, self.words = length, words
        self.embedding, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, max(width // 64, 1), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, self.embedding.weight.dtype)
        h = self.embedding(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.blocks(h, mask, is_causal=True), self.embedding.weight).flatten(0, 1)


class Pictures(NamedTuple):
    """Training and test images on the device, and where they come from."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    source: str


def normalised(images: Tensor) -> Tensor:
    """Each image less its mean, divided by its own standard deviation, as the paper has them."""
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    return (images - mean) / deviation.clamp_min(1e-6)


def parquet(folder: Path, split: str, most: int) -> tuple[Tensor, Tensor]:
    """The images of ``split*.parquet``, decoded."""
    import io

    import numpy
    import pyarrow.parquet
    from PIL import Image

    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} has no {split}*.parquet")
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()][:most]
    key = "img" if "img" in rows[0] else "image"
    pixels = [numpy.asarray(Image.open(io.BytesIO(row[key]["bytes"])).convert("RGB")) for row in rows]
    images = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return normalised(images), torch.tensor([row["label"] for row in rows])


def pictures(folder: Path | None, sizes: tuple[int, int], device: torch.device) -> Pictures:
    """The photographs in ``folder``; without it, or what reads them, images drawn at random that say so."""
    try:
        if folder is None:
            raise FileNotFoundError("no --data was given")
        (x, y), (test_x, test_y) = (parquet(folder, s, n) for s, n in zip(("train", "test"), sizes, strict=True))
        source = f"{len(y)} and {len(test_y)} photographs of {folder.name}"
    except (ImportError, FileNotFoundError) as error:
        draws = torch.Generator().manual_seed(0)
        (y, test_y) = (torch.randint(10, (n,), generator=draws) for n in sizes)
        means = torch.randn(10, 3, 32, 32, generator=draws)
        (x, test_x) = (normalised(means[t] + 2 * torch.randn(len(t), 3, 32, 32, generator=draws)) for t in (y, test_y))
        source = f"a synthetic stand-in: ten Gaussian classes ({error})"
    placed = (t.to(device, memory_format=torch.channels_last) for t in (x, test_x))
    x, test_x = placed
    return Pictures(x, y.to(device), test_x, test_y.to(device), source)
