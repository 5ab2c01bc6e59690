"""Attached means acting: once before every step that moves the weights, or an error that says what to call instead."""

import os
import subprocess
import sys

import pytest
import torch
from cases import unchecked_types
from ranks import on_ranks
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer

from spectreg import SpectralNormRegularizer, named_products, named_weights
from spectreg.integrations.groups import from_groups

RATE, STRENGTH, SIGMA = 0.1, 0.5, 3.0
ONCE = SIGMA - RATE * STRENGTH * SIGMA  # σ after one step of plain descent on λσ²/2


def diagonal():
    """A layer whose top singular value is 3, alone and first."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.diag(torch.tensor([SIGMA, 1.0, 1.0, 1.0]))
    return layer


def sigma(layer):
    return pytest.approx(torch.linalg.matrix_norm(layer.weight.detach(), 2).item(), abs=1e-5)


def zero_gradients(layer, optimizer):
    """A loss without a slope, so that all that moves the weight is the penalty."""

    def closure():
        optimizer.zero_grad()
        loss = 0 * layer(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    return closure


def attached(layer, optimizer, **settings):
    return SpectralNormRegularizer(layer, STRENGTH, **settings).attach(optimizer)


class TwoSteps(Optimizer):
    """Sharpness-aware minimization, as it is written by most: `step` for closures, two calls for loops."""

    def __init__(self, params, base, **settings):
        super().__init__(params, settings)
        self.base_optimizer = base(self.param_groups, **settings)

    @torch.no_grad()
    def first_step(self):
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Bare(Optimizer):
    """A wrapper that does without `Optimizer.__init__`, as torch's PostLocalSGDOptimizer."""

    def __init__(self, inner):
        self.optim = inner
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.optim.step(closure)

    def zero_grad(self):
        self.optim.zero_grad()


class OwnStep(SGD):
    """A subclass whose step calls that of its base: torch runs the hooks of both."""

    def step(self, closure=None):
        return super().step(closure)


class TwiceOwnStep(OwnStep):
    def step(self, closure=None):
        return super().step(closure)


def test_the_optimizer_inside_of_a_two_step_optimizer_acts_in_both_styles():
    for in_calls in (True, False):
        layer = diagonal()
        optimizer = TwoSteps(layer.parameters(), SGD, lr=RATE)
        attached(layer, optimizer)
        closure = zero_gradients(layer, optimizer)
        closure()
        if in_calls:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
        assert sigma(layer) == ONCE


@pytest.mark.parametrize("build", [
    lambda p: SGD(p, lr=RATE), lambda p: OwnStep(p, lr=RATE), lambda p: TwiceOwnStep(p, lr=RATE),
    lambda p: Bare(SGD(p, lr=RATE)), lambda p: Bare(Bare(OwnStep(p, lr=RATE))),
], ids=["plain", "own step", "own step twice", "wrapped", "wrapped twice"])  # fmt: skip
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_step_acts_once_whatever_is_around_the_optimizer(build, closed, scheduled):
    layer = diagonal()
    optimizer = build(list(layer.parameters()))
    if scheduled and hasattr(optimizer, "_optimizer_step_pre_hooks"):
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    attached(layer, optimizer)
    closure = zero_gradients(layer, optimizer)
    closure()
    optimizer.step(closure) if closed else optimizer.step()
    assert sigma(layer) == ONCE


