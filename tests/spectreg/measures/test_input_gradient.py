import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from spectreg.measures.input_gradient import input_gradient_norm


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)).double()


def examples(n: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def true_norms(model, x, y):
    model = copy.deepcopy(model).eval()
    jacobians = torch.stack([torch.func.jacrev(lambda z: model(z[None])[0])(xi) for xi in x])
    errors = model(x).softmax(1) - F.one_hot(y, 3)
    return torch.einsum("bo,boi->bi", errors, jacobians).norm(dim=1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_mean_length_of_the_closed_form_gradient_whatever_the_reduction(reduction):
    model, (x, y) = network(), examples()
    truth = true_norms(model, x, y)
    measured = input_gradient_norm(model, lambda o, t: F.cross_entropy(o, t, reduction=reduction), [(x, y)])
    assert measured.value == pytest.approx(truth.mean().item(), rel=1e-12)
    assert measured.standard_error == pytest.approx((truth.std() / 7**0.5).item(), rel=1e-12)
    assert measured.examples == 7


@given(cuts=st.lists(st.integers(0, 7), max_size=4))
@settings(max_examples=20, deadline=None)
def test_the_way_the_examples_are_batched_does_not_matter(cuts):
    model, (x, y) = network(), examples()
    whole = input_gradient_norm(model, F.cross_entropy, [(x, y)])
    split = list(zip(x.tensor_split(sorted(cuts)), y.tensor_split(sorted(cuts)), strict=True))
    measured = input_gradient_norm(model, F.cross_entropy, split)
    assert measured.value == pytest.approx(whole.value, rel=1e-12)
    assert measured.examples == 7


def test_the_standard_error_of_a_single_example_is_not_a_number():
    measured = input_gradient_norm(network(), F.cross_entropy, [examples(1)])
    assert measured.standard_error != measured.standard_error


@pytest.mark.parametrize(
    ("batches", "loss_fn", "message"),
    [
        ([], F.cross_entropy, "batches is empty"),
        ([examples(0)], F.cross_entropy, "batches is empty"),
        ([torch.zeros(2, 5)], F.cross_entropy, r"gave Tensor: each batch must be a pair \(inputs, targets\)"),
        ([examples()], lambda o, y: o, r"shape \(\d+, 3\): it must be a scalar"),
        ([examples()], lambda o, y: o.argmax().double(), "does not depend on x"),
        ([(torch.ones(2, 5, dtype=torch.int64), torch.zeros(2))], F.cross_entropy, "x has dtype torch.int64"),
    ],
)
def test_a_wrong_argument_is_named(batches, loss_fn, message):
    with pytest.raises(ValueError, match=message):
        input_gradient_norm(network(), loss_fn, batches)
