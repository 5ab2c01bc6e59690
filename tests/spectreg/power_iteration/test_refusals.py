"""What changes under a regularizer's feet: it follows, or says in one line what is wrong and what to do."""

import copy

import pytest
import torch
from cases import mlp, seeded, unchecked_types, weight_normed
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from spectreg import SpectralNormCap, SpectralNormRegularizer
from spectreg.penalties import Hinge, Power, Square


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 2)])
def test_a_weight_that_becomes_a_computed_one_is_refused_until_it_is_a_parameter_again(change):
    model = mlp()
    regularizer = SpectralNormRegularizer(model, 0.1)
    regularizer.add_gradient()
    change(model[0])
    with pytest.raises(ValueError, match=r"weight '0.weight' is under a parametrization: .* Use penalty\(\)"):
        regularizer.add_gradient()
    if parametrize.is_parametrized(model[0]):
        parametrize.remove_parametrizations(model[0], "weight")
    else:
        prune.remove(model[0], "weight")
    regularizer.add_gradient()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_replaced_after_attach_is_refused_until_its_optimizer_holds_the_new_one(decoupled):
    model = mlp()
    optimizer = sgd(model)
    regularizer = SpectralNormRegularizer(model, 0.1, decoupled=decoupled).attach(optimizer)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    with pytest.raises(RuntimeError, match=r"weight '0.weight' is not a parameter of the optimizer.*attach\(\) again"):
        optimizer.step()
    regularizer.detach()
    again = sgd(model)
    regularizer.attach(again)
    again.step()


def test_a_weight_thawed_into_another_optimizer_is_refused_until_attached_anew():
    model = mlp()
    model[0].requires_grad_(False)
    first, second = sgd(model[2]), sgd(model[4])
    regularizer = SpectralNormRegularizer(model, 1.0).attach(first, second)
    model[0].requires_grad_(True)
    second.add_param_group({"params": [*model[0].parameters()]})
    with pytest.raises(RuntimeError, match=r"weight '0.weight' .* or thawed since"):
        first.step()
    regularizer.detach()
    regularizer.attach(first, second)
    before = model[0].weight.detach().clone()
    first.step()
    assert torch.equal(model[0].weight, before)
    second.step()
    assert not torch.equal(model[0].weight, before)


def test_a_weight_without_values_or_of_another_shape_is_refused_by_name():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    regularizer = SpectralNormRegularizer(model, 0.1)
    with pytest.raises(ValueError, match=r"weight 'weight' is on the meta device"):
        regularizer.add_gradient()
    model.to_empty(device="cpu")
    nn.init.eye_(model.weight)
    regularizer.add_gradient()
    model.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"the shape \(4, 4\) now, and had \(2, 3\) .* build a new one"):
        regularizer.add_gradient()


@pytest.mark.parametrize("penalty", ["square", "hinge"])
def test_a_second_derivative_is_refused_where_it_would_leave_the_penalty_out(penalty):
    model = mlp()
    regularizer = SpectralNormRegularizer(model, 0.1, penalty=penalty)
    W = model[0].weight
    with pytest.raises(NotImplementedError, match=r"penalty\(\) has no second derivative"):
        torch.autograd.grad((W**4).sum() + regularizer.penalty(), W, create_graph=True)


@pytest.mark.parametrize("build", [mlp, weight_normed])
def test_without_gradients_the_penalty_has_its_value_and_takes_no_step(build):
    model = seeded(build)
    regularizer = SpectralNormRegularizer(model, 0.3, every=2, warmup=100)
    with torch.no_grad():
        looked = regularizer.penalty()
    sigma = regularizer.sigma()
    torch.testing.assert_close(looked, 0.15 * sum(s.square() for s in sigma.values()))
    assert not looked.requires_grad
    assert regularizer.state_dict()["vectors"]["0.weight"]["calls"] == 0
    torch.testing.assert_close(regularizer.penalty().detach(), 2 * looked)


def test_the_penalty_under_a_transform_of_torch_func_is_refused_by_name():
    model = mlp()
    regularizer = SpectralNormRegularizer(model, 0.1)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, torch.ones(5).double()).sum() + regularizer.penalty()

    with pytest.raises(NotImplementedError, match=r"penalty\(\) is not differentiated by torch.func .* backward\(\)"):
        torch.func.grad(loss)(dict(model.named_parameters()))


def test_a_function_without_a_slope_is_refused():
    regularizer = SpectralNormRegularizer(mlp(), 0.1, penalty=lambda sigma: (sigma > 1).to(sigma))
    for act in (regularizer.add_gradient, regularizer.penalty):
        with pytest.raises(ValueError, match="the penalty function has no slope"):
            act()


