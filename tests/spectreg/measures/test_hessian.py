import weakref

import pytest
import torch
from curvlinops import HessianLinearOperator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn import functional as F

from spectreg.linalg.lanczos import Goal, lanczos
from spectreg.measures.hessian import hessian_top_eigenvalues
from spectreg.measures.losses import BatchLoss

pytestmark = pytest.mark.portable


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).double()


def examples(n: int = 9):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def dense_hessian(model, x, y):
    """By torch.func.hessian, in evaluation mode."""
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [p.shape for p in parameters.values()]

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        values = {name: part.view(s) for name, part, s in zip(parameters, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    return torch.func.hessian(loss)(torch.cat([p.flatten() for p in parameters.values()]))


class Quadratic(nn.Module):
    """A loss ½ wᵀAw, whatever the input."""

    def __init__(self, A):
        super().__init__()
        self.A, self.w = A, nn.Parameter(torch.ones(len(A), dtype=A.dtype))

    def forward(self, x):
        return (0.5 * self.w @ self.A @ self.w).expand(len(x), 1)


def with_spectrum(*eigenvalues, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    n = len(eigenvalues)
    U, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return Quadratic((U @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ U.T).to(dtype))


def first_output(output, y):
    return output.mean()


ONE = [(torch.zeros(1, 1), torch.zeros(1))]


@pytest.mark.parametrize("k", [1, 3])
def test_the_eigenvalues_are_those_of_the_dense_hessian(k):
    model, (x, y) = network(), examples()
    truth = torch.linalg.eigvalsh(dense_hessian(model, x, y)).flip(0)[:k]
    measured = hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], k, tolerance=1e-8, max_products=20000)
    assert measured.converged
    torch.testing.assert_close(torch.tensor(measured.values, dtype=torch.float64), truth, rtol=1e-10, atol=0)


def test_a_single_batch_and_many_uneven_ones_give_the_same():
    model, (x, y) = network(), examples()
    whole = hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], 2, tolerance=1e-8)
    parts = list(zip(x.split(4), y.split(4), strict=True))
    split = hessian_top_eigenvalues(model, F.cross_entropy, parts, 2, tolerance=1e-8)
    assert split.values == pytest.approx(whole.values, rel=1e-10)


def test_scipy_on_curvlinops_agrees_and_needs_no_fewer_products():
    model, (x, y) = network(), examples()
    model.eval()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    counted = []
    operator = H.to_scipy()
    matvec = operator._matvec
    operator._matvec = lambda v: counted.append(1) or matvec(v)
    (theirs,) = eigsh(operator, k=1, which="LA", tol=1e-3, return_eigenvectors=False)
    ours = hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], tolerance=1e-3)
    assert ours.values[0] == pytest.approx(theirs, rel=1e-3)
    assert ours.products <= len(counted)


@pytest.mark.parametrize(
    "spectrum", [(-9.0, 1.0, 4.0, 2.0), (-3.0, -2.0, -1.0), (5.0, -5.0, 1.0), (0.0, 0.0, 0.0), (7.0, 7.0, 1.0)]
)
def test_the_largest_algebraic_eigenvalue_is_found_also_where_a_negative_one_dominates(spectrum):
    measured = hessian_top_eigenvalues(with_spectrum(*spectrum), first_output, ONE, tolerance=1e-6, max_products=5000)
    assert measured.converged
    assert measured.values[0] == pytest.approx(max(spectrum), abs=1e-9)


