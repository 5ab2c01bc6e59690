"""What holds for every measure."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spectreg


class Restless(nn.Module):
    """Draws from the global generator, counts its calls and keeps a cache, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.size = 0

    def forward(self, x):
        torch.rand(1)
        if not isinstance(x, torch.fx.Proxy):
            self.calls += 1
            self.replaced = self.replaced + 1
            if self.size < len(x):
                self.size = len(x)
                self.register_buffer("kept", torch.zeros(self.size))
                self.register_buffer("unsaved", torch.zeros(self.size), persistent=False)
        return x


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), Restless(), nn.Dropout(), nn.Flatten(), nn.Linear(48, 20)
    )
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[6].weight.grad = torch.ones(20, 48)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 6, 6, generator=generator), torch.randint(20, (4,), generator=generator)


x, y = batch()
MEASURES = {
    "singular_values": lambda model: spectreg.singular_values(model),
    "operator_norm": lambda model: spectreg.operator_norm(model[0], (1, 6, 6)),
    "lipschitz_bound": lambda model: spectreg.lipschitz_bound(model, (1, 6, 6)),
    "jacobian_norm": lambda model: spectreg.jacobian_norm(model, x),
    "jacobian_frobenius_norm": lambda model: spectreg.jacobian_frobenius_norm(model, x, projections=2),
    "input_gradient_norm": lambda model: spectreg.input_gradient_norm(model, F.cross_entropy, [(x, y)]),
    "perturbation_curve": lambda model: spectreg.perturbation_curve(model, F.cross_entropy, [(x, y)], [1.0], "pgd"),
    "hessian_top_eigenvalues": lambda model: spectreg.hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)]),
    "normalized_norms": lambda model: spectreg.normalized_norms(model, x),
}


def traits(model):
    """All that a measure might disturb."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "buffers": [id(b) for b in model.buffers()],
        "unsaved": [sorted(module._non_persistent_buffers_set) for module in model.modules()],
        "sizes": [module.size for module in model.modules() if isinstance(module, Restless)],
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "parameters": [id(p) for p in model.parameters()],
        "generator": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "kernels": [torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()],
        "input": [x.clone(), x.requires_grad, x.grad],
    }


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_measure_leaves_the_model_and_the_generator_as_found(name, grad):
    model = network()
    with torch.set_grad_enabled(grad):
        before = traits(model)
        MEASURES[name](model)
        after = traits(model)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_that_fails_leaves_the_model_as_found_too(name):
    model = network()
    model[6].register_forward_hook(lambda module, inputs, output: output.no_such_attribute)
    before = traits(model)
    if name in ("singular_values", "operator_norm"):  # these run no forward pass
        MEASURES[name](model)
    else:
        with pytest.raises((AttributeError, ValueError)):
            MEASURES[name](model)
    torch.testing.assert_close(traits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", MEASURES)
def test_a_weight_that_is_not_finite_is_named(name):
    model = network()
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"(0\.weight'|weight of Conv2d).* NaN or infinite"):
        MEASURES[name](model)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_gives_the_same_again(name):
    assert repr(plain(MEASURES[name](network()))) == repr(plain(MEASURES[name](network())))


def plain(result):
    return {key: vars(value) for key, value in result.items()} if isinstance(result, dict) else result


def test_a_graph_in_flight_survives_a_measure_in_the_middle_of_a_step():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    inputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
    loss = F.cross_entropy(model(inputs), targets)
    spectreg.input_gradient_norm(model, F.cross_entropy, [(inputs, targets)])
    spectreg.hessian_top_eigenvalues(model, F.cross_entropy, [(inputs, targets)])
    loss.backward()
    assert model[0].weight.grad.abs().sum() > 0


class Scaled(nn.Module):
    def forward(self, x):
        return ((x - 0.5) / 0.25).relu()


class ScaledInPlace(nn.Module):
    def forward(self, x):
        return F.relu(x.sub_(0.5).div_(0.25), inplace=True)


COUNTED = spectreg.BatchLoss(lambda model, batch: (F.cross_entropy(model(batch[0]), batch[1]), len(batch[0])))
RUNNING = {
    **{
        name: MEASURES[name] for name in MEASURES if name not in ("singular_values", "operator_norm", "lipschitz_bound")
    },
    "input_gradient_norm, counted": lambda model: spectreg.input_gradient_norm(model, COUNTED, [(x, y)]),
    "perturbation_curve, counted": lambda model: spectreg.perturbation_curve(model, COUNTED, [(x, y)], [1.0]),
    "hessian_top_eigenvalues, counted": lambda model: spectreg.hessian_top_eigenvalues(model, COUNTED, [(x, y)]),
}


@pytest.mark.parametrize("name", RUNNING)
def test_a_model_that_changes_its_input_in_place_is_measured_as_one_that_does_not(name):
    before = x.clone()
    ours, other = (plain(RUNNING[name](nn.Sequential(first(), *network()))) for first in (ScaledInPlace, Scaled))
    assert torch.equal(x, before)
    assert repr(ours) == repr(other)


@pytest.mark.parametrize("name", MEASURES)
def test_autocast_changes_nothing(name):
    plainly = MEASURES[name](network())
    with torch.autocast("cpu", torch.bfloat16):
        assert repr(plain(MEASURES[name](network()))) == repr(plain(plainly))
        assert torch.is_autocast_enabled("cpu")


def test_largest_singular_values_are_those_of_the_weight_under_autocast():
    W = torch.randn(100, 120, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        values = spectreg.singular_values({"w": W}, top=2)["w"].values[0]
    torch.testing.assert_close(values, torch.linalg.svdvals(W.double())[:2], rtol=1e-5, atol=0)


class Padded(nn.Module):
    """An encoder whose last two places are padding."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 20)
        self.register_buffer("padding", torch.tensor([[False, False, False, True, True]]))

    def forward(self, x):
        return self.head(self.encoder(x, src_key_padding_mask=self.padding.expand(len(x), -1))).mean(1)