NO_PENALTIES = [
    Power(float("nan")), Power(0), Power(-1.0), Hinge(factor=float("inf")), Hinge(factor=-1), Hinge(-1), Square(-0.5),
    Square(True),
]  # fmt: skip


@pytest.mark.parametrize("penalty", NO_PENALTIES, ids=str)
def test_a_penalty_with_a_number_that_means_nothing_is_refused(penalty):
    with pytest.raises(ValueError, match=r"(exponent|factor|target) .*of .* must be a finite number"):
        SpectralNormRegularizer(mlp(), 0.1, penalty=penalty)


@pytest.mark.parametrize("state", [None, {"version": 1, "vectors": {"0.weight": {"u": torch.zeros(1)}}}])
def test_a_state_that_is_torn_changes_nothing(state):
    regularizer = SpectralNormRegularizer(mlp(), 0.1)
    before = regularizer.state_dict()["vectors"]
    message = r"format version None|this state is torn: of 0.weight it lacks"
    with unchecked_types(), pytest.raises(ValueError, match=message):
        regularizer.load_state_dict(state)
    for name, saved in regularizer.state_dict()["vectors"].items():
        assert torch.equal(saved["v"], before[name]["v"])


def test_the_default_precision_and_device_of_the_moment_do_not_matter():
    plain = SpectralNormRegularizer(mlp(), 0.1)
    model, before = mlp(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            regularizer = SpectralNormRegularizer(model, 0.1)
    finally:
        torch.set_default_dtype(before)
    assert regularizer.sigma() == plain.sigma()


@pytest.mark.parametrize("k", [1, 2])
def test_an_expanded_gradient_is_made_one_that_can_be_added_to(k):
    added, plain = mlp(), mlp()
    for model, one in ((added, torch.ones((), dtype=torch.float64)), (plain, torch.ones(8, 5, dtype=torch.float64))):
        model[0].weight.grad = one.expand(8, 5)
        SpectralNormRegularizer(model, 0.1, k=k).add_gradient()
    torch.testing.assert_close(added[0].weight.grad, plain[0].weight.grad)


def test_gradients_made_in_inference_mode_can_be_trained_with():
    def gradients(first):
        model = mlp()
        regularizer = SpectralNormRegularizer(model, 0.1)
        with first:
            regularizer.add_gradient()
        model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
        regularizer.add_gradient()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients(torch.inference_mode()), gradients(torch.enable_grad()), rtol=0, atol=0)


def test_two_parameters_in_the_same_memory_are_refused_and_one_of_them_frozen_is_not():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are two parameters in the same memory"):
        SpectralNormRegularizer(model, 0.1).add_gradient()
    assert set(SpectralNormRegularizer(model, 0).log()) >= {"sigma/0.weight", "sigma/1.weight"}
    SpectralNormRegularizer(model, {"0.*": 0.1}).add_gradient()
    with pytest.raises(ValueError, match="would be scaled for"):
        SpectralNormCap(model, 0.1)
    model[1].weight.requires_grad_(False)
    SpectralNormRegularizer(model, 0.1).add_gradient()


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_the_stable_rank_is_that_of_the_svd_at_any_scale(scale):
    layer = seeded(lambda: nn.Linear(6, 5)).float()
    layer.weight.data *= scale
    S = torch.linalg.svdvals(layer.weight.detach().double())
    rank = SpectralNormRegularizer(layer, 0, warmup=100).stable_rank()["weight"]
    assert rank.item() == pytest.approx((S.square().sum() / S[0] ** 2).item(), rel=1e-5)


@pytest.mark.parametrize("later", ["parameter", "memory", "strength"])
def test_weights_that_are_tied_after_the_first_step_are_refused_at_the_next(later):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    regularizer = SpectralNormRegularizer(model, {"0.*": 0.1} if later == "strength" else 0.1)
    regularizer.add_gradient()
    if later == "parameter":
        model[1].weight = model[0].weight
    else:
        model[1].weight.data = model[0].weight.data
    if later == "strength":
        regularizer.add_gradient()
        regularizer.strength = 0.1
    before = model[0].weight.grad.clone()
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are .* acted on twice"):
        regularizer.add_gradient()
    assert torch.equal(model[0].weight.grad, before)


def test_weights_that_are_tied_after_the_first_cap_are_refused_at_the_next():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cap = SpectralNormCap(model, 0.1)
    cap.apply()
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"would be scaled for '0.weight' and for '1.weight'"):
        cap.apply()


def test_a_gradient_of_more_precision_than_its_weight_keeps_it():
    layer = nn.Linear(5, 4, bias=False)
    layer.weight.grad_dtype = torch.float64
    layer.weight.grad = torch.full((4, 5), 1 / 3, dtype=torch.float64)
    SpectralNormRegularizer(layer, 1e-20).add_gradient()
    assert (layer.weight.grad - 1 / 3).abs().max() < 1e-16
