from itertools import pairwise, takewhile

import pytest
import torch
from torch import nn

from spectreg_lab.models import build
from spectreg_lab.settings.config import NIN, VGG, DenseNet

RGB = (3, 32, 32)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_vgg_has_the_13_convolutions_and_2_linear_layers_of_form_d_with_512_hidden_units():
    network = build(VGG(), RGB, 10)
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = sum(9 * a * b for a, b in pairwise(channels))
    norms = 2 * sum(channels[1:])
    assert convolutions == 14_710_464  # the 14.7 M that the literature gives for the convolutions of VGG-16
    assert count(network) == convolutions + norms + (512 * 512 + 512) + (512 * 10 + 10)


def test_densenet_40_has_the_one_million_parameters_of_its_authors():
    """Huang et al. 2016, Table 2: DenseNet (L = 40, k = 12) has 1.0 M."""
    assert count(build(DenseNet(depth=40, growth=12), RGB, 10)) == 1_019_722


def test_nin_has_the_layers_of_its_authors_configuration():
    network = build(NIN(), RGB, 100)
    kernels = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [
        (192, 3, 5, 5),
        (160, 192, 1, 1),
        (96, 160, 1, 1),
        (192, 96, 5, 5),
        (192, 192, 1, 1),
        (192, 192, 1, 1),
        (192, 192, 3, 3),
        (192, 192, 1, 1),
        (100, 192, 1, 1),
    ]
    assert count(network) == sum(out * (channels * k * k + 1) for out, channels, k, _ in kernels)
    assert 0.95e6 < count(network) < 1.05e6


def test_densenet_22_for_stl10_keeps_growth_and_blocks():
    network = build(DenseNet(depth=22), (3, 96, 96), 10)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 22  # with the linear layer
    assert network[-1].in_features == 16 + 18 * 12


SMALL = [
    (VGG(width=4, stages=(1, 1), hidden=8), (1, 8, 8)),
    (VGG(width=4, stages=(1, 2, 1), hidden=8, batch_norm=False, dropout=0.5), (3, 13, 9)),
    (NIN(width=12), (3, 8, 8)),
    (NIN(width=12, batch_norm=True, dropout=0), (1, 4, 4)),
    (DenseNet(depth=10, growth=4), (1, 8, 8)),
    (DenseNet(depth=7, growth=2, initial=4, dropout=0.2), (3, 5, 4)),
]


@pytest.mark.parametrize(("setting", "shape"), SMALL, ids=lambda x: getattr(x, "name", str(x)))
def test_a_small_network_gives_one_score_a_class_and_learns_by_every_parameter(setting, shape):
    network = build(setting, shape, 7)
    images = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    scores = network(images)
    assert scores.shape == (5, 7)
    scores.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def averaging(module: nn.Module) -> nn.Module:
    """An average pooling, which depends on all of its window, in place of a max pooling."""
    if not isinstance(module, nn.MaxPool2d):
        return module
    return nn.AvgPool2d(module.kernel_size, module.stride, ceil_mode=module.ceil_mode)


def pixels_seen(layers: list[nn.Module], size: int) -> int:
    """Width of the part of an image that a unit in the middle of the last layer depends on, all weights positive."""
    network = nn.Sequential(*map(averaging, layers)).double().eval()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    image = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    deep = network(image)
    middle = deep.shape[-1] // 2
    (gradient,) = torch.autograd.grad(deep[0, :, middle, middle].sum(), image)
    seen = gradient[0, 0].abs().sum(0).nonzero().flatten()
    return int(seen.max() - seen.min() + 1)


def before_the_average(network: nn.Sequential) -> list[nn.Module]:
    return list(takewhile(lambda module: not isinstance(module, nn.AdaptiveAvgPool2d), network))


def test_vgg_sees_212_pixels_of_the_input():
    """2 pixels more for each convolution, at the stride of its stage, and 1 for each pooling."""
    field, stride = 1, 1
    for convolutions in VGG().stages:
        field += 2 * stride * convolutions + stride
        stride *= 2
    assert field == 212
    network = build(VGG(batch_norm=False, width=1, hidden=2), (1, 256, 256), 2)
    assert pixels_seen(list(network[0]), 256) == 212


def test_densenet_40_sees_174_pixels_of_the_input():
    """2 more for each of 12 layers at the strides 1, 2 and 4, 1 and 2 for the poolings, 3 for the first convolution."""
    assert 3 + 12 * 2 * (1 + 2 + 4) + 1 + 2 == 174
    network = build(DenseNet(growth=1, initial=1), (1, 256, 256), 2)
    assert pixels_seen(before_the_average(network), 256) == 174


def test_nin_sees_27_pixels_of_the_input():
    """5 by the first convolution; 3 × 3 poolings add 2 at their stride; 5 × 5 at stride 2, 3 × 3 at stride 4."""
    assert 5 + 2 + 4 * 2 + 2 * 2 + 2 * 4 == 27
    assert pixels_seen(before_the_average(build(NIN(width=6), (1, 64, 64), 2)), 64) == 27


def test_the_same_seed_gives_the_same_network_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (build(VGG(width=2, stages=(1,), hidden=4), (1, 4, 4), 2, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one[0][0].weight, other[0][0].weight)


def test_weights_are_he_normal_and_biases_zero():
    network = build(NIN(), RGB, 10)
    middle = network[2]
    assert middle.weight.std().item() == pytest.approx((2 / middle.weight[0].numel()) ** 0.5, rel=0.02)
    assert all(m.bias.abs().sum() == 0 for m in network.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("setting", "shape", "message"),
    [
        (VGG(), (1, 8, 8), r"image of 8×8 is too small for the 5 poolings .* stages = \[2, 2, 3\]"),
        (NIN(), (1, 3, 8), "image of 3×8 is too small .* 4×4"),
        (DenseNet(), (1, 8, 3), "image of 8×3 is too small .* 4×4"),
    ],
)
def test_an_image_too_small_for_the_poolings_is_refused_with_what_fits(setting, shape, message):
    with pytest.raises(ValueError, match=message):
        build(setting, shape, 10)
