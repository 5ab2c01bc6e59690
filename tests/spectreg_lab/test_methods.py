import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from spectreg_lab import methods
from spectreg_lab.settings.config import Adversarial, Decay, Jacobian, LayerwiseJacobian, Spectral, Vanilla


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()


@pytest.fixture
def batch():
    draws = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 4, 4, generator=draws, dtype=torch.float64), torch.randint(4, (6,), generator=draws)


def test_vanilla_is_the_cross_entropy_and_nothing_else(tiny, network, batch):
    method = methods.build(tiny(Vanilla()), network)
    x, y = batch
    assert torch.equal(method.loss(x, y), cross_entropy(network(x), y))
    method.loss(x, y).backward()
    before = [p.grad.clone() for p in network.parameters()]
    method.after_backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, network.parameters(), strict=True))


def test_decay_and_spectral_act_on_the_same_weights_and_on_no_bias_or_scale(tiny, network, batch):
    decayed = methods.build(tiny(Decay(strength=0.5)), network).parameter_groups()[0]
    assert decayed["weight_decay"] == 0.5
    assert [id(p) for p in decayed["params"]] == [id(network[0].weight), id(network[4].weight)]
    method = methods.build(tiny(Spectral(strength=0.5)), network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.after_backward()
    moved = [name for name, p in network.named_parameters() if p.grad.abs().sum() > 0]
    assert moved == ["0.weight", "4.weight"]


def test_the_seed_of_a_run_draws_the_first_vectors_of_spectral(tiny, network):
    def first_vectors(seed):
        return methods.build(tiny(Spectral(), seed=seed), network).state()["0.weight/v"]

    assert torch.equal(first_vectors(1), first_vectors(1))
    assert not torch.equal(first_vectors(1), first_vectors(2))


def test_every_parameter_is_given_to_the_optimizer_once(tiny, network):
    for setting in (Vanilla(), Decay(), Adversarial(), Spectral()):
        groups = methods.build(tiny(setting), network).parameter_groups()
        given = [id(p) for group in groups for p in group["params"]]
        assert sorted(given) == sorted(id(p) for p in network.parameters())


def test_spectral_adds_the_svd_gradient_once_its_vectors_have_converged(tiny, network):
    method = methods.build(tiny(Spectral(strength=0.01)), network)
    for _ in range(300):
        network[4].weight.grad = torch.zeros_like(network[4].weight)
        method.after_backward()
    u, s, vh = torch.linalg.svd(network[4].weight.detach())
    expected = 0.01 * s[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(network[4].weight.grad, expected, rtol=1e-8, atol=1e-12)


def test_adversarial_weighs_the_two_losses_as_eq_3_says(tiny, network, batch):
    network.eval()
    x, y = batch
    method = methods.build(tiny(Adversarial(epsilon=0.7, alpha=0.3)), network)
    moved = x.clone()
    for i in range(len(x)):
        one = x[i : i + 1].clone().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(network(one), y[i : i + 1]), one)
        moved[i] += 0.7 * g[0] / g.norm()
    expected = 0.3 * cross_entropy(network(x), y) + 0.7 * cross_entropy(network(moved), y)
    torch.testing.assert_close(method.loss(x, y), expected)


def test_the_state_of_spectral_survives_a_round_trip_through_tensors(tiny, network):
    one, other = (methods.build(tiny(Spectral(), seed=seed), network) for seed in (0, 1))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    one.after_backward()
    assert any(not torch.equal(one.state()[key], other.state()[key]) for key in one.state())
    other.load_state(one.state())
    assert all(torch.equal(one.state()[key], other.state()[key]) for key in one.state())


def test_jacobian_adds_the_squared_norm_of_the_dense_jacobian(tiny, network, batch):
    network.eval()
    x, y = batch
    method = methods.build(tiny(Jacobian(strength=0.3, projections=None)), network)
    J = torch.func.vmap(torch.func.jacrev(lambda one: network(one[None])[0]))(x)
    expected = cross_entropy(network(x), y) + 0.3 * J.square().sum() / len(x)
    torch.testing.assert_close(method.loss(x, y), expected)


def test_layerwise_jacobian_takes_every_convolution_and_linear_layer_by_itself(tiny, batch):
    x, y = batch
    first = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten())
    network = nn.Sequential(first, nn.Linear(8, 4, bias=False)).double()
    method = methods.build(tiny(LayerwiseJacobian(strength=0.3, projections=None)), network)
    kernel = 4 * first[0].weight.square().sum()  # each of the 2×2 outputs a channel sees the whole kernel
    expected = cross_entropy(network(x), y) + 0.3 * (kernel + network[1].weight.square().sum())
    torch.testing.assert_close(method.loss(x, y), expected)
