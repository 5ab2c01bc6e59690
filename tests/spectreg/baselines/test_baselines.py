import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectreg.baselines.adversarial import adversarial_loss
from spectreg.baselines.jacobian import jacobian_penalty, layerwise_jacobian_penalty


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


def dense_jacobians(model, x):
    """One matrix an example, by torch.func.jacrev on each alone."""
    return torch.stack([torch.func.jacrev(lambda z: model(z[None])[0].flatten())(xi).flatten(1) for xi in x])


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Softplus()
    return nn.Sequential(*layers).double()


@pytest.fixture
def images():
    return torch.randn(4, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_jacobian_penalty_and_its_gradient_equal_those_of_the_dense_jacobian(images):
    model = convolutional()
    penalty = jacobian_penalty(model, images)
    expected = dense_jacobians(model, images).square().sum((1, 2)).mean()
    torch.testing.assert_close(penalty, expected)
    parameters = [p for name, p in model.named_parameters() if name != "4.bias"]
    torch.testing.assert_close(torch.autograd.grad(penalty, parameters), torch.autograd.grad(expected, parameters))


def test_the_layerwise_penalty_and_its_gradient_equal_the_sum_over_dense_layer_jacobians(images):
    model = convolutional()
    first, second = model[:4], model[4:]
    penalty = layerwise_jacobian_penalty(model, images)
    expected = sum(
        dense_jacobians(layer, x).square().sum((1, 2)).mean() for layer, x in [(first, images), (second, first(images))]
    )
    torch.testing.assert_close(penalty, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(penalty, parameters), torch.autograd.grad(expected, parameters))
    torch.testing.assert_close(layerwise_jacobian_penalty([first, second], images), expected)


@pytest.mark.parametrize("penalty", [jacobian_penalty, layerwise_jacobian_penalty])
def test_random_projections_have_the_exact_penalty_as_their_mean(penalty, images):
    model, generator = convolutional(), torch.Generator().manual_seed(0)
    draws = torch.stack([penalty(model, images, projections=1, generator=generator).detach() for _ in range(400)])
    error = draws.std() / 400**0.5
    assert (draws.mean() - penalty(model, images)).abs() < 4 * error
    averaged = penalty(model, images, projections=400, generator=generator)
    assert (averaged - penalty(model, images)).abs() < 4 * error


@pytest.mark.parametrize("penalty", [jacobian_penalty, layerwise_jacobian_penalty])
def test_a_jacobian_penalty_moves_no_running_statistics_and_leaves_no_gradient_on_x(penalty):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 3, requires_grad=True)
    penalty(model, x).backward()
    assert x.grad is None
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [jacobian_penalty, layerwise_jacobian_penalty])
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(5, 2)), {"projections": 1}, "no generator is given"),
        (nn.Sequential(nn.Linear(5, 2)), {"projections": 0, "generator": torch.Generator()}, "projections is 0"),
        (nn.Sequential(nn.Flatten(0, 1)), {}, r"the model gave \(20, 5, 5\) for 4 examples"),
    ],
)
def test_a_jacobian_penalty_names_a_wrong_argument(penalty, model, options, message, images):
    with pytest.raises(ValueError, match=message):
        penalty(model, images.float().expand(4, 5, 5, 5), **options)


def test_an_empty_list_of_layers_is_named():
    with pytest.raises(ValueError, match="layers is empty"):
        layerwise_jacobian_penalty([], torch.zeros(1, 2))


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("lose", [lambda model: model.to("meta"), offloaded])
def test_weights_that_are_not_there_are_named(lose):
    model = lose(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    x, y = torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)
    for call in (
        lambda: adversarial_loss(model, F.cross_entropy, x, y),
        lambda: jacobian_penalty(model, x),
        lambda: layerwise_jacobian_penalty(model, x),
    ):
        with pytest.raises(ValueError, match=r"parameter '0\.weight' is on the meta device .* Load the whole model"):
            call()
    with pytest.raises(ValueError, match="parameter 'weight' is on the meta device"):
        layerwise_jacobian_penalty(list(model), x)
