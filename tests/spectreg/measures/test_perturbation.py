import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from spectreg.measures.jacobian import jacobian_norm
from spectreg.measures.perturbation import perturbation_curve

KINDS = ["random", "gradient", "pgd"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3)).double()


def examples(n: int = 40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


class Recorder(nn.Module):
    """Keeps every input that a network is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner, seen = inner, []
        self.seen = lambda: seen  # a list of the model's own would be put back

    def forward(self, x):
        self.seen().append(x.detach().clone())
        return self.inner(x)


@given(radius=st.floats(1e-3, 1e3), kind=st.sampled_from(KINDS), steps=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_every_perturbed_input_lies_on_the_sphere(radius, kind, steps):
    model, (x, y) = Recorder(network()), examples(6)
    perturbation_curve(model, F.cross_entropy, [(x, y)], [radius], kind, steps=steps, restarts=2)
    distances = [(seen - x).norm(dim=1) for seen in model.seen()]
    perturbed = [d for d in distances if d.any()]
    assert perturbed
    for d in perturbed:
        torch.testing.assert_close(d, torch.full_like(d, radius), rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_at_radius_zero_stand_the_plain_loss_and_accuracy_and_no_stretch(kind):
    model, (x, y) = network().eval(), examples()
    (point,) = perturbation_curve(model, F.cross_entropy, [(x, y)], [0.0], kind)
    assert point.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)
    assert point.accuracy == (model(x).argmax(1) == y).double().mean().item()
    assert math.isnan(point.stretch)
    assert point.examples == 40


@pytest.mark.parametrize("radius", [0.1, 1.0, 5.0])
def test_pgd_is_at_least_as_bad_as_a_gradient_step_and_more_restarts_are_worse_still(radius):
    model, batch = network(), examples()
    gradient, few, many = (
        perturbation_curve(model, F.cross_entropy, [batch], [radius], kind, restarts=restarts)[0].loss
        for kind, restarts in [("gradient", 1), ("pgd", 1), ("pgd", 5)]
    )
    assert gradient <= few <= many


def test_for_a_linear_model_and_loss_all_is_known_in_closed_form():
    W = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.copy_(W)
    batch = torch.zeros(7, 2, dtype=torch.float64), torch.zeros(7, 1, dtype=torch.float64)

    def loss(output, y):
        return (output - y).sum()

    for kind in ("gradient", "pgd"):
        for point in perturbation_curve(model, loss, [batch], [0.5, 2.0], kind):
            assert point.loss == pytest.approx(5 * point.radius, rel=1e-12)
            assert point.stretch == pytest.approx(5, rel=1e-12)
            assert point.largest_stretch == pytest.approx(5, rel=1e-12)
            assert math.isnan(point.accuracy)


def test_small_stretches_stay_below_the_local_jacobian_norm():
    model, (x, y) = network(), examples()
    largest = jacobian_norm(model, x).value.max().item()
    for kind in KINDS:
        (point,) = perturbation_curve(model, F.cross_entropy, [(x, y)], [1e-7], kind)
        assert point.stretch <= point.largest_stretch <= largest * (1 + 1e-6)


def test_the_generator_decides_the_draws_and_the_global_one_stays():
    model, batch = network(), examples()
    before = torch.get_rng_state()

    def curve(seed):
        generator = torch.Generator().manual_seed(seed)
        return perturbation_curve(model, F.cross_entropy, [batch], [1.0], generator=generator)

    assert curve(0) == curve(0) != curve(1)
    assert torch.equal(before, torch.get_rng_state())


def test_an_example_without_a_gradient_is_pushed_in_a_random_direction():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double()
    nn.init.constant_(model[0].bias, -1e6)
    recorder = Recorder(model)
    batch = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    perturbation_curve(recorder, F.cross_entropy, [batch], [2.0], "gradient")
    torch.testing.assert_close(recorder.seen()[-1].norm(dim=1), torch.full((4,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": []}, r"radii are \[\]"),
        ({"radii": [1.0, -0.5]}, r"radii are \[1\.0, -0\.5\]"),
        ({"radii": [float("nan")]}, r"radii are \[nan\]"),
        ({"kind": "fgsm"}, "kind is 'fgsm': it must be one of random, gradient, pgd"),
        ({"steps": 0}, "steps is 0"),
        ({"restarts": 0}, "restarts 0"),
        ({"batches": []}, "batches is empty"),
        ({"loss_fn": lambda o, t: o}, r"shape \(\d+, 3\): it must be a scalar"),
        ({"loss_fn": lambda o, t: o.detach().sum(), "kind": "pgd"}, "does not depend on x in a differentiable way"),
        ({"batches": [(torch.ones(2, 5, dtype=torch.int64), torch.zeros(2))]}, "x has dtype torch.int64"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    arguments = {"model": network(), "loss_fn": F.cross_entropy, "batches": [examples()], "radii": [1.0], **changes}
    with pytest.raises(ValueError, match=message):
        perturbation_curve(**arguments)


@pytest.mark.parametrize("radii", [np.array([0.0, 0.5]), torch.tensor([0.0, 0.5]), (0.0, 0.5)])
def test_radii_may_be_any_sequence_of_numbers(radii):
    model, batch = network(), examples()
    assert repr(perturbation_curve(model, F.cross_entropy, [batch], radii)) == repr(
        perturbation_curve(model, F.cross_entropy, [batch], [0.0, 0.5])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_examples_may_be_numbers(kind):
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss = lambda output, y: output.mean()  # noqa: E731
    (point,) = perturbation_curve(nn.Softplus(), loss, [(x, x)], [1e-6], kind)
    assert point.stretch == pytest.approx(x.sigmoid().mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_radius_that_is_lost_in_the_rounding_of_the_inputs_is_refused(dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3).to(dtype), torch.randn(5, 6).to(dtype)
    loss = lambda output, y: output.sum()  # noqa: E731
    lost = torch.finfo(dtype).eps
    with pytest.raises(ValueError, match=rf"the radius {lost:g} is lost in the rounding of {dtype}"):
        perturbation_curve(layer, loss, [(x, x)], [1.0, lost])
    (point,) = perturbation_curve(layer, loss, [(x, x)], [100 * lost], "gradient")
    truth = perturbation_curve(layer.double(), loss, [(x.double(), x)], [1.0], "gradient")[0]
    assert point.stretch == pytest.approx(truth.stretch, rel=0.1)
