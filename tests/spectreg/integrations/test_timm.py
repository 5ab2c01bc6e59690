"""The loop of timm: its models, optimizers, scaler, clipping, averages and schedules, with torchvision left out."""

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from spectreg import SpectralNormRegularizer

pytestmark = pytest.mark.slow


class Named(type):
    """A class whose attributes are their own names, as the members of an enumeration."""

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class StandIn(types.ModuleType):
    """A module that has a class for every name: timm imports transforms and datasets that nothing here calls."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})


class InPlaceOfTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm():
    """The package itself; its torchvision, whose wheels bind to one build of torch, is a stand-in while it loads."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    finder = InPlaceOfTorchvision()
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, finder)
    import timm.optim
    import timm.scheduler
    import timm.utils

    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    return timm


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


CHOSEN = ("blocks.0.mlp.fc1.weight", "blocks.0.attn.proj.weight", "patch_embed.proj.weight")


def network(timm):
    """In the chosen weights one singular value stands clear of the others."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=3).double()
    with torch.no_grad():
        for name in CHOSEN:
            model.get_parameter(name).add_(0.1)
    return model


def loss_of(model):
    return nn.functional.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0]))


def add_svd_gradients(model, strength):
    for name in CHOSEN:
        W = model.get_parameter(name)
        U, s, Vh = torch.linalg.svd(W.detach().flatten(1), full_matrices=False)
        W.grad += (strength * s[0] * torch.outer(U[:, 0], Vh[0])).view_as(W)


@pytest.mark.parametrize("kind", ["adamw", "lookahead_adamw", "lamb", "sgd"])
def test_the_loop_of_timm_with_scaler_clipping_averages_and_schedule_gets_the_gradient_of_the_penalty(timm, kind):
    strength = 0.01

    def parts():
        model = network(timm)
        optimizer = timm.optim.create_optimizer_v2(model, opt=kind, lr=1e-3, weight_decay=0.05)
        schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=4, warmup_t=2, warmup_lr_init=1e-4)
        return model, optimizer, schedule, timm.utils.ModelEmaV3(model, decay=0.9)

    model, optimizer, schedule, average = parts()
    scaler = timm.utils.NativeScaler(device="cpu")
    SpectralNormRegularizer(
        model, strength, select=lambda name, _: name in CHOSEN, warmup=60, steps=15
    ).attach(optimizer)  # fmt: skip
    by_hand, theirs, their_schedule, their_average = parts()
    for step in range(4):
        optimizer.zero_grad()
        scaler(loss_of(model), optimizer, clip_grad=0.1, parameters=model.parameters())
        theirs.zero_grad()
        loss_of(by_hand).backward()
        timm.utils.dispatch_clip_grad(by_hand.parameters(), 0.1)
        add_svd_gradients(by_hand, strength)
        theirs.step()
        for ema, net, rates in ((average, model, schedule), (their_average, by_hand, their_schedule)):
            ema.update(net)
            rates.step_update(step)
            rates.step(step)
    for a, b in ((model, by_hand), (average.module, their_average.module)):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_every_optimizer_of_timm_acts_once_a_step_or_is_refused(timm):
    refused, acted = [], []
    kinds = timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*"])
    for kind in {timm.optim.get_optimizer_class(kind, bind_defaults=False): kind for kind in kinds}.values():
        layer = nn.Linear(4, 4, bias=False)
        try:
            optimizer = timm.optim.create_optimizer_v2(layer, opt=kind, lr=1e-3)
        except (ImportError, RuntimeError):  # what it asks for is not installed
            continue
        regularizer = SpectralNormRegularizer(layer, 0.1)
        try:
            regularizer.attach(optimizer)
        except ValueError:
            refused.append(kind)
            continue
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().mean().backward(create_graph=kind == "adahessian")
            optimizer.step()
        assert {saved["calls"] for saved in regularizer.state_dict()["vectors"].values()} == {2}, kind
        acted.append(kind)
    assert len(acted) > 25
    assert refused == []


def test_a_model_of_timm_and_its_copy_for_averages_are_followed_by_a_strength_of_zero(timm):
    model = network(timm)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3)
    plain = copy.deepcopy(model)
    theirs = timm.optim.create_optimizer_v2(plain, opt="adamw", lr=1e-3)
    regularizer = SpectralNormRegularizer(model, 0).attach(optimizer)
    for net, steps in ((model, optimizer), (plain, theirs)):
        for _ in range(2):
            steps.zero_grad()
            loss_of(net).backward()
            steps.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    assert {f"sigma/{w.name}" for w in regularizer.weights} <= set(regularizer.log())
