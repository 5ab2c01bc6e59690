"""Convolutions of 2 to 3 channels in float64: some whose forward is not that of their attributes, some that look so."""

import math
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


def dense(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The linear part of a layer as a matrix, column by column from the unit inputs."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64).unflatten(1, shape)
    with torch.no_grad():
        return (layer(eye) - layer(torch.zeros_like(eye[:1]))).flatten(1).T


def snapshot(model: nn.Module) -> list[Any]:
    """All attributes, by identity; all tensors, by value; all modes."""
    return [
        (
            sorted((name, id(value)) for name, value in vars(module).items()),
            [(k, v.detach().tolist()) for k, v in (*module.named_parameters(), *module.named_buffers())],
        )
        for module in model.modules()
    ]


class Standardized(nn.Conv2d):
    """As in BiT and NFNets."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / (variance + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Same(nn.Conv2d):
    """TensorFlow's SAME, as in EfficientNet."""

    def forward(self, x):
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias, self.stride)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 10 * weight, bias)


class StraightThrough(nn.Conv2d):
    """Another value than its gradient says."""

    def forward(self, x):
        y = super().forward(x)
        return y + 2 * y.detach()


class Swapped(nn.Conv2d):
    """The right value, and the gradient of something else."""

    def forward(self, x):
        y = super().forward(x)
        return 3 * y - 2 * y.detach()


class Logged(nn.Conv2d):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Subclass(nn.Conv2d):
    pass


def conv(kind: type[nn.Conv2d] = nn.Conv2d, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return kind(2, 3, 3, dtype=torch.float64, **options)


def with_pre_hook() -> nn.Module:
    layer = conv(padding=1)
    layer.register_forward_pre_hook(lambda module, inputs: (10 * inputs[0],))
    return layer


def with_hook() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda module, inputs, output: output.flip(1) * 3)
    return layer


def with_a_pre_hook_that_changes_its_weight() -> nn.Module:
    layer = conv()
    layer.register_forward_pre_hook(lambda module, _: vars(module).update(weight=5 * module._parameters["weight"]))
    return layer


def with_a_forward_of_the_object() -> nn.Module:
    layer = conv()
    layer.forward = types.MethodType(lambda self, x: -4 * nn.Conv2d.forward(self, x), layer)
    return layer


def with_old_weight_norm() -> nn.Module:
    layer = torch.nn.utils.weight_norm(conv())
    layer.weight_g.data *= 7  # the weight from before stays on the object until the next forward
    return layer


def with_a_harmless_hook() -> nn.Module:
    layer = conv(stride=2, bias=False)
    layer.register_forward_hook(lambda module, inputs, output: None)
    return layer


ALTERED = {
    "weight standardization": lambda: conv(Standardized, padding=1),
    "same padding": lambda: conv(Same),
    "another weight in _conv_forward": lambda: conv(Scaled),
    "a pre-hook": with_pre_hook,
    "a hook": with_hook,
    "a weight changed by a pre-hook": with_a_pre_hook_that_changes_its_weight,
    "a forward of the object": with_a_forward_of_the_object,
    "old weight_norm": with_old_weight_norm,
}
OF_TWO_MINDS = {
    "another value than its gradient says": lambda: conv(StraightThrough),
    "another gradient than its value has": lambda: conv(Swapped),
}
AS_THEIR_ATTRIBUTES_SAY = {
    "a subclass": lambda: conv(Subclass, padding=1, stride=2),
    "a forward that calls the parent's": lambda: conv(Logged, padding=1),
    "a hook that returns nothing": with_a_harmless_hook,
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "spectral_norm": lambda: parametrizations.spectral_norm(conv(padding=1, padding_mode="circular")),
}
