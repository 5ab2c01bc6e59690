import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectreg.baselines import adversarial_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, dtype=torch.float64, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def stepwise_adversarial_loss(model, x, y, epsilon, alpha):
    """Eq. (3) example by example, each with its own gradient."""
    losses = []
    for xi, yi in zip(x, y, strict=True):

        def loss_at(z, yi=yi):
            return F.cross_entropy(model(z[None]), yi[None])

        g = torch.func.grad(loss_at)(xi)
        eta = (epsilon * g / g.norm()).detach()
        losses.append(alpha * loss_at(xi) + (1 - alpha) * loss_at(xi + eta))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("epsilon", "alpha"), [(1.0, 0.5), (0.3, 0.2), (0.0, 0.5), (2.0, 0.0), (2.0, 1.0)])
def test_the_loss_and_its_gradient_equal_equation_3_taken_example_by_example(batch, epsilon, alpha):
    x, y = batch
    model = network()
    loss = adversarial_loss(model, F.cross_entropy, x, y, epsilon, alpha)
    expected = stepwise_adversarial_loss(model, x, y, epsilon, alpha)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(model.parameters())))


def test_a_summed_loss_is_perturbed_in_the_same_directions(batch):
    x, y = batch
    model = network()

    def total(output, y):
        return F.cross_entropy(output, y, reduction="sum")

    mean = adversarial_loss(model, F.cross_entropy, x, y)
    torch.testing.assert_close(adversarial_loss(model, total, x, y), len(x) * mean)


def test_backward_reaches_the_parameters_and_leaves_no_gradient_on_x(batch):
    x, y = batch
    x.requires_grad_()
    model = network()
    adversarial_loss(model, F.cross_entropy, x, y).backward()
    assert x.grad is None
    assert all(p.grad is not None for p in model.parameters())


def test_no_parameter_gradient_exists_before_backward(batch):
    model = network()
    adversarial_loss(model, F.cross_entropy, *batch)
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_gradient_leaves_the_input_unperturbed(batch):
    x, y = batch
    model = network()
    nn.init.zeros_(model[0].weight)
    clean = F.cross_entropy(model(x), y)
    torch.testing.assert_close(adversarial_loss(model, F.cross_entropy, x, y), clean, rtol=0, atol=0)


def test_a_gradient_whose_square_underflows_still_gives_a_step_of_full_length():
    seen = []
    layer = nn.Linear(3, 1, bias=False)

    def faint(output, y):
        seen.append(output.detach())
        return 1e-30 * output.sum()

    adversarial_loss(layer, faint, torch.zeros(2, 3), torch.zeros(2), epsilon=1.0)
    torch.testing.assert_close(seen[1], layer.weight.norm().expand(2, 1))


def test_running_statistics_advance_as_in_one_plain_forward(batch):
    x, y = batch
    model = network(nn.BatchNorm1d(8)).train()
    plain = copy.deepcopy(model)
    adversarial_loss(model, F.cross_entropy, x, y).backward()
    plain(x)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=0, atol=0)


def test_it_works_under_no_grad_and_with_frozen_parameters(batch):
    x, y = batch
    model = network()
    expected = adversarial_loss(model, F.cross_entropy, x, y).item()
    with torch.no_grad():
        assert adversarial_loss(model, F.cross_entropy, x, y).item() == expected
    assert adversarial_loss(model.requires_grad_(False), F.cross_entropy, x, y).item() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"epsilon": float("inf")}, "epsilon is inf"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"x": torch.ones(6, 5, dtype=torch.int64)}, "dtype torch.int64"),
        ({"loss_fn": lambda output, y: output}, r"shape \(6, 3\): it must be a scalar"),
        ({"loss_fn": lambda output, y: output.detach().sum()}, "does not depend on x"),
        ({"loss_fn": lambda output, y: output.argmax(1).double().sum()}, "does not depend on x"),
    ],
)
def test_a_wrong_argument_is_named(batch, changes, message):
    x, y = batch
    arguments = {"model": network(), "loss_fn": F.cross_entropy, "x": x, "y": y, **changes}
    with pytest.raises(ValueError, match=message):
        adversarial_loss(**arguments)
