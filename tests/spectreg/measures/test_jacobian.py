import pytest
import torch
from torch import nn

from spectreg import jacobian_penalty
from spectreg.measures.jacobian import jacobian_frobenius_norm, jacobian_norm


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(16, outputs),
    ).double()


@pytest.fixture
def x():
    return torch.randn(6, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(model, x):
    model.eval()
    return torch.stack([torch.func.jacrev(lambda z: model(z[None])[0].flatten())(xi).flatten(1) for xi in x])


@pytest.mark.parametrize("outputs", [3, 20])
@pytest.mark.parametrize("exact", [True, False, None])
def test_it_is_the_norm_of_the_dense_jacobian_of_each_example(x, outputs, exact):
    model = network(outputs)
    measured = jacobian_norm(model, x, exact=exact, tolerance=1e-6, max_iterations=2000)
    truth = torch.linalg.matrix_norm(dense(model, x), 2)
    assert measured.converged.all()
    torch.testing.assert_close(measured.value, truth, rtol=1e-10, atol=0)
    assert (measured.iterations == 0) == (exact is True or (exact is None and outputs == 3))


def test_an_unconverged_norm_lies_below_and_within_its_residual_of_a_singular_value(x):
    model = network(20)
    measured = jacobian_norm(model, x, exact=False, max_iterations=2)
    S = torch.linalg.svdvals(dense(model, x))
    assert measured.iterations == 2
    assert not measured.converged.any()
    assert (measured.value <= S[:, 0]).all()
    assert ((S - measured.value[:, None]).abs().amin(1) <= measured.residual).all()


def test_a_relu_network_without_biases_is_its_jacobian_times_x(x):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5, bias=False)
    ).double()
    torch.testing.assert_close(model(x), torch.einsum("boi,bi->bo", dense(model, x), x.flatten(1)))
    ratio = model(x).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert (ratio <= jacobian_norm(model, x).value).all()


@pytest.mark.parametrize("exact", [True, False])
def test_examples_may_be_numbers(exact):
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    slopes = 1 - x.tanh() ** 2
    torch.testing.assert_close(jacobian_norm(nn.Tanh(), x, exact=exact).value, slopes)
    torch.testing.assert_close(jacobian_frobenius_norm(nn.Tanh(), x).value, slopes)


def test_orthogonal_layers_give_one():
    model = nn.Sequential(*[nn.utils.parametrizations.orthogonal(nn.Linear(20, 20)) for _ in range(3)]).double()
    x = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(jacobian_norm(model, x).value, torch.ones(4, dtype=torch.float64))


def test_a_dead_network_has_norm_zero():
    model = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 20))
    nn.init.constant_(model[0].bias, -100.0)
    measured = jacobian_norm(model, torch.zeros(2, 3))
    assert measured.value.tolist() == [0.0, 0.0]
    assert measured.converged.all()


def test_the_frobenius_norm_is_exact_or_within_its_error(x):
    model = network(20)
    truth = dense(model, x).square().sum((1, 2)).sqrt()
    exact = jacobian_frobenius_norm(model, x)
    torch.testing.assert_close(exact.value, truth)
    assert exact.standard_error.tolist() == [0.0] * 6
    estimate = jacobian_frobenius_norm(model, x, projections=300)
    assert ((estimate.value - truth).abs() < 4 * estimate.standard_error).all()
    assert (estimate.standard_error < 0.1 * truth).all()
    assert jacobian_frobenius_norm(model, x, projections=1).standard_error.isnan().all()


def test_the_standard_error_of_the_frobenius_norm_is_the_spread_of_estimates_from_other_directions(x):
    model, draws = network(20), torch.Generator().manual_seed(0)
    estimates = [jacobian_frobenius_norm(model, x, projections=50, generator=draws) for _ in range(40)]
    spread = torch.stack([estimate.value for estimate in estimates]).std(0)
    errors = torch.stack([estimate.standard_error for estimate in estimates]).mean(0)
    assert ((errors / spread - 1).abs() < 0.4).all()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Flatten(0), {}, r"the model gave \(192,\) for 6 examples"),
        (nn.Sequential(nn.LSTM(4, 3)), {}, "the model gave tuple for 6 examples"),
        (network(20), {"tolerance": 0.0}, r"tolerance is 0\.0"),
        (network(20), {"max_iterations": 0}, "max_iterations 0"),
    ],
)
def test_a_wrong_argument_is_named(x, model, options, message):
    x = x[:, 0].float() if isinstance(model[0] if len(list(model.children())) else None, nn.LSTM) else x
    with pytest.raises(ValueError, match=message):
        jacobian_norm(model, x, **options)


