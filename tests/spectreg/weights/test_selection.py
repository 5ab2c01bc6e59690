"""Which parameters count, and what is refused: every error is one clear line with the way out."""

import re
import warnings

import pytest
import torch
from cases import Bare, gpt2_projection, mlp, seeded, unchecked_types, weight_normed
from torch import nn
from torch.nn.utils import parametrizations, prune
from truth import svd_penalty_gradient

from spectreg import SpectralNormRegularizer, named_weights
from spectreg.penalties import Square


def names(model, **settings):
    return [w.name for w in named_weights(model, **settings)]


def test_biases_normalization_scales_embeddings_and_vectors_in_disguise_do_not_count():
    model = nn.ModuleDict(
        {
            "token": Bare(1, 1, 8), "table": Bare(3, 4), "norm": nn.LayerNorm((2, 3)), "batch": nn.BatchNorm2d(4),
            "words": nn.Embedding(5, 4), "linear": nn.Linear(4, 1),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "experts": nn.ParameterDict({"up_bias": torch.ones(2, 3)}),
        }
    )  # fmt: skip
    expected = ["table.table", "linear.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert names(model) == expected
    assert set(names(model, embeddings=True)) == {*expected, "words.weight"}
    assert names(model, select=lambda name, p: p.shape == (3, 4)) == ["table.table"]


def test_a_weight_under_a_parametrization_takes_the_penalty_on_what_the_forward_pass_uses():
    model = seeded(weight_normed)
    regularizer = SpectralNormRegularizer(model, 0.5, warmup=100)
    assert list(regularizer.sigma()) == ["0.weight", "1.weight"]
    regularizer.penalty().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (0.25 * sum(torch.linalg.matrix_norm(layer.weight, 2) ** 2 for layer in model)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad)


@pytest.mark.parametrize("build", [weight_normed, lambda: parametrizations.orthogonal(nn.Linear(4, 4))])
def test_gradients_of_a_parametrized_weight_are_refused_by_name_with_the_way_out(build):
    regularizer = SpectralNormRegularizer(build(), 0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for call in (regularizer.add_gradient, lambda: regularizer.attach(optimizer)):
        with pytest.raises(ValueError, match=r"weight '.*weight' is under a parametrization: .* Use penalty\(\)"):
            call()


def flat():
    """FSDP1 needs a process group to make its own; torch knows them by this attribute, too."""
    module = nn.Module()
    module.register_parameter("_flat_param", nn.Parameter(torch.zeros(4)))
    module._flat_param._is_flat_param = True
    return module


def zero3():
    layer = nn.Linear(3, 2)
    layer.weight.ds_id = 0
    return layer


def exported():
    return torch.export.export(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)), (torch.zeros(1, 2, 5, 5),)).module()


def generated():
    layer = nn.Linear(3, 3)
    del layer.weight
    layer.weight = torch.ones(3, 3)
    return layer


def renamed():
    layer = nn.Linear(3, 3)
    layer.weight_bar = nn.Parameter(layer.weight.detach())
    del layer.weight
    return layer


