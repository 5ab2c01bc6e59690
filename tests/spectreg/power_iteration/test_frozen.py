"""Frozen weights: left out of steps, logs and states, and taken up at the thaw as if they had just come."""

import copy

import pytest
import torch
from cases import mlp

from spectreg import SpectralNormRegularizer

FROZEN = ("0.weight", "4.weight")


def half_frozen():
    model = mlp()
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    return model


def steps(regularizer, model, count):
    """Plain descent on the penalty alone."""
    for _ in range(count):
        model.zero_grad()
        regularizer.add_gradient()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


def test_frozen_weights_are_neither_logged_nor_saved():
    regularizer = SpectralNormRegularizer(half_frozen(), 0.1)
    regularizer.add_gradient()
    for numbers in (regularizer.sigma(), regularizer.residual(), regularizer.stable_rank()):
        assert list(numbers) == ["2.weight"]
    state = regularizer.state_dict()
    assert list(state["vectors"]) == ["2.weight"]
    assert state["frozen"] == list(FROZEN)
    assert regularizer.summary().count("frozen") == 3 * len(FROZEN)


def test_frozen_weights_are_not_warmed_up():
    regularizer = SpectralNormRegularizer(half_frozen(), 0.1)
    products = []
    for w in regularizer.weights:
        object.__setattr__(w, "map", Counting(w.map, products, w.name))
    regularizer.add_gradient()
    regularizer.sigma()
    assert set(products) == {"2.weight"}


class Counting:
    """A map that notes whose products are taken."""

    def __init__(self, inner, products, name):
        self.inner, self.products, self.name = inner, products, name
        for attribute in dir(inner):  # set, since protocols look attributes up without calling __getattr__
            if not attribute.startswith("_") and attribute not in dir(self):
                setattr(self, attribute, getattr(inner, attribute))

    def forward(self, *given):
        self.products.append(self.name)
        return self.inner.forward(*given)

    def adjoint(self, *given):
        self.products.append(self.name)
        return self.inner.adjoint(*given)

    def round_trip(self, *given):
        self.products.append(self.name)
        return self.inner.round_trip(*given)


def test_a_weight_that_thaws_is_warmed_up_then_and_follows_its_own_top_pair():
    model = half_frozen()
    regularizer = SpectralNormRegularizer(model, 0.1, warmup=100)
    steps(regularizer, model, 2)
    model.requires_grad_(True)
    sigma = regularizer.sigma()
    assert set(sigma) == {*FROZEN, "2.weight"}
    for name in FROZEN:
        exact = torch.linalg.matrix_norm(model.get_parameter(name).detach(), 2)
        torch.testing.assert_close(sigma[name], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("thawed_first", [False, True])
def test_a_training_resumed_before_the_thaw_ends_as_one_that_was_not_interrupted(thawed_first):
    model = half_frozen()
    regularizer = SpectralNormRegularizer(model, 0.1, seed=3)
    steps(regularizer, model, 2)
    saved = copy.deepcopy((model.state_dict(), regularizer.state_dict()))
    model.requires_grad_(True)
    steps(regularizer, model, 2)

    again = half_frozen()
    again.load_state_dict(saved[0])
    resumed = SpectralNormRegularizer(again, 0.1, seed=3)
    resumed.sigma()
    if thawed_first:
        again.requires_grad_(True)
        resumed.sigma()
    resumed.load_state_dict(saved[1])
    again.requires_grad_(True)
    steps(resumed, again, 2)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_copy_made_before_the_thaw_goes_on_alike_after_it():
    model = half_frozen()
    regularizer = SpectralNormRegularizer(model, 0.1, seed=3)
    steps(regularizer, model, 2)
    twin, copied = copy.deepcopy((model, regularizer))
    for m, r in ((model, regularizer), (twin, copied)):
        m.requires_grad_(True)
        steps(r, m, 2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_weight_frozen_in_between_keeps_its_vectors_in_the_state():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, 0.1)
    regularizer.add_gradient()
    model[0].requires_grad_(False)
    regularizer.add_gradient()
    assert "0.weight" not in regularizer.sigma()
    assert regularizer.state_dict()["vectors"]["0.weight"]["calls"] == 1


def test_a_state_that_lacks_a_weight_it_does_not_call_frozen_is_refused():
    state = SpectralNormRegularizer(half_frozen(), 0.1).state_dict()
    del state["frozen"]
    with pytest.raises(ValueError, match=r"missing \['0.weight', '4.weight'\]"):
        SpectralNormRegularizer(half_frozen(), 0.1).load_state_dict(state)