def test_an_encoder_with_padding_is_one_function_with_and_without_gradients():
    torch.manual_seed(0)
    model, x = Padded().double(), torch.randn(4, 5, 8, dtype=torch.float64)
    J = torch.stack(
        [torch.autograd.functional.jacobian(lambda z: model.eval()(z[None])[0], row).flatten(1) for row in x]
    )
    truth = torch.linalg.matrix_norm(J, 2)
    norms = spectreg.jacobian_norm(model, x, tolerance=1e-6).value
    torch.testing.assert_close(norms, truth, rtol=1e-5, atol=0)
    loss = lambda output, y: output.sum(1).mean()  # noqa: E731
    still, moved = spectreg.perturbation_curve(model, loss, [(x, torch.zeros(4))], [0.0, 1e-6], "gradient")
    assert still.stretch != still.stretch
    steepest = torch.nn.functional.normalize(J.sum(1), dim=1)
    assert moved.stretch == pytest.approx(torch.einsum("boi,bi->bo", J, steepest).norm(dim=1).mean().item(), rel=1e-4)


DRAWING = {
    "singular_values": lambda model, g: spectreg.singular_values(
        {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))}, top=1, tolerance=0.5, generator=g
    ),
    "operator_norm": lambda model, g: spectreg.operator_norm(model[0], (1, 40, 40), tolerance=0.5, generator=g),
    "jacobian_norm": lambda model, g: spectreg.jacobian_norm(model, x, exact=False, tolerance=0.5, generator=g),
    "jacobian_frobenius_norm": lambda model, g: spectreg.jacobian_frobenius_norm(model, x, projections=1, generator=g),
    "perturbation_curve": lambda model, g: spectreg.perturbation_curve(
        model, F.cross_entropy, [(x, y)], [1.0], generator=g
    ),
    "hessian_top_eigenvalues": lambda model, g: spectreg.hessian_top_eigenvalues(
        model, F.cross_entropy, [(x, y)], tolerance=0.5, generator=g
    ),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_measure_draws_from_the_generator_it_is_given(name):
    def drawn(seed):
        return repr(plain(DRAWING[name](network(), torch.Generator().manual_seed(seed))))

    assert drawn(0) == drawn(0) != drawn(1)