def test_a_step_after_one_that_failed_acts_again():
    class Failing(OwnStep):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    layer = diagonal()
    optimizer = Failing(layer.parameters(), lr=RATE)
    attached(layer, optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.fails = False
    optimizer.step()
    assert sigma(layer) == ONCE


def test_an_optimizer_given_twice_acts_once():
    layer = diagonal()
    inner = SGD(layer.parameters(), lr=RATE)
    SpectralNormRegularizer(layer, STRENGTH).attach(inner, Bare(inner))
    inner.step()
    assert sigma(layer) == ONCE


def replaced(optimizer):
    optimizer.step = lambda closure=None: None
    return optimizer


class Several(Optimizer):
    def __init__(self, *optimizers):
        self.first, self.second = optimizers
        self.param_groups = self.first.param_groups

    def step(self):
        self.second.step()


class Unhooked(Optimizer):
    """Steps by itself, and was made without `Optimizer.__init__`."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params), "lr": RATE}]

    def step(self):
        pass


class Rateless(Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        pass


class Extrapolating(Optimizer):
    """Moves weights by a call of its own, and has no step."""

    def __init__(self, params):
        super().__init__(params, {"lr": RATE})

    def extrapolate(self):
        pass


class NoOptimizer:
    def __init__(self, params):
        self.param_groups = [{"params": list(params)}]

    def step(self):
        pass


class Averaging(SGD):
    def train(self):
        pass

    def eval(self):
        pass


REFUSED = {
    "made without __init__": (Unhooked, {}, ValueError, r"this Unhooked, which runs no hooks .* call add_gradient\(\)"),
    "a step that was replaced": (lambda p: replaced(SGD(p, lr=RATE)), {}, ValueError, "this SGD, which runs no hooks"),
    "no step": (Extrapolating, {}, ValueError, r"this Extrapolating, which runs no hooks .* call add_gradient\(\)"),
    "several inside": (
        lambda p: Several(SGD(p, lr=RATE), SGD(p, lr=RATE)), {}, ValueError, r"several optimizers \(first, second\)",
    ),
    "no optimizer": (NoOptimizer, {}, TypeError, r"not NoOptimizer\. What has a step\(\) of its own gets "),
    "one that maximizes": (lambda p: SGD(p, lr=RATE, maximize=True), {}, ValueError, r"maximizes, .* subtract penalty"),
    "line search in a wrapper": (lambda p: Bare(torch.optim.LBFGS(p)), {}, ValueError, "LBFGS evaluates loss"),
    "averages": (
        lambda p: Averaging(p, lr=RATE), {"decoupled": True}, ValueError, "under Averaging are between two averages",
    ),
    "no learning rate": (
        lambda p: TwoSteps(p, Rateless), {"decoupled": True}, ValueError,
        "Rateless has parameter groups without 'lr'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_act_is_refused_with_the_call_that_does(case):
    build, settings, error, message = REFUSED[case]
    layer = diagonal()
    optimizer = build(list(layer.parameters()))
    regularizer = SpectralNormRegularizer(layer, STRENGTH, **settings)
    with unchecked_types(), pytest.raises(error, match=message):
        regularizer.attach(optimizer)
    assert "attached" not in repr(regularizer)


def test_the_optimizers_in_real_packages_act_or_are_refused():
    po, schedulefree = pytest.importorskip("pytorch_optimizer"), pytest.importorskip("schedulefree")
    builds = [
        lambda p: po.Lookahead(SGD(p, lr=RATE)), lambda p: po.SAM(p, SGD, lr=RATE, rho=0.0),
        lambda p: po.OrthoGrad(SGD(p, lr=RATE)),
    ]  # fmt: skip
    for build in builds:
        layer = diagonal()
        optimizer = build(list(layer.parameters()))
        attached(layer, optimizer)
        closure = zero_gradients(layer, optimizer)
        closure()
        optimizer.step(closure)
        assert sigma(layer) == ONCE, type(optimizer)
    free = schedulefree.SGDScheduleFree(diagonal().parameters(), lr=RATE)
    with pytest.raises(ValueError, match="SGDScheduleFree are between two averages"):
        attached(diagonal(), free, decoupled=True)
    with unchecked_types(), pytest.raises(TypeError, match="not ScheduleFreeWrapper"):
        attached(layer := diagonal(), schedulefree.ScheduleFreeWrapper(SGD(layer.parameters(), lr=RATE)))


def test_of_an_optimizer_that_steps_in_a_backward_pass_of_its_own_the_next_log_warns():
    po = pytest.importorskip("pytorch_optimizer")
    layer = diagonal()
    optimizer = po.LOMO(layer, lr=RATE)
    regularizer = attached(layer, optimizer)
    regularizer.log()
    optimizer.fused_backward(layer(torch.ones(2, 4)).square().mean(), RATE)
    with pytest.warns(UserWarning, match=r"the attached optimizer has taken no step\(\)"):
        regularizer.log()


def test_the_penalty_of_a_schedule_free_optimizer_goes_through_its_gradients():
    schedulefree = pytest.importorskip("schedulefree")
    ours, theirs = diagonal(), diagonal()
    optimizers = [schedulefree.SGDScheduleFree(x.parameters(), lr=RATE) for x in (ours, theirs)]
    attached(ours, optimizers[0], warmup=100)
    for optimizer in optimizers:
        optimizer.train()
    for _ in range(4):
        ours.zero_grad()
        optimizers[0].step()
        U, s, Vh = torch.linalg.svd(theirs.weight.detach())
        theirs.weight.grad = STRENGTH * s[0] * torch.outer(U[:, 0], Vh[0])
        optimizers[1].step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_opacus_gets_the_penalty_after_clipping_and_noise_and_refuses_what_it_would_undo():
    opacus = pytest.importorskip("opacus")
    from opacus.optimizers import DPOptimizer

    model = opacus.GradSampleModule(diagonal())
    layer = model._module
    optimizer = DPOptimizer(
        SGD(model.parameters(), lr=RATE), noise_multiplier=0.0, max_grad_norm=1e-3, expected_batch_size=2
    )
    regularizer = SpectralNormRegularizer(model, STRENGTH)
    (0 * model(torch.ones(2, 4)).sum()).backward()
    for act in (regularizer.add_gradient, regularizer.penalty):
        with pytest.raises(RuntimeError, match=r"gradients by sample \(Opacus\).* Use attach\(dp_optimizer\)"):
            act()
    with torch.no_grad():
        assert regularizer.penalty().item() == pytest.approx(STRENGTH * SIGMA**2 / 2, rel=1e-3)
    regularizer.attach(optimizer)
    optimizer.step()
    assert sigma(layer) == ONCE


class Groupless(Optimizer):
    """Calls nothing of torch's, and has no groups."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_an_optimizer_without_groups_is_refused_with_the_way_out():
    layer = diagonal()
    with pytest.raises(
        ValueError, match=r"cannot act through this Groupless, which has no param_groups\. .*add_gradient"
    ):
        attached(layer, Groupless(SGD(layer.parameters(), lr=RATE)))


def on_one_of_two_ranks():
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    for build in (
        lambda p: PostLocalSGDOptimizer(SGD(p, lr=RATE), PeriodicModelAverager(period=1)),
        lambda p: ZeroRedundancyOptimizer(p, SGD, lr=RATE),
    ):
        layers = nn.Sequential(diagonal(), diagonal())
        optimizer = build(layers.parameters())
        attached(layers, optimizer)
        optimizer.step()
        for layer in layers:
            assert sigma(layer) == ONCE, type(optimizer)
    overlapped = ZeroRedundancyOptimizer(layers.parameters(), SGD, lr=RATE)
    overlapped._overlap_with_ddp = True  # to be made so it asks for a model under DDP with a hook
    with pytest.raises(ValueError, match="steps inside the backward pass"):
        attached(layers, overlapped)


@pytest.mark.slow
def test_distributed_optimizers_act_once_on_every_rank():
    on_ranks(2, on_one_of_two_ranks)


class Scaled(SGD):
    """A step that takes more than a closure, as those with Hessian estimates do."""

    def step(self, closure=None, scale=1.0):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(parameter.grad, alpha=-self.param_groups[0]["lr"] * scale)
        return loss


class Renamed(Scaled):
    def step(self, loss_fn=None, scale=1.0):
        return super().step(loss_fn, scale)


CALLS = {
    "by place": (Scaled, lambda optimizer, closure: optimizer.step(closure, 0.5)),
    "by name": (Scaled, lambda optimizer, closure: optimizer.step(closure=closure, scale=0.5)),
    "another name": (Renamed, lambda optimizer, closure: optimizer.step(loss_fn=closure, scale=0.5)),
    "another name, by place": (Renamed, lambda optimizer, closure: optimizer.step(closure, 0.5)),
    "no closure": (Scaled, lambda optimizer, closure: (closure(), optimizer.step(None, 0.5))),
    "no closure, by name": (Scaled, lambda optimizer, closure: (closure(), optimizer.step(scale=0.5))),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_step_gets_all_that_it_is_given_and_the_penalty_after_its_closure(name):
    kind, call = CALLS[name]
    layer = diagonal()
    optimizer = kind(layer.parameters(), lr=RATE)
    attached(layer, optimizer)
    call(optimizer, zero_gradients(layer, optimizer))
    assert sigma(layer) == SIGMA - 0.5 * RATE * STRENGTH * SIGMA


def test_several_functions_given_to_a_step_are_refused():
    class Two(Scaled):
        def step(self, first=None, second=None):
            raise AssertionError

    layer = diagonal()
    optimizer = Two(layer.parameters(), lr=RATE)
    attached(layer, optimizer)
    with pytest.raises(ValueError, match="several functions"):
        optimizer.step(lambda: 0.0, lambda: 0.0)


def test_a_weight_that_two_optimizers_hold_gets_the_penalty_at_the_steps_of_both():
    layer = diagonal()
    optimizers = [SGD(layer.parameters(), lr=RATE), SGD(layer.parameters(), lr=RATE)]
    SpectralNormRegularizer(layer, STRENGTH).attach(*optimizers)
    for optimizer in optimizers:
        zero_gradients(layer, optimizer)()
        optimizer.step()
    assert sigma(layer) == SIGMA * (1 - RATE * STRENGTH) ** 2


def test_a_function_beside_a_closure_that_is_not_given_is_left_alone():
    class Transforms(SGD):
        def step(self, closure=None, *, transform=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.grad = transform(parameter.grad)
            super().step(closure)

    layer = diagonal()
    optimizer = Transforms(layer.parameters(), lr=RATE)
    attached(layer, optimizer)
    zero_gradients(layer, optimizer)()
    optimizer.step(transform=lambda gradient: 2 * gradient)
    assert sigma(layer) == SIGMA - 2 * RATE * STRENGTH * SIGMA


def test_a_product_is_acted_on_at_the_steps_of_the_optimizer_that_holds_all_its_factors():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
    optimizers = [SGD(attention.parameters(), lr=RATE), SGD([attention.k_proj_weight], lr=RATE)]
    SpectralNormRegularizer(named_products(attention, "logits"), STRENGTH).attach(*optimizers)
    for parameter in attention.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = attention.q_proj_weight.detach().clone()
    for optimizer in reversed(optimizers):
        optimizer.step()
        assert torch.equal(before, attention.q_proj_weight) == (optimizer is optimizers[1])


def test_a_decoupled_penalty_without_a_learning_rate_is_refused_where_it_is_attached():
    layer = diagonal()
    optimizer = SGD(layer.parameters(), lr=RATE)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="without 'lr', or with None"):
        attached(layer, optimizer, decoupled=True)


class TwoEvaluations(SGD):
    """Sharpness-aware: the gradient that counts is that of the second evaluation, at a point near by."""

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        kicks = [(p, 0.01 * p.grad / (p.grad.norm() + 1e-12)) for group in self.param_groups for p in group["params"]]
        for p, kick in kicks:
            p.add_(kick)
        torch.enable_grad()(closure)()
        for p, kick in kicks:
            p.sub_(kick)
        super().step()
        return loss


@pytest.mark.parametrize("settings", [{}, {"every": 2}, {"every": 4}, {"decoupled": True}, {"steps": 0.5}], ids=repr)
def test_a_step_that_evaluates_the_loss_twice_is_one_step(settings):
    layer, steps = diagonal(), []
    optimizer = TwoEvaluations(layer.parameters(), lr=RATE)
    SpectralNormRegularizer(layer, lambda step: steps.append(step) or STRENGTH / 10, **settings).attach(optimizer)
    for _ in range(4):
        optimizer.step(zero_gradients(layer, optimizer))
    every = settings.get("every", 1)
    assert sigma(layer) == pytest.approx(SIGMA * (1 - every * RATE * STRENGTH / 10) ** (4 // every), rel=1e-3)
    assert set(steps) == {0, 1, 2, 3}


COMPILED = """
import torch
from spectreg import SpectralNormRegularizer

class Own(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)

def after_six_steps(compiled, settings):
    torch.compiler.reset()
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    optimizer = Own(layer.parameters(), lr=0.1)
    SpectralNormRegularizer(layer, 0.1, **settings).attach(optimizer).sigma()
    step = torch.compile(lambda: optimizer.step(), backend="eager") if compiled else optimizer.step
    for _ in range(6):
        layer.weight.grad = torch.zeros(2, 2)
        step()
    return layer.weight.detach()

for settings in ({}, {"every": 2}, {"decoupled": True}):
    torch.testing.assert_close(after_six_steps(True, settings), after_six_steps(False, settings))
"""


def test_a_compiled_step_of_a_subclass_acts_as_often_as_one_that_is_not():
    # In a process of its own: torch.compile cannot see through the type checks that these tests add.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_penalty_of_an_attached_regularizer_is_a_value_and_no_second_term_of_the_loss():
    layer = diagonal()
    optimizer = SGD(layer.parameters(), lr=RATE)
    regularizer = SpectralNormRegularizer(layer, STRENGTH, every=2).attach(optimizer)
    with pytest.raises(RuntimeError, match="attached, so the optimizer's step adds this gradient"):
        regularizer.penalty()
    with torch.no_grad():
        assert regularizer.penalty().item() == pytest.approx(STRENGTH * SIGMA**2 / 2)


def test_a_weight_that_is_listed_twice_is_refused():
    layer = diagonal()
    model = nn.ModuleDict({"features": nn.Sequential(layer)})
    twice = [*named_weights(model), *named_weights(model["features"])]
    with pytest.raises(ValueError, match="are one parameter, which would be acted on twice"):
        SpectralNormRegularizer(twice, STRENGTH).add_gradient()


def test_groups_say_the_strengths_of_all_their_weights_or_it_is_refused():
    computed = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"'1\.weight' is under a parametrization"):
        from_groups(computed, SGD([{"params": computed.parameters(), "spectral_strength": 0.1}], lr=RATE))
    plain = [computed[0].weight, computed[1].bias]
    groups = [{"params": plain, "spectral_strength": 0.1}, {"params": list(computed[1].parametrizations.parameters())}]
    assert [w.name for w in from_groups(computed, SGD(groups, lr=RATE)).weights] == ["0.weight"]
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = SGD([{"params": one.parameters(), "spectral_strength": 0.1}], lr=RATE)
    model = nn.Sequential(one, other)
    regularizer = from_groups(model, optimizer)
    optimizer.step()
    optimizer.add_param_group({"params": list(other.parameters()), "spectral_strength": 0.2})
    with pytest.raises(RuntimeError, match="2 parameters came to groups"):
        optimizer.step()
    regularizer.detach()
    regularizer = from_groups(model, optimizer)
    optimizer.step()
    assert regularizer.strength == {"0.weight": 0.1, "1.weight": 0.2}


class TakesScaler(SGD):
    """A step in the older way of fused optimizers: the scaler is an argument."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        return super().step(closure)


@pytest.mark.filterwarnings("ignore:.*grad_scaler:FutureWarning")
def test_a_step_that_gets_the_scaler_as_an_argument_is_refused_and_without_one_acts():
    layer = diagonal()
    optimizer = TakesScaler(layer.parameters(), lr=RATE)
    attached(layer, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert sigma(layer) == ONCE
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(0 * layer(torch.ones(2, 4)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"hands itself to TakesScaler, .* add penalty\(\) to the loss"):
        scaler.step(optimizer)
    assert sigma(layer) == ONCE
