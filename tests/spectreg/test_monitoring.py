"""A regularizer of strength 0 watches: it follows every norm, changes nothing, and is read in one transfer."""

import copy
import math

import pytest
import torch
from cases import KINDS, mlp, seeded
from ranks import on_ranks
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spectreg import SpectralNormRegularizer
from spectreg.alarms import Alarm, alarms
from spectreg.regularizer import log_of

QUANTITIES = ("sigma", "residual", "stable_rank")


def batch():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Noisy(nn.Module):
    """Draws from the global generator, has buffers, and a weight without a gradient."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.norm, self.drop = nn.BatchNorm1d(5).double(), nn.Dropout(0.5)
        self.unused = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.net(self.drop(self.norm(x)))


FORMS = {
    "added": lambda regularizer, optimizer: regularizer.add_gradient,
    "attached": lambda regularizer, optimizer: [regularizer.attach(optimizer), lambda: None][1],
    "in the loss": lambda regularizer, optimizer: regularizer.penalty,
}


SETTINGS = [
    {}, {"every": 2}, {"steps": 0.5}, {"tracked": 3}, {"penalty": torch.log}, {"decoupled": True},
    {"map": {"net.0.*": 4}}, {"strength": lambda step: 0},
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "settings"),
    [(form, x) for form in FORMS for x in SETTINGS if form == "attached" or "decoupled" not in x],
    ids=lambda x: x if isinstance(x, str) else "".join(x),
)
def test_training_is_bitwise_the_same_with_and_without_a_strength_of_zero(form, settings):
    def trained(watch):
        torch.manual_seed(0)
        model = Noisy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        before = lambda: None  # noqa: E731
        if watch:
            regularizer = SpectralNormRegularizer(model, **{"strength": 0} | settings)
            before = FORMS[form](regularizer, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(batch()).square().mean()
            if watch and form == "in the loss":
                loss = loss + before()
            loss.backward()
            if form == "added":
                before()
            optimizer.step()
            if watch:
                regularizer.log()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        return model.state_dict(), gradients, optimizer.state_dict()["state"], torch.get_rng_state()

    plain, watched = trained(False), trained(True)
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    assert watched[1]["unused.weight"] is None


def test_where_a_pattern_gives_zero_the_weight_is_followed_and_its_gradient_stays_none():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, {"0.*": 0.5, "2.*": 0}, warmup=200)
    regularizer.add_gradient()
    U, s, Vh = torch.linalg.svd(model[0].weight.detach())
    torch.testing.assert_close(model[0].weight.grad, 0.5 * s[0] * torch.outer(U[:, 0], Vh[0]))
    assert model[2].weight.grad is None
    assert model[4].weight.grad is None
    assert len(regularizer.sigma()) == 3
    regularizer.strength = {"0.*": 0, "2.*": 0.5}
    model.zero_grad()
    regularizer.add_gradient()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    with torch.no_grad():
        assert regularizer.penalty() == pytest.approx(
            0.25 * torch.linalg.svdvals(model[2].weight.detach())[0].item() ** 2
        )


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_numbers_of_a_log_are_those_of_full_decompositions(kind):
    module = seeded(kind.build)
    settings = {"select": lambda name, _: name == kind.weight} | kind.settings
    regularizer = SpectralNormRegularizer(module, 0, warmup=150, **settings)
    numbers = regularizer.log()
    matrices = kind.matrices(module.get_parameter(kind.weight).detach())
    tops = torch.stack([torch.linalg.svdvals(matrix)[0] for matrix in matrices])
    squares = torch.stack([matrix.square().sum() for matrix in matrices])
    rank = squares.sum() / tops.max() ** 2 if not kind.each and len(matrices) > 1 else (squares / tops**2).min()
    assert list(numbers) == [f"{quantity}/{kind.weight}" for quantity in QUANTITIES]
    sigma, residual, stable_rank = numbers.values()
    assert sigma == pytest.approx(tops.max().item(), rel=1e-6)
    assert residual <= 1e-3 * sigma
    assert stable_rank == pytest.approx(rank.item(), rel=1e-6)
    assert all(type(x) is float for x in numbers.values())


class Transfers(TorchFunctionMode):
    """Counts the calls that hand values of tensors to the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"):
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Counts the numbers read from tensors one by one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"tracked": 2}, {"every": 3}], ids=str)
def test_a_log_of_all_weights_is_one_transfer_and_a_step_none(settings):
    model = mlp()
    regularizer = SpectralNormRegularizer(model, 0, **settings)
    regularizer.sigma()
    with Reads() as reads, Transfers() as transfers:
        regularizer.add_gradient()
        regularizer.add_gradient()
    assert (reads.count, transfers.calls) == (0, [])
    with Reads() as reads, Transfers() as transfers:
        numbers = regularizer.log()
    assert transfers.calls == ["tolist"]
    assert reads.count == 0
    apart = zip(QUANTITIES, (regularizer.sigma(), regularizer.residual(), regularizer.stable_rank()), strict=True)
    assert numbers == {f"{quantity}/{name}": x.item() for quantity, each in apart for name, x in each.items()}


