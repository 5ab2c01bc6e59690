import pytest
import torch
from cases import KINDS, seeded
from torch import nn
from truth import svd_penalty_gradient

from spectreg import SpectralNormRegularizer


def only(name):
    return lambda candidate, _: candidate == name


def gradient_of(module, weight):
    return module.get_parameter(weight).grad


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_gradient_equals_that_of_a_full_svd_once_the_vectors_have_converged(kind):
    module = seeded(kind.build)
    W = module.get_parameter(kind.weight)
    sigma, expected = svd_penalty_gradient(W, kind.matrices, kind.each)
    regularizer = SpectralNormRegularizer(module, 0.5, select=only(kind.weight), warmup=100, **kind.settings)
    regularizer.add_gradient()
    torch.testing.assert_close(W.grad, 0.5 * expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(regularizer.sigma()[kind.weight], sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("steps", [0.5, 1, 1.5])
def test_the_penalty_and_add_gradient_give_the_same_gradient_from_the_same_vectors(kind, steps):
    added, differentiated = seeded(kind.build), seeded(kind.build)
    a = SpectralNormRegularizer(added, 0.3, select=only(kind.weight), steps=steps, warmup=1, **kind.settings)
    b = SpectralNormRegularizer(differentiated, 0.3, select=only(kind.weight), steps=steps, warmup=1, **kind.settings)
    for _ in range(3):
        added.zero_grad()
        differentiated.zero_grad()
        a.add_gradient()
        b.penalty().backward()
        torch.testing.assert_close(gradient_of(added, kind.weight), gradient_of(differentiated, kind.weight))


def test_a_step_changes_the_gradient_and_nothing_else():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    SpectralNormRegularizer(model, 0.1).add_gradient()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"0.weight", "2.weight"}


def test_what_an_attached_regularizer_adds_is_not_added_twice_by_hand():
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    regularizer = SpectralNormRegularizer(model, 0.1).attach(optimizer)
    with pytest.raises(
        RuntimeError, match=r"attached, so the optimizer's step adds this gradient: .* detach\(\) first"
    ):
        regularizer.add_gradient()
    regularizer.detach()
    regularizer.add_gradient()
    assert model.weight.grad is not None