def test_a_model_that_cuts_the_graph_is_named(x):
    class Cut(nn.Module):
        def forward(self, x):
            return x.detach() * nn.Parameter(torch.ones(4, dtype=torch.float64))

    for measure in (jacobian_norm, jacobian_frobenius_norm):
        with pytest.raises(ValueError, match="does not depend on x in a differentiable way"):
            measure(Cut(), x)


class Spread(nn.Module):
    """Every output has a share of the batch's mean."""

    def forward(self, x):
        return (x - x.mean(0)).tanh()


@pytest.mark.parametrize("measure", [jacobian_norm, jacobian_frobenius_norm])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (Spread, (4, 6)),
        (lambda: nn.BatchNorm1d(6, track_running_stats=False), (4, 6)),
        (lambda: Outputs(nn.RNN(6, 3)), (5, 4, 6)),
        (lambda: Outputs(nn.MultiheadAttention(6, 2), 3), (5, 4, 6)),
    ],
    ids=["a mean", "batch normalization", "recurrent, time first", "attention, time first"],
)
def test_examples_that_influence_each_other_have_no_jacobian_of_their_own(measure, build, shape):
    torch.manual_seed(0)
    model = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="depends on more than one example along the first dimension"):
        measure(model, x)
    if not isinstance(model, nn.BatchNorm1d):  # which refuses a single example itself
        measure(model, x[:1])


class Outputs(nn.Module):
    """The first of what a layer gives for its input, as all of its inputs."""

    def __init__(self, layer, inputs=1):
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x):
        return self.layer(*[x] * self.inputs)[0]


class Complex(nn.Module):
    def forward(self, x):
        return x * (1 + 2j)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("measure", [jacobian_norm, jacobian_frobenius_norm, jacobian_penalty])
def test_complex_outputs_are_refused(measure, n):
    with pytest.raises(ValueError, match=r"outputs of torch\.complex64"):
        measure(Complex(), torch.ones(n, 3))


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


@pytest.mark.parametrize("size", [3, 30])
def test_an_infinite_jacobian_has_the_norm_nan(size):
    measured = jacobian_norm(Root(), torch.zeros(1, size))
    assert measured.value.isnan().all()
    assert not measured.converged.any()


def test_a_direction_that_is_stretched_more_than_all_others_is_found_among_many():
    class Residual(nn.Module):
        def forward(self, x):
            return x + 0.15 * x.mean((1, 2, 3), keepdim=True)

    found = jacobian_norm(Residual(), torch.randn(2, 3, 64, 64))
    assert found.converged.all()
    torch.testing.assert_close(found.value, torch.full((2,), 1.15), rtol=1e-3, atol=0)


def test_products_that_are_rounded_coarsely_still_converge():
    class Coarse(torch.autograd.Function):
        """A product whose entries have ten bits, as on an accelerator with TF32."""

        @staticmethod
        def forward(ctx, x, W):
            ctx.save_for_backward(W)
            y = x @ W.t()
            return (y.view(torch.int32) & ~0x1FFF).view(torch.float32)

        @staticmethod
        def backward(ctx, g):
            (W,) = ctx.saved_tensors
            return Coarse.apply(g, W.t().contiguous()), None

    class Layers(nn.Module):
        def forward(self, x):
            for W in weights:
                x = torch.relu(Coarse.apply(x, W))
            return x

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 32, generator=generator) / 32**0.5 for _ in range(3)]
    found = jacobian_norm(Layers(), torch.randn(16, 32, generator=generator), tolerance=2e-3)
    assert found.converged.all()
    assert found.iterations < 200