def test_the_logs_of_two_regularizers_are_one_transfer_and_each_as_by_itself():
    first, second = mlp(), mlp(seed=1)
    ours = [SpectralNormRegularizer(first, {"0.*": 0.1}, select=lambda name, _: name != "4.weight"),
            SpectralNormRegularizer(second, 0, select=lambda name, _: name == "4.weight", tracked=2)]  # fmt: skip
    with Transfers() as transfers:
        both = log_of(*ours)
    assert transfers.calls == ["tolist"]
    assert both == ours[0].log() | ours[1].log()


def test_a_log_after_a_resume_is_that_of_a_training_that_was_not_interrupted():
    def steps(model, regularizer, optimizer, count):
        for _ in range(count):
            model.zero_grad()
            model(batch()).square().mean().backward()
            regularizer.add_gradient()
            optimizer.step()

    def started():
        model = mlp()
        return model, SpectralNormRegularizer(model, 0, every=2, steps=0.5), torch.optim.SGD(model.parameters(), lr=0.1)

    whole = started()
    steps(*whole, 5)
    saved = copy.deepcopy((whole[0].state_dict(), whole[1].state_dict()))
    steps(*whole, 4)
    again = started()
    again[0].load_state_dict(saved[0])
    again[1].load_state_dict(saved[1])
    steps(*again, 4)
    assert again[1].log() == whole[1].log()


def test_weights_in_bfloat16_are_followed_in_float32_and_frozen_ones_left_out():
    model = mlp(dtype=torch.bfloat16)
    model[2].weight.requires_grad_(False)
    numbers = SpectralNormRegularizer(model, 0, warmup=200).log()
    assert not any("2.weight" in name for name in numbers)
    for name in ("0.weight", "4.weight"):
        W = model.get_parameter(name).detach().double()
        top = torch.linalg.svdvals(W)[0]
        assert numbers[f"sigma/{name}"] == pytest.approx(top.item(), rel=1e-5)
        assert numbers[f"stable_rank/{name}"] == pytest.approx((W.square().sum() / top**2).item(), rel=1e-5)


def test_computed_weights_may_be_followed_and_not_acted_on():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = SpectralNormRegularizer(model, 0, warmup=200)
    regularizer.add_gradient()
    assert all(p.grad is None for p in model.parameters())
    truth = torch.linalg.svdvals(model[0].weight.detach())[0].item()
    assert regularizer.log()["sigma/0.weight"] == pytest.approx(truth)
    regularizer.strength = 0.1
    with pytest.raises(ValueError, match=r"weight '0\.weight' is under a parametrization"):
        regularizer.add_gradient()
    assert optimizer.state_dict()["state"] == {}


def test_a_tensor_that_is_not_finite_a_norm_that_doubled_and_vectors_that_lag_are_alarms():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, 0, warmup=200)
    first = regularizer.log()
    assert alarms(first, since=first) == []
    with torch.no_grad():
        model[0].weight.mul_(3)
        U, s, Vh = torch.linalg.svd(model[2].weight)
        model[2].weight.add_(5 * s[0] * torch.outer(U[:, 0], Vh[1]))
        model[4].weight[0, 0] = torch.nan
    lagging = {a.weight: a for a in alarms(regularizer.log(), since=first)}
    assert list(lagging) == ["2.weight", "4.weight"]
    assert lagging["2.weight"].quantity == "residual"
    assert lagging["2.weight"].value > 1
    regularizer.load_state_dict(SpectralNormRegularizer(model, 0).state_dict())
    raised = {(a.weight, a.quantity): a for a in alarms(regularizer.log(), since=first)}
    assert raised["0.weight", "growth"].value == pytest.approx(3.0, rel=1e-2)
    assert raised["0.weight", "growth"].limit == 2.0
    assert not math.isfinite(raised["4.weight", "sigma"].value)
    assert ("0.weight", "sigma") not in raised