def sparse():
    layer = nn.Linear(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    return layer


def magnitudes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")


REFUSED = {
    "no weights": (lambda: nn.BatchNorm1d(3), {}, "BatchNorm1d has no weight to regularize"),
    "embeddings only": (lambda: nn.Embedding(3, 2), {}, "embeddings=True counts embeddings"),
    "select leaves none": (mlp, {"select": lambda n, p: False}, "select leaves none of the 3 weights: 0.weight"),
    "strength pattern": (mlp, {"strength": {"conv*": 1.0}}, "no weight matches 'conv*'. The weights are 0.weight"),
    "negative strength": (mlp, {"strength": -1.0}, "strength of '0.weight' is -1.0: it must be a finite number from 0"),
    "infinite strength": (mlp, {"strength": float("inf")}, "strength of '0.weight' is inf"),
    "strength not a number": (mlp, {"strength": {"0.*": float("nan")}}, "strength of '0.weight' is nan"),
    "strength a word": (mlp, {"strength": {"0.*": "much"}}, "strength of '0.weight' is 'much': it must be a finite"),
    "every": (mlp, {"every": 0}, "every is 0: it must be a whole number from 1"),
    "steps": (mlp, {"steps": 0.3}, "steps is 0.3: it must be a positive multiple of one half"),
    "steps zero": (mlp, {"steps": 0}, "steps is 0"),
    "k": (mlp, {"k": 0}, "k is 0: it must be a whole number from 1"),
    "warmup": (mlp, {"warmup": -1}, "warmup is -1"),
    "unknown map": (mlp, {"map": "fft"}, "unknown map 'fft' for '0.weight': it is one of matrix, joint"),
    "a map that fits nothing": (mlp, {"map": "heads"}, "map='heads' fits none of the weights (0.weight"),
    "a map that does not fit": (mlp, {"map": {"0.*": "heads"}}, "map 'heads' does not fit '0.weight' (Linear): matrix"),
    "map pattern": (mlp, {"map": {"x*": "joint"}}, "map: no weight matches 'x*'"),
    "no pattern": (mlp, {"strength": {}}, "strength is {}: it must map name patterns"),
    "a pattern that never counts": (
        mlp, {"strength": {"*": 1.0, "0.*": 0.1}}, "'0.*' never counts: what it matches is taken by '*' before it",
    ),
    "a pattern like another": (
        lambda: nn.Sequential(nn.Linear(2, 2)), {"strength": {"0.*": 1.0, "*.weight": 5.0}}, "'*.weight' never counts",
    ),
    "a pattern that two others leave nothing": (
        mlp, {"map": {"[02].*": 2, "4.*": 3, "?.weight": 1}}, "'?.weight' never counts: what it matches is "
        "taken by '[02].*' and '4.*' before it",
    ),
    "patterns that are no strings": (mlp, {"strength": {0: 1.0}}, "it must map name patterns, such as '*.weight'"),
    "a truth value for a map": (mlp, {"map": {"0.*": True}}, "unknown map True for '0.weight'"),
    "strength beyond float32": (mlp, {"strength": 1e39}, "strength of '0.weight' is 1e+39: it must be 0, or from 1.18"),
    "strength beyond float32 by every": (mlp, {"strength": 1e38, "every": 9}, "is 1e+38 × every=9: it must be 0, or"),
    "strength that float32 takes for none": (mlp, {"strength": 1e-46}, "strength of '0.weight' is 1e-46: it must be 0"),
    "strength beyond all floats": (mlp, {"strength": 10**400}, "strength of '0.weight' is 1000"),
    "strength a truth value": (mlp, {"strength": True}, "strength of '0.weight' is True: it must be a finite number"),
    "a seed too large": (mlp, {"seed": 2**64}, "seed is 18446744073709551616: it must be a whole number from -2⁶³"),
    "an infinite seed": (mlp, {"seed": float("inf")}, "seed is inf: it must be a whole number"),
    "no seed": (mlp, {"seed": None}, "seed is None: it must be a whole number"),
    "a penalty's class": (mlp, {"penalty": Square}, "penalty is the class Square: give one of it, such as Square()"),
    "float8": (lambda: nn.Linear(2, 2).to(torch.float8_e5m2), {}, "weight 'weight' is of torch.float8_e5m2"),
    "a number for an input size": (
        lambda: nn.Conv2d(2, 2, 3), {"map": "operator", "input_size": 8}, "weight 'weight': input_size 8 is no size",
    ),
    "an input smaller than the kernel": (
        lambda: nn.Conv2d(2, 2, 5), {"map": "operator", "input_size": (3, 3)}, "input_size (3, 3) does not fit Conv2d",
    ),
    "no input size": (lambda: nn.Conv2d(2, 2, 3), {"map": "operator"}, "needs the size of the input of 'weight'"),
    "wrong input size": (lambda: nn.Conv2d(2, 2, 3), {"map": "operator", "input_size": (8,)}, "it has 2 numbers"),
    "an input size that nothing needs": (mlp, {"input_size": (8, 8)}, "input_size is used by map='operator' only"),
    "parts that do not divide": (mlp, {"map": {"0.*": 3}}, "map 3 does not fit '0.weight': 8 outputs cannot be cut"),
    "a penalty that is none": (mlp, {"penalty": 3}, "penalty 3 is neither one of square, hinge, power nor a function"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), {}, "weight 'weight' is complex (torch.complex64)"),
    "fsdp1": (flat, {}, "'_flat_param' is a flat parameter of FSDP1"),
    "zero 3": (zero3, {}, "'weight' is partitioned by DeepSpeed's ZeRO stage 3"),
    "lazy": (lambda: nn.LazyLinear(3), {}, "'weight' is uninitialized (a lazy module)"),
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2))), {},
        "weight '0.weight' is of a model that was scripted",
    ),
    "exported": (exported, {}, "weight '0.weight' is of a model that was exported, and no longer says which layer"),
    "a weight that other code sets": (generated, {}, "'weight' belongs to a layer whose weight is no parameter"),
    "a raw weight of another name": (renamed, {}, "'weight_bar' belongs to a layer whose weight is no parameter"),
    "sparse": (sparse, {}, "weight 'weight' is sparse (torch.sparse_csr)"),
    "a vector that map names": (mlp, {"map": {"0.bias": "matrix"}}, "'0.bias', which map names, has the shape (8,)"),
    "no numbers that map names": (
        lambda: nn.ParameterDict({"e": torch.zeros(0, 4)}), {"map": {"e": "matrix"}}, "has the shape (0, 4)",
    ),
    "magnitudes of an LSTM": (
        magnitudes, {"select": lambda name, _: not name.endswith("_v")}, "part of a weight that a hook",
    ),
    "hooked": (lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 1), {}, "part of a weight that a hook"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_or_model_that_cannot_be_right_is_refused_by_name(case):
    build, settings, message = REFUSED[case]
    with unchecked_types(), pytest.raises(ValueError, match=re.escape(message)):
        SpectralNormRegularizer(build(), **{"strength": 0.1} | settings)


