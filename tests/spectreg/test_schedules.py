"""Strengths that depend on the step, and a decay that does not depend on the learning rate."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from cases import mlp, unchecked_types
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectreg import SpectralNormRegularizer
from spectreg.power_iteration import state
from spectreg.schedules import Decay, Warmup

RATE = 0.1


def assigned_by_hand(strengths: list[float], **settings) -> list[Tensor]:
    """The weights after a step with each of these strengths, assigned before it."""
    model = mlp()
    regularizer = SpectralNormRegularizer(model, strengths[0], **settings)
    for strength in strengths:
        regularizer.strength = strength
        step(model, regularizer)
    return list(model.parameters())


def step(model: nn.Module, regularizer: SpectralNormRegularizer) -> None:
    model.zero_grad()
    regularizer.add_gradient()
    torch.optim.SGD(model.parameters(), lr=RATE).step()


@pytest.mark.parametrize("settings", [{}, {"every": 2}, {"steps": 0.5}, {"k": 2}], ids=str)
def test_a_strength_that_is_a_function_of_the_step_equals_the_same_numbers_assigned_before_each_step(settings):
    model = mlp()
    regularizer = SpectralNormRegularizer(model, lambda step: 0.1 / (1 + step), **settings)
    for _ in range(5):
        step(model, regularizer)
    by_hand = assigned_by_hand([0.1 / (1 + i) for i in range(5)], **settings)
    for p, q in zip(model.parameters(), by_hand, strict=True):
        assert torch.equal(p, q)


def test_a_schedule_goes_on_from_a_saved_state_as_if_it_had_not_been_interrupted():
    schedule = Decay(Warmup(0.2, steps=3), steps=4, start=3)
    whole, cut = mlp(), mlp()
    regularizer, first = SpectralNormRegularizer(whole, schedule), SpectralNormRegularizer(cut, schedule)
    for _ in range(3):
        step(whole, regularizer)
        step(cut, first)
    second = SpectralNormRegularizer(cut, schedule)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(second.penalty(), first.penalty())
    third = pickle.loads(pickle.dumps(second))  # of the same model, by value
    second, cut = copy.deepcopy((second, cut))
    for _ in range(3):
        step(whole, regularizer)
        step(cut, second)
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(p, q)
    assert third.strength == schedule


def test_each_pattern_may_have_a_schedule_and_the_summary_shows_the_strength_of_the_last_step():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, {"0.*": lambda step: 1.0 + step, "*": 0.5}, every=2)
    for _ in range(4):
        regularizer.add_gradient()
    strengths = [line.split()[6 + 3] for line in regularizer.summary().splitlines()[1:]]
    assert strengths[0] == "4"
    assert set(strengths[1:]) == {"0.5"}


def test_the_penalty_as_a_term_of_the_loss_follows_the_schedule_and_keeps_its_value_in_validation():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, lambda step: float(step))
    assert regularizer.penalty() == 0
    trained = regularizer.penalty().detach()
    assert trained > 0
    with torch.no_grad():
        torch.testing.assert_close(regularizer.penalty(), trained)


def test_a_strength_that_falls_below_what_float32_holds_counts_as_zero_and_does_not_end_the_training():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, lambda step: 1e-30**step)
    regularizer.add_gradient()
    model.zero_grad()
    regularizer.add_gradient()
    regularizer.add_gradient()
    assert model[0].weight.grad.norm() < 1e-25


@pytest.mark.parametrize("bad", [
    lambda step: -1.0, lambda step: math.nan, lambda step: "much", lambda step: None, lambda step: True,
    lambda step: torch.ones(2), lambda step: torch.tensor(1j),
])  # fmt: skip
def test_a_function_that_gives_no_number_from_zero_is_refused_at_once(bad):
    message = r"strength of '0.weight' at step 0 is .*: it must be a finite number from 0"
    with unchecked_types(), pytest.raises(ValueError, match=message):
        SpectralNormRegularizer(mlp(), bad)


def test_a_function_that_gives_a_tensor_of_one_number_acts_as_one_that_gives_the_number():
    ours, plain = mlp(), mlp()
    for model, strength in ((ours, lambda step: torch.tensor(0.5)), (plain, 0.5)):
        SpectralNormRegularizer(model, strength).add_gradient()
    assert torch.equal(ours[0].weight.grad, plain[0].weight.grad)


def test_the_class_of_a_schedule_in_place_of_one_is_refused():
    with unchecked_types(), pytest.raises(ValueError, match="is the class Warmup: give one of it, such as Warmup"):
        SpectralNormRegularizer(mlp(), Warmup)


def test_a_function_that_goes_wrong_later_is_refused_by_weight_and_step_and_changes_no_gradient():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, lambda step: 1.0 - step)
    regularizer.add_gradient()
    regularizer.add_gradient()
    before = model[0].weight.grad.clone()
    with pytest.raises(ValueError, match=r"strength of '0.weight' at step 2 is -1.0"):
        regularizer.add_gradient()
    assert torch.equal(model[0].weight.grad, before)


def test_a_refused_assignment_leaves_the_strength_as_it_was():
    regularizer = SpectralNormRegularizer(mlp(), 0.1)
    with pytest.raises(ValueError, match="finite number from 0"):
        regularizer.strength = lambda step: -1.0
    assert regularizer.strength == 0.1


def test_a_schedule_is_refused_while_a_cuda_graph_is_captured_since_a_replay_would_not_call_it(monkeypatch):
    regularizer = SpectralNormRegularizer(mlp(), Warmup(0.1, 10))
    regularizer.add_gradient()
    monkeypatch.setattr(state, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"no replay of a CUDA graph would call: .* assign regularizer.strength"):
        regularizer.add_gradient()


@given(
    st.floats(0.01, 10), st.integers(1, 50), st.integers(0, 50), st.floats(0, 1), st.sampled_from(["cosine", "linear"])
)
def test_a_decay_falls_from_the_strength_to_its_final_share_and_is_flat_on_both_sides(
    strength, steps, start, final, shape
):
    decay = Decay(strength, steps, start, final, shape)
    values = [decay(step) for step in range(start + steps + 3)]
    assert values[: start + 1] == [strength] * (start + 1)
    assert values[start + steps :] == pytest.approx([strength * final] * 3)
    assert all(a >= b - 1e-12 for a, b in pairwise(values))
    middle = (values[start] + values[start + steps]) / 2
    assert decay(start + steps / 2) == pytest.approx(middle)  # both shapes are symmetric about it


@given(st.floats(0.01, 10), st.integers(1, 50))
def test_a_warmup_rises_by_equal_parts_and_is_whole_from_its_last_step_on(strength, steps):
    values = [Warmup(strength, steps)(step) for step in range(steps + 2)]
    assert values[:steps] == pytest.approx([strength * (i + 1) / steps for i in range(steps)])
    assert values[steps - 1 :] == pytest.approx([strength] * 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Warmup(0.1, 0), "steps is 0: it must be a whole number from 1"),
        (lambda: Warmup(0.1, 2.5), "steps is 2.5"),
        (lambda: Warmup("much", 2), "strength is 'much': it must be a finite number from 0, or a schedule"),
        (lambda: Warmup(-0.1, 2), "strength is -0.1"),
        (lambda: Decay(Warmup, 2), "strength is <class .*Warmup'>"),
        (lambda: Decay(math.nan, 2), "strength is nan"),
        (lambda: Decay(0.1, 10, start=-1), "start is -1: it must be a whole number from 0"),
        (lambda: Decay(0.1, 10, final=math.nan), "final is nan: it must be a finite number from 0"),
        (lambda: Decay(0.1, 10, shape="square"), "shape is 'square': it must be 'cosine' or 'linear'"),
    ],
)
def test_settings_of_a_schedule_that_are_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("lr", [0.0, 0.1, 10.0])
def test_an_independent_decay_moves_the_weights_by_the_strength_whatever_the_learning_rate(lr):
    plain, ours, gradients = mlp(), mlp(), mlp()
    optimizer = torch.optim.Adam(ours.parameters(), lr=lr)
    SpectralNormRegularizer(ours, 0.3, decoupled="independent").attach(optimizer)
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    SpectralNormRegularizer(gradients, 0.3).add_gradient()
    for i in (0, 2, 4):
        torch.testing.assert_close(ours[i].weight, plain[i].weight - gradients[i].weight.grad)
        torch.testing.assert_close(ours[i].bias, plain[i].bias)


def test_an_independent_decay_needs_no_learning_rate_in_the_groups_where_the_decoupled_one_does():
    class WithoutRate(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            pass

    model = mlp()
    before = torch.linalg.matrix_norm(model[0].weight.detach(), 2)
    optimizer = WithoutRate(model.parameters())
    with pytest.raises(ValueError, match=r"without 'lr', or with None: use decoupled='independent'"):
        SpectralNormRegularizer(model, 0.1, decoupled=True).attach(optimizer)
    SpectralNormRegularizer(model, 0.1, decoupled="independent").attach(optimizer)
    optimizer.step()
    assert torch.linalg.matrix_norm(model[0].weight.detach(), 2) < before


def test_a_word_for_decoupled_that_is_not_known_is_refused():
    message = "decoupled is 'adamw': it must be True, False or 'independent'"
    with unchecked_types(), pytest.raises(ValueError, match=message):
        SpectralNormRegularizer(mlp(), 0.1, decoupled="adamw")


def test_by_hand_an_independent_decay_is_refused_with_the_call_that_works():
    regularizer = SpectralNormRegularizer(mlp(), 0.1, decoupled="independent")
    for call in (regularizer.add_gradient, regularizer.penalty):
        with pytest.raises(RuntimeError, match=r"decoupled=independent .* use attach"):
            call()
