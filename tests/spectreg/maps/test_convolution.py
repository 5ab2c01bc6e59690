"""A convolution's own operator, against the same convolution written as a dense matrix."""

import copy

import pytest
import torch
from cases import seeded
from torch import nn

from spectreg import SpectralNormRegularizer, lipschitz_bound, operator_norm
from spectreg.maps.convolution import OperatorMap
from spectreg.weights.input_sizes import input_sizes

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), (5, 6)),
    "stride and padding": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (6, 5)),
    "dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (6, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (4, 4)),
    "same, of an even kernel": (lambda: nn.Conv2d(2, 3, 2, padding="same"), (4, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (5, 4)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 4)),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (5,)),
    "three dimensions": (lambda: nn.Conv3d(2, 2, 2, padding=1), (3, 2, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (3, 4)),
    "transposed groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2), (5,)),
}


def dense(module: nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    """The linear part of the module as a matrix, by its Jacobian at zero."""
    x = torch.zeros(1, module.in_channels, *size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x, create_graph=True)
    return jacobian.reshape(-1, x.numel())


@pytest.mark.parametrize("steps", [0.5, 1])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_norm_and_gradient_of_the_operator_are_those_of_the_dense_matrix(name, steps):
    build, size = CONVOLUTIONS[name]
    module = seeded(build)
    norm = torch.linalg.matrix_norm(dense(module, size), 2)
    (expected,) = torch.autograd.grad(0.35 * norm**2, module.weight)
    regularizer = SpectralNormRegularizer(module, 0.7, map="operator", input_size=size, steps=steps, warmup=300)
    regularizer.add_gradient()
    torch.testing.assert_close(regularizer.sigma()["weight"], norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(module.weight.grad, expected, rtol=1e-4, atol=1e-4)
    added = module.weight.grad.clone()
    module.zero_grad()
    regularizer.penalty().backward()
    torch.testing.assert_close(module.weight.grad, added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_matrix_of_the_map_is_the_dense_convolution(name):
    build, size = CONVOLUTIONS[name]
    module = seeded(build)
    matrix = OperatorMap.of(module, size).matrices(module.weight.detach())[0]
    torch.testing.assert_close(matrix, dense(module, size).detach())


def test_the_two_largest_values_of_an_operator_are_those_of_the_dense_matrix():
    build, size = CONVOLUTIONS["stride and padding"]
    module = seeded(build)
    singular = torch.linalg.svdvals(dense(module, size).detach())[:2]
    regularizer = SpectralNormRegularizer(module, 1.0, map="operator", input_size=size, k=2, warmup=400)
    regularizer.sigma()
    torch.testing.assert_close(regularizer.state_dict()["vectors"]["weight"]["sigma"][0], singular)


def test_operators_of_a_network_find_their_sizes_in_a_forward_pass_and_linear_layers_keep_their_matrix():
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, padding=1),
                              nn.Flatten(), nn.Linear(18, 2))
    )  # fmt: skip
    running = model[1].running_mean.clone()
    sizes = input_sizes(model, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    assert sizes == {"0.weight": (8, 8), "3.weight": (3, 3)}
    assert model.training
    assert torch.equal(model[1].running_mean, running)
    regularizer = SpectralNormRegularizer(model, 0.1, map="operator", input_size=sizes, warmup=300)
    truth = [dense(model[0], (8, 8)), dense(model[3], (3, 3)), model[5].weight]
    for sigma, matrix in zip(regularizer.sigma().values(), truth, strict=True):
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix.detach(), 2))


def test_a_bfloat16_operator_iterates_in_float32():
    module = seeded(CONVOLUTIONS["plain"][0]).bfloat16()
    regularizer = SpectralNormRegularizer(module, 0.1, map="operator", input_size=(5, 6), warmup=100)
    regularizer.add_gradient()
    norm = torch.linalg.matrix_norm(dense(module.double(), (5, 6)), 2)
    torch.testing.assert_close(regularizer.sigma()["weight"].double(), norm.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("elements", [1, 30, 10**6])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_bfloat16_operator_is_taken_in_pieces_in_float32_whatever_their_size(name, elements, monkeypatch):
    monkeypatch.setattr("spectreg.maps.convolution.PIECE", elements)
    build, size = CONVOLUTIONS[name]
    low = seeded(build).bfloat16()
    high = copy.deepcopy(low).double()
    settings = {"map": "operator", "input_size": size, "warmup": 20, "k": 2}
    ours, truth = SpectralNormRegularizer(low, 0.1, **settings), SpectralNormRegularizer(high, 0.1, **settings)
    ours.add_gradient()
    truth.add_gradient()
    assert ours.sigma()["weight"].dtype == torch.float32
    torch.testing.assert_close(ours.sigma()["weight"].double(), truth.sigma()["weight"], rtol=1e-5, atol=0)
    torch.testing.assert_close(low.weight.grad.double(), high.weight.grad, rtol=2e-2, atol=2e-2)


SET_ANEW = {
    "padding": (lambda: nn.Conv2d(2, 3, 3), {"padding": (1, 2)}),
    "padding, a number": (lambda: nn.Conv2d(2, 3, 3, padding=2), {"padding": 1}),
    "same": (lambda: nn.Conv1d(2, 3, 4), {"padding": "same"}),
    "same, then the dilation": (lambda: nn.Conv1d(2, 3, 3, padding="same"), {"dilation": (2,)}),
    "valid": (lambda: nn.Conv2d(2, 3, 3, padding=1), {"padding": "valid"}),
    "for segmentation": (
        lambda: nn.Conv2d(2, 2, 3, stride=2, padding=1), {"dilation": (2, 2), "padding": (2, 2), "stride": (1, 1)}
    ),
    "numbers": (lambda: nn.Conv2d(2, 2, 3, stride=2, padding=1), {"dilation": 2, "padding": 2, "stride": 1}),
    "circular, whose amounts stay": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), {"padding": (2,)}),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), {"padding": (1, 1), "stride": 2, "output_padding": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", SET_ANEW)
def test_a_convolution_whose_padding_stride_or_dilation_is_set_anew_is_measured_as_it_acts(name):
    build, attributes = SET_ANEW[name]
    module = seeded(build).double()
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    size = (6, 5)[: len(module.kernel_size)]
    truth = torch.linalg.matrix_norm(dense(module, size), 2).item()
    norm = operator_norm(module, (2, *size), tight=True)
    assert norm.value == pytest.approx(truth)
    assert min(norm.upper, lipschitz_bound(module, (2, *size)).value) >= truth * (1 - 1e-9)
    regularizer = SpectralNormRegularizer(module, 0.1, map="operator", input_size=size, warmup=300)
    assert regularizer.sigma()["weight"].item() == pytest.approx(truth)


def test_the_sizes_found_fit_a_regularizer_that_leaves_some_out_or_whose_kernels_are_tied():
    network = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)))
    network[1].weight = network[0].weight
    sizes = input_sizes(network, torch.zeros(1, 2, 9, 9))
    assert sizes == {"0.weight": (9, 9), "2.weight": (9, 9)}
    regularizer = SpectralNormRegularizer(
        network, 0.1, map="operator", input_size=sizes, select=lambda name, _: name == "2.weight"
    )
    assert list(regularizer.sigma()) == ["2.weight"]