def test_a_model_given_as_its_parameters_is_refused_as_such():
    with unchecked_types(), pytest.raises(TypeError, match=r"the model is a generator: give the nn.Module itself"):
        SpectralNormRegularizer(mlp().parameters(), 0.1)


def test_a_select_that_is_no_function_is_refused():
    with unchecked_types(), pytest.raises(TypeError, match=r"select is '0.\*': it must be a function \(name, weight\)"):
        SpectralNormRegularizer(mlp(), 0.1, select="0.*")


def test_a_fallback_pattern_may_have_nothing_left_to_do():
    assert SpectralNormRegularizer(mlp(), {"?.weight": 1.0, "*": 0.1}).strength == {"?.weight": 1.0, "*": 0.1}


def test_parameters_that_only_look_like_parts_of_a_hooked_weight_are_weights():
    model = nn.Module()
    model.proj_v, model.proj_g, model.mask_orig = (nn.Parameter(torch.randn(3, 4)) for _ in range(3))
    assert names(model) == ["proj_v", "proj_g", "mask_orig"]


def test_names_are_those_without_wrappers_wherever_the_wrapper_is():
    assert names(torch.compile(nn.DataParallel(mlp()))) == names(mlp())
    assert names(nn.Sequential(nn.DataParallel(nn.Linear(3, 3)))) == ["0.weight"]
    assert names(nn.ModuleDict({"a_orig_mod": nn.Linear(3, 3), "module": nn.Linear(3, 3)})) == [
        "a_orig_mod.weight",
        "module.weight",
    ]


@pytest.mark.parametrize("target", ["begin", float("nan"), None])
def test_a_target_that_is_none_is_refused_before_the_first_step(target):
    with unchecked_types(), pytest.raises(ValueError, match=r"of Square\(.*\): it must be a finite number, 'start' or"):
        SpectralNormRegularizer(mlp(), 0.1, penalty=Square(target))


def test_what_is_not_supported_can_be_left_out_with_select():
    pruned = prune.l1_unstructured(nn.Linear(3, 3), "weight", 1)
    others = {"complex": nn.Linear(2, 2, dtype=torch.complex64), "lazy": nn.LazyLinear(3), "pruned": pruned}
    model = nn.ModuleDict({"plain": nn.Linear(3, 3), **others})
    assert names(model, select=lambda name, _: name.startswith("plain")) == ["plain.weight"]


def test_a_number_for_a_map_cuts_a_fused_projection_into_so_many_parts():
    model = seeded(lambda: nn.ModuleDict({"c_attn": gpt2_projection(), "q_proj": nn.Linear(4, 6)}))
    regularizer = SpectralNormRegularizer(model, 1.0, map={"c_attn.weight": 7, "q_proj.*": 2}, warmup=200)
    regularizer.add_gradient()
    for name, matrices in (("c_attn", lambda W: W.T.chunk(7)), ("q_proj", lambda W: W.chunk(2))):
        _, expected = svd_penalty_gradient(model[name].weight, matrices, each=True)
        torch.testing.assert_close(model[name].weight.grad, expected)


def test_the_old_weight_norm_is_refused_too():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"part of a weight .*parametrizations, and penalty"):
        SpectralNormRegularizer(layer, 0.1)


def test_a_strength_that_is_refused_leaves_the_old_one():
    regularizer = SpectralNormRegularizer(mlp(), 0.1)
    with pytest.raises(ValueError, match=r"strength of '0.weight' is -2"):
        regularizer.strength = -2
    assert regularizer.strength == 0.1