def test_a_weight_that_began_at_zero_or_is_new_has_not_grown_and_limits_are_the_callers():
    zero = {"sigma/a": 0.0, "residual/a": 0.0}
    now = {"sigma/a": 5.0, "residual/a": 0.4, "sigma/b": 1.0, "residual/b": 0.0}
    assert alarms(now, since=zero) == []
    assert alarms(zero, since=now) == []
    assert alarms(now, residual=0.05) == [Alarm("a", "residual", pytest.approx(0.08), 0.05)]
    assert alarms(now | {"sigma/a": 12.0}, since=now, growth=3) == []


@pytest.mark.parametrize(("arguments", "message"), [
    ({"growth": -1}, "growth is -1: it must be a number from 0"),
    ({"residual": float("nan")}, "residual is nan: it must be a number from 0"),
    ({"since": {"loss": 1.0}}, r"since must be what log\(\) of a regularizer returned"),
])  # fmt: skip
def test_limits_that_are_none_and_logs_of_something_else_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        alarms({"sigma/a": 1.0, "residual/a": 0.0}, **arguments)


class StepsOtherwise(torch.optim.SGD):
    """Moves its weights in a method of its own, as optimizers do that update in the backward pass."""

    @torch.no_grad()
    def fused_backward(self, loss):
        loss.backward()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.01)


def test_a_log_warns_of_weights_that_an_attached_optimizer_moves_without_a_step():
    model = mlp()
    optimizer = StepsOtherwise(model.parameters(), lr=0.1)
    regularizer = SpectralNormRegularizer(model, 0.1).attach(optimizer)
    regularizer.log()
    optimizer.fused_backward(model(batch()).square().mean())
    with pytest.warns(UserWarning, match=r"weight '0\.weight' has moved .* add penalty\(\) to the loss"):
        regularizer.log()


def test_a_log_warns_where_another_optimizer_took_over_from_the_attached_one():
    model = mlp()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    regularizer = SpectralNormRegularizer(model, 0.1).attach(first)
    for optimizer in (first, second):
        model(batch()).square().mean().backward()
        optimizer.step()
        if optimizer is first:
            regularizer.log()
    with pytest.warns(UserWarning, match="another optimizer or a method of its own moves it"):
        regularizer.log()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("settings", [{}, {"every": 4}, {"decoupled": True}, {"strength": 0}, {"steps": 0.5}], ids=str)
def test_a_log_warns_of_nothing_while_the_attached_optimizer_steps(settings):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = SpectralNormRegularizer(model, **{"strength": 0.1} | settings).attach(optimizer)
    for _ in range(6):
        regularizer.log()
        regularizer.log()
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()


def on_one_of_two_ranks(by_hand):
    from torch.distributed.fsdp import fully_shard

    model, plain, whole = mlp(), mlp(), mlp()
    for sharded in (model, plain):
        fully_shard(sharded)
    regularizers = SpectralNormRegularizer(model, 0), SpectralNormRegularizer(whole, 0)
    optimizers = [torch.optim.AdamW(x.parameters(), lr=0.01) for x in (model, plain, whole)]
    if not by_hand:
        regularizers[0].attach(optimizers[0])
    for _ in range(3):
        for net, optimizer in zip((model, plain, whole), optimizers, strict=True):
            optimizer.zero_grad()
            net(batch()).square().mean().backward()
        regularizers[1].add_gradient()
        if by_hand:
            regularizers[0].add_gradient()
        for optimizer in optimizers:
            optimizer.step()
    with Transfers() as transfers:
        numbers = regularizers[0].log()
    assert transfers.calls == ["tolist"]
    assert numbers == pytest.approx(regularizers[1].log())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        assert torch.equal(p.grad.to_local(), q.grad.to_local())


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [True, False])
def test_sharded_training_is_bitwise_the_same_and_its_log_that_of_the_unsharded(by_hand):
    on_ranks(2, on_one_of_two_ranks, by_hand)


@pytest.mark.parametrize("decoupled", [False, True, "independent"])
def test_weights_that_the_attached_optimizer_does_not_hold_may_be_followed_and_not_acted_on(decoupled):
    model = mlp()
    first, second = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2:].parameters(), lr=0.1)
    regularizer = SpectralNormRegularizer(model, {"0.*": 0.1}, decoupled=decoupled).attach(first)
    plain = mlp()
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    for net, optimizers in ((model, (first, second)), (plain, (theirs,))):
        net(batch()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(model[2].weight, plain[2].weight)
    assert not torch.equal(model[0].weight, plain[0].weight)
    assert {saved["calls"] for saved in regularizer.state_dict()["vectors"].values()} == {1}
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0\.weight"):
        SpectralNormRegularizer(model, {"0.*": 0.1}).attach(second)
