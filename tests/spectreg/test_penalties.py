from inspect import unwrap

import pytest
import torch
from cases import KINDS, mlp, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from truth import svd_penalty_gradient

from spectreg import SpectralNormRegularizer
from spectreg.penalties import Function, Hinge, Power, Square, penalty_of

FUNCTIONS = {
    "square": ("square", lambda s: s**2 / 2),
    "hinge": (Hinge(2.0), lambda s: (s - 2).clamp_min(0) ** 2 / 2),
    "a hinge above every sigma": (Hinge(1e3), lambda s: 0 * s),
    "power": (Power(2), lambda s: (s**2 - 1) ** 2),
    "power 3": (Power(3), lambda s: (s**3 - 1) ** 2),
    "a function of the user's": (torch.log1p, torch.log1p),
    "a target of the shape": (Square("shape", factor=0.5), lambda s: (s - 0.5 * (5 / 7) ** 0.5) ** 2 / 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_of_each_penalty_is_that_of_the_function_of_the_svd(name):
    penalty, phi = FUNCTIONS[name]
    layer = seeded(lambda: nn.Linear(7, 5))
    _, expected = svd_penalty_gradient(layer.weight, lambda W: [W], True, phi)
    regularizer = SpectralNormRegularizer(layer, 0.3, penalty=penalty, warmup=200)
    regularizer.add_gradient()
    torch.testing.assert_close(layer.weight.grad, 0.3 * expected)


@given(sigma=st.floats(0.05, 20), name=st.sampled_from(sorted(FUNCTIONS)))
@settings(max_examples=60, deadline=None)
def test_a_slope_is_the_finite_difference_of_its_penalty(sigma, name):
    penalty = FUNCTIONS[name][0]
    penalty = {"square": Square()}.get(penalty, penalty) if isinstance(penalty, str) else penalty
    penalty = penalty if hasattr(penalty, "slope") else Function(penalty)
    target = torch.tensor(0.7, dtype=torch.float64)
    at, h = torch.tensor([sigma], dtype=torch.float64), 1e-6
    difference = (penalty.value(at + h, target) - penalty.value(at - h, target)) / (2 * h)
    torch.testing.assert_close(penalty.slope(at, target), difference, rtol=1e-4, atol=1e-4)


def test_a_target_at_the_start_pulls_each_weight_back_to_the_sigma_it_began_with_also_after_loading():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, 1.0, penalty=Square("start"), warmup=200)
    begin = regularizer.sigma()
    regularizer.add_gradient()
    assert all(W.tensor.grad.abs().max() < 1e-8 for W in regularizer.weights)
    with torch.no_grad():
        for W in regularizer.weights:
            W.tensor.mul_(3)
    state = regularizer.state_dict()
    again = SpectralNormRegularizer(model, 1.0, penalty=Square("start"), seed=5)
    again.load_state_dict(state)
    for r in (regularizer, again):
        model.zero_grad()
        r.add_gradient()
        for W in r.weights:
            torch.testing.assert_close(W.tensor.grad.norm(), 2 * begin[W.name])


@pytest.mark.parametrize("k", [2, 50])
@pytest.mark.parametrize("kind", [x for x in KINDS if x.name in
                                  ("linear", "conv2d channels last", "grouped", "attention q, k, v", "gpt-2",
                                   "transposed grouped", "one row")], ids=repr)  # fmt: skip
def test_the_k_largest_values_give_the_gradient_of_the_sum_over_them(kind, k):
    module = seeded(kind.build, seed=1)
    W = module.get_parameter(kind.weight)
    _, expected = svd_penalty_gradient(W, kind.matrices, kind.each, k=k)
    regularizer = SpectralNormRegularizer(
        module, 0.5, k=k, select=lambda name, _: name == kind.weight, warmup=100, **kind.settings
    )
    regularizer.add_gradient()
    torch.testing.assert_close(W.grad, 0.5 * expected, rtol=1e-4, atol=1e-5)
    added = W.grad.clone()
    module.zero_grad()
    regularizer.penalty().backward()
    torch.testing.assert_close(W.grad, added, rtol=1e-4, atol=1e-5)


def test_k_values_of_a_flat_spectrum_are_found_in_a_few_steps_where_one_vector_alone_wanders():
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=generator)).Q
    R = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=generator)).Q
    layer = nn.Linear(30, 30, bias=False).double()
    values = torch.cat([torch.tensor([1.0, 0.999, 0.998]), torch.full((27,), 0.3)]).double()
    layer.weight.data = Q @ torch.diag(values) @ R
    regularizer = SpectralNormRegularizer(layer, 1.0, k=3, warmup=15)
    torch.testing.assert_close(regularizer.sigma()["weight"], values[0], rtol=1e-9, atol=0)
    regularizer.add_gradient()
    expected = Q[:, :3] @ torch.diag(values[:3]) @ R[:3]
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-8)


def test_an_unknown_penalty_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown penalty 'cube': it is one of square, hinge, power"):
        SpectralNormRegularizer(mlp(), 0.1, penalty="cube")


@pytest.mark.parametrize("function", [torch.sum, lambda s: 3.0])
def test_a_function_of_sigma_that_is_not_elementwise_is_refused(function):
    regularizer = SpectralNormRegularizer(mlp(), 0.1, penalty=function)
    for call in (regularizer.add_gradient, regularizer.penalty):
        with pytest.raises(ValueError, match=r"penalty function made .* of a tensor of 3 σ: it must be elementwise"):
            call()


def test_a_function_that_is_infinitely_steep_at_zero_leaves_a_zero_weight_alone():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    regularizer = SpectralNormRegularizer(layer, 1.0, penalty=torch.sqrt)
    regularizer.add_gradient()
    regularizer.penalty().backward()
    assert not layer.weight.grad.any()


def test_an_object_that_lacks_a_part_of_a_penalty_is_told_which():
    class Partial:
        def value(self, sigma, target):
            return sigma

        def slope(self, sigma, target):
            return torch.ones_like(sigma)

    with pytest.raises(ValueError, match=r"has no target and no factor: an object that is a penalty has value, slope"):
        unwrap(penalty_of)(Partial())  # as users call it, without the type checks of the tests


def test_the_sigma_at_the_start_is_that_of_the_weight_whichever_block_it_is_in_later():
    layer = nn.Conv1d(2, 2, 1, groups=2, bias=False)
    layer.weight.data = torch.tensor([3.0, 1.0]).view(2, 1, 1)
    regularizer = SpectralNormRegularizer(layer, 1.0, penalty=Square("start"))
    regularizer.add_gradient()
    layer.weight.grad = None
    layer.weight.data = torch.tensor([1.9, 2.0]).view(2, 1, 1)
    regularizer.add_gradient()
    assert layer.weight.grad.flatten().tolist() == [0.0, pytest.approx(-1.0)]  # (2 − 3)²/2
    assert regularizer.penalty().item() == pytest.approx(0.5)


def test_of_several_values_each_aims_at_the_start_of_its_own_rank():
    layer = nn.Conv1d(3, 3, 1, groups=3, bias=False)
    layer.weight.data = torch.tensor([3.0, 1.0, 2.0]).view(3, 1, 1)
    regularizer = SpectralNormRegularizer(layer, 1.0, penalty=Square("start"), k=1)
    regularizer.add_gradient()
    layer.weight.data = torch.tensor([1.0, 5.0, 2.0]).view(3, 1, 1)
    layer.weight.grad = None
    regularizer.add_gradient()
    assert layer.weight.grad.flatten().tolist() == [0.0, pytest.approx(2.0), 0.0]