def test_a_state_of_another_model_is_refused_with_what_is_missing_unexpected_and_different_and_nothing_changes():
    state = SpectralNormRegularizer(mlp(widths=(5, 4, 3)), 0.1).state_dict()
    state["vectors"]["other"] = state["vectors"]["0.weight"]
    regularizer = SpectralNormRegularizer(mlp(), 0.1)
    before = regularizer.sigma()
    with pytest.raises(ValueError, match="another model or map") as error:
        regularizer.load_state_dict(state)
    for part in ("missing ['4.weight']", "unexpected ['other']", "2.weight (1, 3, 1) instead of (1, 6, 1)"):
        assert part in str(error.value)
    assert regularizer.sigma() == before
    with pytest.raises(ValueError, match="format version 7; 1 is understood"):
        regularizer.load_state_dict({"version": 7, "vectors": {}})
    with pytest.raises(ValueError, match=r"missing \['0.weight', '2.weight', '4.weight'\]"):
        regularizer.load_state_dict({"version": 1})


def test_attach_refuses_the_wrong_optimizer_a_second_time_and_lbfgs():
    model, other = mlp(), mlp()
    regularizer = SpectralNormRegularizer(model, 0.1)
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0.weight, 2.weight, 4.weight"):
        regularizer.attach(torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"does not hold 2.weight, 4.weight"):
        regularizer.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"LBFGS evaluates loss .* add penalty\(\) to it inside the closure"):
        regularizer.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"optimizers of torch.optim, not Linear"):
        regularizer.attach(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        regularizer.attach(optimizer)


def test_lbfgs_with_the_penalty_in_its_closure_lowers_the_norm():
    layer = seeded(lambda: nn.Linear(4, 3))
    regularizer = SpectralNormRegularizer(layer, 1.0)
    before = regularizer.sigma()["weight"]
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = regularizer.penalty()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.linalg.matrix_norm(layer.weight, 2) < before


def test_a_sparse_gradient_is_refused_by_name():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"weight 'weight' has a sparse gradient: use sparse=False"):
        SpectralNormRegularizer(table, 0.1, embeddings=True).add_gradient()


def test_the_repr_says_what_is_regularized():
    text = repr(SpectralNormRegularizer(nn.Conv2d(4, 6, 3, groups=2), 0.25, every=3))
    for part in ("1 weights with 2 blocks", "strength=0.25", "Square", "steps=1", "every=3"):
        assert part in text


class Scaled(nn.Module):
    def __init__(self, by: float, hidden: float = 1.0) -> None:
        super().__init__()
        self.by, self._hidden = by, hidden

    def forward(self, x):
        return self.by * self._hidden * (x + x.T)


def both(first, second):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    for name, parametrization in (("a", first), ("b", second)):
        nn.utils.parametrize.register_parametrization(model[name], "weight", parametrization)
    return names(model)


def test_a_parameter_tied_under_equal_parametrizations_counts_once():
    assert both(Scaled(1.0), Scaled(1.0)) == ["a.weight"]
    assert both(Scaled(1.0), Scaled(2.0)) == ["a.weight", "b.weight"]
    assert both(Scaled(1.0), Scaled(1.0, hidden=2.0)) == ["a.weight", "b.weight"]
    inside = [nn.Sequential(Scaled(by)) for by in (1.0, 2.0)]
    assert both(*inside) == ["a.weight", "b.weight"]


class Noisy(nn.Linear):
    """A layer that makes its weight itself, of parameters of other names."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        del self.weight
        self.weight_mu, self.weight_sigma = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))

    def forward(self, x):
        return nn.functional.linear(x, self.weight_mu + self.weight_sigma, self.bias)


def test_a_layer_that_makes_its_weight_of_parameters_of_its_own_has_these_for_weights():
    assert names(nn.Sequential(Noisy())) == ["0.weight_mu", "0.weight_sigma"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_may_be_left_out():
    model = nn.ModuleDict({"frozen": torch.jit.script(nn.Linear(3, 3)), "head": nn.Linear(3, 2)})
    assert names(model, select=lambda name, _: name.startswith("head")) == ["head.weight"]


def test_a_traced_model_keeps_its_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 4, 3, groups=2)

        def forward(self, x):
            return torch.ops.aten.relu.default(self.layer(x))

    (weight,) = named_weights(torch.fx.symbolic_trace(Net()))
    assert weight.map.blocks == 2
