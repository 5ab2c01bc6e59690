"""Laws that hold for all weights: against float64 oracles over shapes, scales and degenerate matrices."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from cases import KINDS, Kind, rows, seeded, transposed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from truth import svd_penalty_gradient

from spectreg import SpectralNormRegularizer

pytestmark = pytest.mark.portable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SIZES = st.integers(1, 9)


def linear(W: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    layer.weight.data = W
    return layer


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    rows=SIZES, columns=SIZES, exponent=st.integers(-30, 30), seed=st.integers(0, 99), steps=st.sampled_from([0.5, 1])
)
@settings(max_examples=25, deadline=None)
def test_sigma_in_float32_is_below_the_true_norm_and_near_it_at_every_scale(rows, columns, exponent, seed, steps):
    W = (gaussian(rows, columns, seed=seed) * 10.0**exponent).float()
    layer = linear(W.clone())
    regularizer = SpectralNormRegularizer(layer, 1.0, steps=steps, warmup=30)
    regularizer.add_gradient()
    truth = torch.linalg.matrix_norm(W.double(), 2)
    sigma = regularizer.sigma()["weight"].double()
    assert 0.7 * truth <= sigma <= truth * (1 + 1e-5)
    torch.testing.assert_close(layer.weight.grad.double().norm() / truth, sigma / truth, rtol=1e-4, atol=0)


@given(
    kind=st.sampled_from(KINDS), exponent=st.integers(-30, 30), steps=st.sampled_from([0.5, 1]), seed=st.integers(0, 9)
)
@settings(max_examples=30, deadline=None)
def test_every_kind_in_float32_has_the_sigma_and_gradient_of_a_float64_svd_at_every_scale(kind, exponent, steps, seed):
    module = seeded(kind.build, seed)
    W = module.get_parameter(kind.weight)
    with torch.no_grad():
        W.copy_((1 + (W - 1) / 4) * 10.0**exponent)
    module.float()
    sigma, expected = svd_penalty_gradient(W, kind.matrices, kind.each)
    regularizer = SpectralNormRegularizer(
        module, 1.0, select=lambda n, _: n == kind.weight, steps=steps, warmup=60, **kind.settings
    )
    regularizer.add_gradient()
    found = regularizer.sigma()[kind.weight].double()
    assert found <= sigma * (1 + 1e-5)
    torch.testing.assert_close(found / sigma, torch.ones_like(sigma), rtol=1e-5, atol=0)
    torch.testing.assert_close(W.grad.double() / sigma, expected / sigma, rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_a_weight_that_changes_its_scale_by_many_orders_between_two_steps_is_followed(factor, k):
    W = gaussian(5, 7, seed=0).float()
    layer = linear(W)
    regularizer = SpectralNormRegularizer(layer, 1.0, k=k)
    regularizer.add_gradient()
    layer.weight.data *= factor
    for _ in range(4):
        layer.zero_grad()
        regularizer.add_gradient()
        assert layer.weight.grad.isfinite().all()
    truth = torch.linalg.matrix_norm(layer.weight.detach().double(), 2)
    assert 0.9 * truth < regularizer.sigma()["weight"] <= truth * (1 + 1e-5)


@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_sigma_rises_with_every_step_and_never_passes_the_true_norm(rows, columns, seed):
    W = gaussian(rows, columns, seed=seed)
    regularizer = SpectralNormRegularizer(linear(W.clone()), 0.0, warmup=0)
    estimates = []
    for _ in range(6):
        regularizer.add_gradient()
        estimates.append(regularizer.sigma()["weight"].item())
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(estimates))
    assert estimates[-1] <= torch.linalg.matrix_norm(W, 2) * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("steps", [0.5, 1])
def test_the_gradient_is_the_finite_difference_of_the_penalty_with_the_vectors_held(kind, steps):
    module = seeded(kind.build)
    W = module.get_parameter(kind.weight)
    regularizer = SpectralNormRegularizer(
        module, 0.7, select=lambda n, _: n == kind.weight, steps=steps, warmup=100, **kind.settings
    )
    regularizer.add_gradient()
    direction, state = gaussian(*W.shape, seed=1), regularizer.state_dict()
    values = []
    for h in (1e-5, -1e-5):
        regularizer.load_state_dict(state)
        W.data.add_(direction, alpha=h)
        values.append(regularizer.penalty().detach())
        W.data.sub_(direction, alpha=h)
    difference = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close((W.grad * direction).sum(), difference, rtol=1e-5, atol=1e-6)


@st.composite
def convolutions(draw: st.DrawFn) -> Kind:
    """A convolution of any dimension, groups and direction, with the map it is to be taken for."""
    dimensions, groups, is_transposed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    a, b = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    how = draw(st.sampled_from(["matrix", "each", "joint"])) if groups > 1 else "matrix"
    layers = TRANSPOSED if is_transposed else CONVOLUTIONS
    parts = 1 if how == "joint" else groups
    matrices = transposed(parts) if is_transposed else rows(parts)
    build = partial(layers[dimensions - 1], a, b, kernel, groups=groups)
    return Kind("convolution", build, "weight", matrices, how == "each", {"map": how})


@st.composite
def recurrences(draw: st.DrawFn) -> Kind:
    """A recurrent layer, gate by gate or as the stack."""
    layer, gates = draw(st.sampled_from([(nn.LSTM, 4), (nn.GRU, 3)]))
    how = draw(st.sampled_from(["matrix", "joint"]))
    build = partial(layer, draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    matrices = rows(gates if how == "matrix" else 1)
    return Kind("recurrence", build, "weight_ih_l0", matrices, how == "matrix", {"map": how})


@given(kind=convolutions() | recurrences(), exponent=st.integers(-15, 15), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_gradient_is_that_of_a_full_svd_for_every_shape_and_scale(kind, exponent, seed):
    module = seeded(kind.build, seed)
    W = module.get_parameter(kind.weight)
    with torch.no_grad():
        W.copy_((1 + (W - 1) / 4) * 10.0**exponent)
    sigma, expected = svd_penalty_gradient(W, kind.matrices, kind.each)
    regularizer = SpectralNormRegularizer(module, 1.0, select=lambda n, _: n == kind.weight, warmup=60, **kind.settings)
    regularizer.add_gradient()
    torch.testing.assert_close(W.grad / sigma, expected / sigma, rtol=0, atol=1e-7)
    torch.testing.assert_close(regularizer.sigma()[kind.weight] / sigma, torch.ones_like(sigma))


@pytest.mark.parametrize("settings_", [{}, {"steps": 0.5}, {"k": 2}, {"penalty": "power"}], ids=str)
def test_a_zero_weight_has_sigma_zero_no_gradient_and_keeps_its_vector_until_it_comes_alive(
    settings_,
):
    layer = linear(torch.zeros(4, 6))
    regularizer = SpectralNormRegularizer(layer, 1.0, **settings_)
    v = regularizer.state_dict()["vectors"]["weight"]["v"]
    for _ in range(2):
        regularizer.add_gradient()
        regularizer.penalty().backward()
    assert regularizer.sigma()["weight"] == 0
    assert not layer.weight.grad.any()
    if "k" not in settings_:
        assert torch.equal(regularizer.state_dict()["vectors"]["weight"]["v"], v)
    layer.weight.data = gaussian(4, 6, seed=0).float()
    for _ in range(200):
        regularizer.add_gradient()
    torch.testing.assert_close(regularizer.sigma()["weight"], torch.linalg.matrix_norm(layer.weight.detach(), 2))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_vectors_of_thousands_of_numbers_have_the_gradient_of_the_singular_values_asked_for(k):
    U, S, Vh = torch.linalg.svd(gaussian(9000, 4, seed=0), full_matrices=False)
    S = S * torch.tensor([8.0, 4.0, 2.0, 1.0])
    layer = linear(U * S @ Vh)
    SpectralNormRegularizer(layer, 1.0, k=k).add_gradient()
    torch.testing.assert_close(layer.weight.grad, U[:, :k] * S[:k] @ Vh[:k])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("steps", [0.5, 1])
def test_the_very_first_step_without_a_warmup_is_below_the_norm_and_its_gradient_has_that_length(steps, k):
    W = gaussian(4, 30, seed=0)
    layer = linear(W.clone())
    regularizer = SpectralNormRegularizer(layer, 1.0, steps=steps, warmup=0, k=k)
    truth = torch.linalg.svdvals(W)[:k]
    assert regularizer.sigma()["weight"] <= truth[0]
    regularizer.add_gradient()
    sigma = regularizer.state_dict()["vectors"]["weight"]["sigma"].flatten()
    assert (sigma <= truth * (1 + 1e-12)).all()
    torch.testing.assert_close(layer.weight.grad.norm(), sigma.norm())


def test_a_rank_one_weight_is_found_in_one_step():
    W = torch.outer(gaussian(4, seed=0), gaussian(6, seed=1))
    layer = linear(W)
    regularizer = SpectralNormRegularizer(layer, 1.0, warmup=0)
    regularizer.add_gradient()
    torch.testing.assert_close(regularizer.sigma()["weight"], torch.linalg.matrix_norm(W, 2))
    torch.testing.assert_close(layer.weight.grad, W)


def test_with_a_repeated_top_singular_value_the_gradient_is_a_unit_pair_of_its_subspace():
    W = torch.diag(torch.tensor([3.0, 3.0, 1.0]).double())
    layer = linear(W)
    regularizer = SpectralNormRegularizer(layer, 1.0, warmup=50)
    regularizer.add_gradient()
    G = layer.weight.grad
    torch.testing.assert_close(regularizer.sigma()["weight"].item(), 3.0)
    torch.testing.assert_close(G.norm().item(), 3.0)
    assert torch.linalg.matrix_rank(G) == 1
    torch.testing.assert_close(G[:2, :2].norm().item(), 3.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings_", [{}, {"steps": 0.5}, {"k": 2}], ids=str)
def test_a_weight_that_is_not_finite_shows_in_sigma_and_spreads_neither_into_the_vectors_nor_the_gradient(
    bad, settings_
):
    layer = linear(gaussian(4, 6, seed=0))
    regularizer = SpectralNormRegularizer(layer, 1.0, **settings_)
    regularizer.sigma()
    kept = layer.weight.data[0, 0].item()
    layer.weight.data[0, 0] = bad
    for _ in range(3):
        regularizer.add_gradient()
        regularizer.penalty().backward()
        assert not regularizer.sigma()["weight"].isfinite()
    assert not layer.weight.grad.any()
    layer.weight.data[0, 0] = kept
    for _ in range(300):
        layer.zero_grad()
        regularizer.add_gradient()
    torch.testing.assert_close(regularizer.sigma()["weight"], torch.linalg.matrix_norm(layer.weight.detach(), 2))
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.name in ("grouped", "lstm gates", "transposed grouped")], ids=str
)
@pytest.mark.parametrize("form", ["add", "penalty", "decoupled"])
def test_a_nan_in_one_block_leaves_the_other_blocks_and_the_other_weights_their_gradient(kind, form):
    model = nn.ModuleList([seeded(kind.build), linear(gaussian(4, 6, seed=0))])
    name = f"0.{kind.weight}"
    settings_ = {
        key: {f"0.{k}": x for k, x in v.items()} if isinstance(v, dict) else v for key, v in kind.settings.items()
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    regularizer = SpectralNormRegularizer(
        model, 1.0, select=lambda n, _: n in (name, "1.weight"), decoupled=form == "decoupled", **settings_
    )
    regularizer.sigma()
    W = model.get_parameter(name)
    W.data.view(-1)[0] = float("nan")
    before = [p.detach().clone() for p in (W, model[1].weight)]
    if form == "decoupled":
        regularizer.attach(optimizer)
        optimizer.step()
        changes = [b - p.detach() for p, b in zip((W, model[1].weight), before, strict=True)]
    else:
        regularizer.add_gradient() if form == "add" else regularizer.penalty().backward()
        changes = [W.grad, model[1].weight.grad]
    assert not regularizer.sigma()[name].isfinite()
    assert changes[0].flatten()[1:].isfinite().all()
    torch.testing.assert_close(changes[1].norm(), regularizer.sigma()["1.weight"])


def test_residual_and_stable_rank_are_those_of_a_dense_computation_and_change_nothing():
    W = gaussian(5, 7, seed=3)
    regularizer = SpectralNormRegularizer(linear(W), 1.0, warmup=2)
    sigma, state = regularizer.sigma()["weight"], regularizer.state_dict()["vectors"]["weight"]
    v = state["v"].flatten()
    u = W @ v / (W @ v).norm()
    torch.testing.assert_close(regularizer.residual()["weight"], (W.T @ u - (W @ v).norm() * v).norm())
    torch.testing.assert_close(regularizer.stable_rank()["weight"], W.square().sum() / sigma.square())
    assert torch.equal(regularizer.state_dict()["vectors"]["weight"]["v"], state["v"])


def test_the_stable_rank_of_blocks_apart_is_the_least_of_theirs():
    lstm = seeded(lambda: nn.LSTM(3, 5))
    regularizer = SpectralNormRegularizer(lstm, 1.0, warmup=200)
    blocks = [torch.linalg.svdvals(part.detach()) for part in lstm.weight_hh_l0.chunk(4)]
    expected = min(s.square().sum() / s[0].square() for s in blocks)
    torch.testing.assert_close(regularizer.stable_rank()["weight_hh_l0"], expected)
