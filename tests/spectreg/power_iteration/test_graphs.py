"""What a CUDA graph does to a step, on a CPU: its calls are recorded once and repeated, whatever Python would do."""

import copy

import pytest
import torch
from cases import mlp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectreg import SpectralNormRegularizer


class Recorded(TorchDispatchMode):
    """Every call with its tensors; ``replay`` makes them again, into the very tensors that they made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, made in self.calls:
            out = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(out), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("form", ["added", "decoupled"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 0.5},
        {"steps": 1.5},
        {"every": 3},
        {"every": 2, "steps": 0.5},
        {"tracked": 3},
        {"k": 2, "steps": 0.5},
    ],
    ids=str,
)
def test_a_recorded_step_that_is_repeated_trains_as_the_steps_themselves_do(settings, form, monkeypatch):
    plain = mlp()
    repeated = copy.deepcopy(plain)
    pairs = []
    for model in (plain, repeated):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = SpectralNormRegularizer(model, 0.3, decoupled=form == "decoupled", **settings).attach(optimizer)
        optimizer.step()
        pairs.append((model, optimizer, regularizer))

    def step(model, optimizer):
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()

    monkeypatch.setattr("spectreg.power_iteration.state.is_capturing", lambda device: True)
    with Recorded() as recorded:
        step(*pairs[1][:2])
    monkeypatch.undo()
    step(*pairs[0][:2])
    for i in range(7):
        strength = 0.3 + 0.1 * i
        pairs[0][2].strength = pairs[1][2].strength = strength
        step(*pairs[0][:2])
        recorded.replay()
        for p, q in zip(plain.parameters(), repeated.parameters(), strict=True):
            torch.testing.assert_close(q, p)
    for _ in range(3):  # and steps outside of the graph go on from there
        for model, optimizer, _ in pairs:
            step(model, optimizer)
        for p, q in zip(plain.parameters(), repeated.parameters(), strict=True):
            torch.testing.assert_close(q, p)
    states = [r.state_dict()["vectors"]["0.weight"] for _, _, r in pairs]
    if {"every", "steps"} & set(settings):
        assert states[0]["calls"] == states[1]["calls"] == 12


class Kernels(TorchDispatchMode):
    """Counts calls that compute; those that make a view do not."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def calls(layers: int, **settings: object) -> int:
    model = mlp(widths=(5,) * (layers + 1), dtype=torch.float32)
    regularizer = SpectralNormRegularizer(model, 0.1, **settings)
    regularizer.add_gradient()
    with Kernels() as kernels:
        regularizer.add_gradient()
    return kernels.count


def test_a_step_takes_three_calls_a_weight_and_a_number_that_does_not_depend_on_the_weights():
    few, many = calls(2), calls(12)
    assert many - few == 3 * 10
    assert few - 3 * 2 <= 28
