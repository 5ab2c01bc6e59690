"""Which parameters are weights is decided by what a module is and has, and reading a weight moves nothing."""

import pytest
import torch
from cases import Bare, seeded
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from spectreg import SpectralNormRegularizer, named_weights, operator_norm, singular_values


def weights(model, **settings):
    return {w.name: w for w in named_weights(model, **settings)}


def holding(**shapes):
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return module


class Plain(nn.Linear):
    """A subclass that adds nothing."""


class Adapted(nn.Conv2d):
    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 27)), nn.Parameter(torch.randn(8, 2))


class AdaptedAttention(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(6, 2)
        self.lora_A = nn.Parameter(torch.randn(3, 6))


class AdaptedCell(nn.LSTMCell):
    def __init__(self):
        super().__init__(3, 5)
        self.lora_A = nn.Parameter(torch.randn(2, 3))


class AdaptedNorm(nn.LayerNorm):
    def __init__(self):
        super().__init__((2, 3))
        self.modulation = nn.Parameter(torch.randn(3, 4))


class AdaptedTable(nn.Embedding):
    def __init__(self):
        super().__init__(5, 4)
        self.lora_A = nn.Parameter(torch.randn(2, 5))


def test_a_layer_with_one_output_counts_whatever_its_subclass_is_called():
    assert list(weights(nn.Sequential(nn.Linear(7, 1), Plain(7, 1), Plain(7, 2)))) == [
        "0.weight",
        "1.weight",
        "2.weight",
    ]
    assert list(weights(type("FSDPLinear", (nn.Linear,), {"__module__": "elsewhere"})(3, 1))) == ["weight"]


@pytest.mark.parametrize("build", [AdaptedAttention, AdaptedCell, AdaptedNorm, AdaptedTable])
def test_what_a_subclass_adds_is_a_matrix_and_not_a_weight_of_the_layer(build):
    added = next(name for name in ("lora_A", "modulation") if hasattr(build(), name))
    assert weights(build())[added].map.blocks == 1


@pytest.mark.parametrize("groups", [1, 3])
def test_the_factors_of_an_adapter_in_a_convolution_are_matrices(groups):
    model = seeded(lambda: Adapted(3, 9, 3, groups=groups))
    regularizer = SpectralNormRegularizer(model, 1.0, map="operator", input_size=(6, 6), warmup=200)
    regularizer.add_gradient()
    sigma = regularizer.sigma()
    for name in ("lora_A", "lora_B"):
        W = model.get_parameter(name)
        exact = torch.linalg.matrix_norm(W.detach(), 2)
        torch.testing.assert_close(sigma[name], exact)
        torch.testing.assert_close(torch.linalg.matrix_norm(W.grad, 2), exact)


def test_inputs_times_outputs_are_known_by_what_the_layer_says_of_itself():
    class Projection(nn.Module):
        def __init__(self, nx, nf):
            super().__init__()
            self.nx, self.nf, self.weight = nx, nf, nn.Parameter(torch.randn(nx, nf))

    Conv1D = type("Conv1D", (nn.Linear,), {"__module__": "transformers.pytorch_utils"})
    model = nn.Sequential(Projection(4, 6), type("FSDPConv1D", (Projection,), {})(4, 4), Conv1D(4, 6))
    assert [w.map.layout for w in named_weights(model)] == ["columns", "columns", "rows"]
    assert [w.map.blocks for w in named_weights(model[0], map=3)] == [3]


NOT_WEIGHTS = [
    "A_log", "log_A", "time_decay", "attention_biases", "bias_u", "rpb", "layer_scale", "gamma_1", "lambda2", "alpha",
]  # fmt: skip
TABLES = [
    "pos_embed", "position_embeddings", "rel_pos_w", "cls_tokens", "emb_rel_k", "latents", "codevectors", "soft_prompt",
]  # fmt: skip
MATRICES = [
    "A", "B", "W", "lora_A", "proj", "token_mixing_weight", "prompts_visual_projection", "gate_up_proj", "time_maa_w1",
    "recurrent_gate_weight", "log_softmax_proj", "catalogue",
]  # fmt: skip


def test_bare_parameters_count_by_their_names():
    model = holding(**dict.fromkeys([*NOT_WEIGHTS, *TABLES, *MATRICES], (5, 4)))
    assert set(weights(model)) == set(MATRICES)
    assert set(weights(model, embeddings=True)) == {*MATRICES, *TABLES}


def test_a_bare_parameter_in_a_list_or_dictionary_has_the_name_of_that_too():
    lists = nn.ModuleDict({
        "pos_embeds": nn.ParameterList([torch.randn(5, 4)]), "prompts": nn.ParameterDict({"a": torch.randn(5, 4)}),
        "factors": nn.ParameterList([torch.randn(5, 4), torch.randn(1, 1, 4)]),
    })  # fmt: skip
    assert list(weights(lists)) == ["factors.0"]


def test_what_the_map_names_in_full_counts_whatever_it_is():
    model = holding(A_log=(5, 4), layer_scale=(3, 2), W=(2, 2))
    assert list(weights(model, map={"A_log": "matrix"})) == ["A_log", "W"]
    with pytest.raises(ValueError, match="map: no weight matches 'A_\\*'"):
        weights(model, map={"A_*": "matrix"})


def test_a_scale_of_two_dimensions_is_known_by_the_name_or_the_make_of_its_norm():
    named, made, projection = holding(weight=(2, 8)), holding(weight=(2, 8)), holding(weight=(2, 8))
    made.variance_epsilon = 1e-5
    projection.eps, projection.in_features = 1e-5, 8
    model = nn.ModuleDict(
        {"q_norm": named, "q_scaled": made, "quantized": projection, "normal_form": holding(weight=(2, 8))}
    )
    assert list(weights(model)) == ["quantized.weight", "normal_form.weight"]


def test_a_table_that_is_tied_counts_with_the_embeddings_only_and_once():
    model = nn.ModuleDict({"words": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "other": nn.Linear(4, 2)})
    model["head"].weight = model["words"].weight
    assert list(weights(model)) == ["other.weight"]
    assert list(weights(model, embeddings=True)) == ["words.weight", "other.weight"]


@pytest.mark.parametrize(("shape", "matrices"), [
    ((5, 4), (1, 5, 4)), ((3, 5, 4), (3, 5, 4)), ((1, 5, 4), (1, 5, 4)), ((6, 3, 2, 2), (1, 6, 12)),
    ((1, 6, 3, 2, 2), (1, 6, 12)),
])  # fmt: skip
def test_three_dimensions_are_a_stack_of_matrices_and_four_a_kernel(shape, matrices):
    m = weights(Bare(*shape))["table"].map
    assert (m.blocks, m.outputs, m.inputs) == matrices


def test_a_stack_is_not_cut_into_parts():
    with pytest.raises(ValueError, match=r"map 2 does not fit 'table', a stack of 4 matrices: 'each' takes them apart"):
        named_weights(Bare(4, 3, 2), map=2)


class Noisy(nn.Module):
    """A parametrization that draws numbers and keeps a record."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, W):
        self.calls += 1
        return W + torch.randn_like(W)


def noisy():
    layer = nn.Linear(4, 4)
    register_parametrization(layer, "weight", Noisy(), unsafe=True)
    return layer


@pytest.mark.parametrize("read", [
    named_weights, singular_values, lambda m: operator_norm(m, (4,)), lambda m: SpectralNormRegularizer(m, 0.1).sigma(),
    lambda m: SpectralNormRegularizer(m, 0.1).penalty(), lambda m: SpectralNormRegularizer(m, 0.1).summary(),
])  # fmt: skip
@pytest.mark.parametrize("build", [lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), noisy])
def test_reading_a_parametrized_weight_moves_neither_its_buffers_nor_the_random_state(build, read):
    model = build().train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    read(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.training


def test_the_penalty_of_a_weight_under_spectral_norm_has_the_gradient_of_the_normalised_weight():
    model = parametrizations.spectral_norm(nn.Linear(4, 3)).double()
    for _ in range(200):
        model.weight  # noqa: B018
    SpectralNormRegularizer(model, 0.5, warmup=200).penalty().backward()
    W = model.parametrizations.weight.original
    ours = W.grad.clone()
    W.grad = None
    (0.25 * torch.linalg.matrix_norm(model.weight, 2) ** 2).backward()
    torch.testing.assert_close(ours, W.grad, rtol=0, atol=1e-12)


class Remembered(nn.Module):
    """As those of deel-torchlip: in evaluation mode what the last training step made, a constant."""

    def __init__(self, W):
        super().__init__()
        self.register_buffer("made", W.detach().clone())

    def forward(self, W):
        if self.training:
            made = 2 * W
            self.made.data = made.data
            return made
        return self.made


def test_a_parametrization_that_is_a_constant_in_evaluation_is_refused_by_name_in_penalty_and_stays_in_the_log():
    layer = nn.Linear(4, 3)
    register_parametrization(layer, "weight", Remembered(layer.weight), unsafe=True)
    regularizer = SpectralNormRegularizer(layer, 0.1)
    regularizer.penalty().backward()
    layer.eval()
    with pytest.raises(
        ValueError, match=r"weight 'weight' .* gives a constant in evaluation mode: call penalty\(\) in"
    ):
        regularizer.penalty()
    assert list(regularizer.sigma()) == ["weight"]
    with torch.no_grad():
        assert regularizer.penalty() > 0


@pytest.mark.parametrize("name", ["weight_scale", "kernel_gamma", "proj_gain", "weight_scales"])
def test_a_parameter_whose_name_ends_as_that_of_a_scale_is_one_whatever_it_scales(name):
    layer = nn.Linear(4, 3)
    layer.register_parameter(name, nn.Parameter(torch.ones(3, 2)))
    assert [weight.name for weight in named_weights(layer)] == ["weight"]
