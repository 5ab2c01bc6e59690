"""A default device other than the model's changes no measure."""

import pytest
import torch
from cases import mlp, seeded
from torch import nn
from torch.nn.functional import mse_loss

import spectreg

MEASURES = {
    "top singular values": lambda m, x, y: spectreg.singular_values(wide(), top=1)["weight"].sigma,
    "singular values": lambda m, x, y: spectreg.singular_values(m)["0.weight"].sigma,
    "norm of a convolution": lambda m, x, y: spectreg.operator_norm(convolution(), (2, 9, 9)).value,
    "its certificate": lambda m, x, y: spectreg.operator_norm(convolution(), (2, 9, 9), tight=True).upper,
    "bound of a network": lambda m, x, y: spectreg.lipschitz_bound(m, (5,)).value,
    "Hessian": lambda m, x, y: spectreg.hessian_top_eigenvalues(m, mse_loss, [(x, y)]).values[0],
    "Jacobian": lambda m, x, y: spectreg.jacobian_norm(m, x).value.tolist(),
    "gradient by the input": lambda m, x, y: spectreg.input_gradient_norm(m, mse_loss, [(x, y)]).value,
    "attention": lambda m, x, y: spectreg.logit_bound(attention())[""].value.tolist(),
    "layers and normalizations": lambda m, x, y: spectreg.normalized_norms(normalized(), x[:, :2]),
}  # fmt: skip


def convolution():
    with torch.device("cpu"):
        return seeded(lambda: nn.Conv2d(2, 3, 3))


def attention():
    with torch.device("cpu"):
        return seeded(lambda: nn.MultiheadAttention(4, 2))


def normalized():
    with torch.device("cpu"):
        return seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))


def wide():
    with torch.device("cpu"):
        return seeded(lambda: nn.Linear(90, 80))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_the_same_whatever_the_default_device(measure):
    model, x, y = mlp(), torch.randn(6, 5).double(), torch.randn(6, 3).double()
    expected = MEASURES[measure](model, x, y)
    with torch.device("meta"):
        assert MEASURES[measure](model, x, y) == expected