@given(
    spectrum=st.lists(st.floats(-10, 10), min_size=2, max_size=60, unique=True),
    k=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(spectrum=[0.0, 7.3e-43], k=1, dtype=torch.float32)
@settings(max_examples=60, deadline=None)
def test_a_converged_value_lies_within_its_residual_of_an_eigenvalue(spectrum, k, dtype):
    model = with_spectrum(*spectrum, dtype=dtype)
    measured = hessian_top_eigenvalues(model, first_output, ONE, k, tolerance=1e-4)
    truth = torch.linalg.eigvalsh(model.A.double())
    kind = torch.finfo(dtype)
    rounding = 50 * kind.eps * truth.abs().max().item() + kind.tiny  # below that no number has its digits
    for value, residual in zip(measured.values, measured.residuals, strict=True):
        assert (truth - value).abs().min().item() <= residual + rounding


def test_restarts_reach_the_same_values_as_one_long_basis():
    model = with_spectrum(*torch.linspace(-1, 1, 300).tolist())
    measured = hessian_top_eigenvalues(model, first_output, ONE, 3, tolerance=1e-6, max_products=2000)
    assert measured.converged
    assert measured.products > 32
    truth = torch.linspace(-1, 1, 300)[-3:].flip(0).tolist()
    assert measured.values == pytest.approx(truth, abs=1e-8)


@pytest.mark.parametrize("k", [1, 2])
def test_the_reported_residuals_are_the_true_ones(k):
    A = with_spectrum(*torch.linspace(-1, 1, 50).tolist()).A
    calls = []

    def product(v):
        calls.append(v.clone())
        return A @ v

    measured = lanczos(product, A[0] + 1, Goal(k, 1e-12, 12), torch.Generator().manual_seed(0))
    Q = torch.stack(calls, 1)
    theta, S = torch.linalg.eigh(Q.T @ A @ Q)
    assert not measured.converged
    for i, (value, residual) in enumerate(zip(measured.values, measured.residuals, strict=True), 1):
        y = Q @ S[:, -i]
        assert value == pytest.approx(theta[-i].item(), rel=1e-10)
        assert residual == pytest.approx((A @ y - theta[-i] * y).norm().item(), rel=1e-8)


@pytest.mark.parametrize("k", [1, 3])
def test_a_long_run_in_float32_loses_no_digits_it_claims(k):
    spectrum = torch.cat([torch.linspace(0, 0.999, 400), torch.ones(1)]).tolist()
    A = with_spectrum(*spectrum, dtype=torch.float32).A
    start = torch.randn(401, generator=torch.Generator().manual_seed(3))
    measured = lanczos(A.mv, start, Goal(k, 1e-6, 400), torch.Generator().manual_seed(0))
    truth = sorted(spectrum)[::-1][:k]
    assert measured.products > 60
    assert measured.values == pytest.approx(truth, abs=2e-5)
    for value, residual in zip(measured.values, measured.residuals, strict=True):
        assert min(abs(value - s) for s in spectrum) <= residual + 2e-5


def test_an_interrupt_passes_through_and_is_no_result():
    calls = []

    class Interrupted(Quadratic):
        def forward(self, x):
            calls.append(1)
            if len(calls) > 5:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted(with_spectrum(*torch.linspace(-1, 1, 50).tolist()).A)
    with pytest.raises(KeyboardInterrupt):
        hessian_top_eigenvalues(model, first_output, ONE * 2, tolerance=1e-9)


def test_frozen_parameters_are_left_out():
    model, (x, y) = network(), examples()
    H = dense_hessian(model, x, y)
    model[0].requires_grad_(False)
    n = sum(p.numel() for p in model[0].parameters())
    measured = hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], tolerance=1e-8)
    assert measured.values[0] == pytest.approx(torch.linalg.eigvalsh(H[n:, n:])[-1].item(), rel=1e-10)


def test_an_attention_layer_has_a_hessian():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert hessian_top_eigenvalues(model, F.mse_loss, [(x, x)]).converged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k is 0: the model has 75 parameters"),
        ({"k": 76}, r"k is 76: the model has 75 parameters"),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter([examples()])}, "batches can be read only once"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"loss_fn": lambda o, t: o}, r"shape \(\d+, 3\): it must be a scalar"),
        ({"loss_fn": lambda o, t: o.detach().sum()}, "does not depend on the parameters"),
        ({"loss_fn": lambda o, t: o.sum() * o.sum() * float("nan")}, "not finite"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    arguments = {"model": network(), "loss_fn": F.cross_entropy, "batches": [examples()], **changes}
    with pytest.raises(ValueError, match=message):
        hessian_top_eigenvalues(**arguments)


def test_only_one_batch_is_held_at_a_time():
    alive = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            h = (x * self.w).tanh()
            alive.append(weakref.ref(h))
            assert sum(ref() is not None for ref in alive) <= 2  # this batch's, and the one being replaced
            return h.sum(1, keepdim=True)

    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)) for _ in range(6)]
    hessian_top_eigenvalues(Watched(), F.mse_loss, batches)
    assert len(alive) >= 12


def test_a_model_whose_parameters_are_all_frozen_is_refused():
    with pytest.raises(ValueError, match="the model has 0 parameters with requires_grad"):
        hessian_top_eigenvalues(network().requires_grad_(False), F.cross_entropy, [examples()])


def test_an_eigenvalue_that_is_larger_than_all_others_is_found_among_many():
    class Parameters(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(10**5))

        def forward(self, x):
            return self.w

    loss = BatchLoss(lambda model, x: (model(x).square().sum() / 2 + model(x)[0] ** 2 / 4, 1))
    found = hessian_top_eigenvalues(Parameters(), loss, [torch.zeros(1)])
    assert found.converged
    assert found.values[0] == pytest.approx(1.5, rel=1e-3)
