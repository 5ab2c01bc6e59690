"""What counts in the common architectures: small ones of transformers, with weights at random."""

import pytest
import torch
from truth import svd_penalty_gradient

from spectreg import SpectralNormRegularizer, named_weights, singular_values

TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 12,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}
XLNET = {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
FUNNEL = {"vocab_size": 32, "block_sizes": [1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}
LEVIT = {
    "image_size": 32,
    "hidden_sizes": [16] * 3,
    "num_attention_heads": [2] * 3,
    "depths": [1] * 3,
    "key_dim": [4] * 3,
}
SAM = {**IMAGES, "output_channels": 8, "mlp_dim": 24, "global_attn_indexes": [0], "use_rel_pos": True}
GRIFFIN = {**TEXT, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4}
BEIT = {**IMAGES, "use_relative_position_bias": True, "use_absolute_position_embeddings": True}

# Configuration, model, settings: the ends of the names of what has two dimensions longer than 1 and does not count.
LEFT_OUT = {
    "state space": ("Mamba", "ForCausalLM", TEXT | {"state_size": 4}, {"embeddings.weight", "A_log"}),
    "RWKV": ("Rwkv", "Model", TEXT | {"num_hidden_layers": 2}, {"embeddings.weight"}),
    "experts": ("Qwen3Moe", "ForCausalLM", TEXT | EXPERTS, {"embed_tokens.weight"}),
    "norms of two dimensions": (
        "Cohere", "ForCausalLM", TEXT | {"use_qk_norm": True},
        {"embed_tokens.weight", "q_norm.weight", "k_norm.weight"},
    ),
    "biases by offset": ("Levit", "Model", LEVIT, {"attention_biases"}),
    "positions and tokens": (
        "Dinov2WithRegisters", "Model", IMAGES, {"position_embeddings", "register_tokens"},
    ),
    "biases by relative position": ("Beit", "Model", BEIT, {"position_embeddings", "relative_position_bias_table"}),
    "relative positions": ("SamVision", "Model", SAM, {"pos_embed", "rel_pos_h", "rel_pos_w"}),
    "gates": ("RecurrentGemma", "Model", GRIFFIN, {"embed_tokens.weight", "input_gate_bias", "recurrent_gate_bias"}),
    "a head that is tied": ("Llama", "ForCausalLM", TEXT | {"tie_word_embeddings": True}, {"embed_tokens.weight"}),
    "a head of its own": ("Llama", "ForCausalLM", TEXT | {"tie_word_embeddings": False}, {"embed_tokens.weight"}),
    "heads as a dimension": (
        "XLNet", "Model", XLNET, {"word_embedding.weight", "r_r_bias", "r_s_bias", "r_w_bias", "seg_embed"},
    ),
    "a kernel with heads": (
        "Funnel", "BaseModel", FUNNEL, {"word_embeddings.weight", "r_r_bias", "r_s_bias", "r_w_bias", "seg_embed"},
    ),
}  # fmt: skip


def built(kind, form, settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}{form}")(getattr(transformers, f"{kind}Config")(**settings))


def end(name, ends):
    return next((e for e in ends if name.endswith(e)), name)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_all_matrices_of_an_architecture_count_but_those_listed(case):
    kind, form, settings, left_out = LEFT_OUT[case]
    model = built(kind, form, settings)
    counted = {id(w.tensor) for w in named_weights(model)}
    others = [n for n, p in model.named_parameters() if sum(s > 1 for s in p.shape) > 1 and id(p) not in counted]
    assert {end(name, left_out) for name in others} == left_out


def test_a_tied_embedding_counts_with_the_embeddings_in_every_architecture():
    for kind, form in (("Llama", "ForCausalLM"), ("GPT2", "LMHeadModel")):
        model = built(kind, form, TEXT | {"tie_word_embeddings": True})
        table = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight is table
        assert not any(w.tensor is table for w in named_weights(model))
        assert sum(w.tensor is table for w in named_weights(model, embeddings=True)) == 1


def test_each_expert_of_a_mixture_is_a_matrix_by_itself():
    model = built("Qwen3Moe", "ForCausalLM", TEXT | EXPERTS).double()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts = model.get_parameter(name)
    sigma, expected = svd_penalty_gradient(experts, list, each=True)
    regularizer = SpectralNormRegularizer(model, 1.0, select=lambda n, _: n == name, warmup=300)
    regularizer.add_gradient()
    torch.testing.assert_close(experts.grad, expected, rtol=1e-6, atol=1e-8)
    assert singular_values(model)[name].sigma == pytest.approx(sigma.item())
    together = singular_values(model, map={"*.experts.*": "joint"})[name]
    assert together.sigma == pytest.approx(torch.linalg.matrix_norm(experts.detach().flatten(1), 2).item())


def test_a_projection_with_heads_as_a_dimension_is_one_matrix():
    for kind, form, settings, name in (
        ("XLNet", "Model", XLNET, "layer.0.rel_attn.q"),
        ("Funnel", "BaseModel", FUNNEL, "encoder.blocks.0.0.attention.r_kernel"),
    ):
        model = built(kind, form, settings)
        exact = torch.linalg.matrix_norm(model.get_parameter(name).detach().flatten(1).double(), 2)
        assert singular_values(model)[name].sigma == pytest.approx(exact.item())


def test_the_state_matrix_of_a_mamba_is_left_as_it_is():
    model = built("Mamba", "ForCausalLM", TEXT | {"state_size": 4})
    before = model.get_parameter("backbone.layers.0.mixer.A_log").clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SpectralNormRegularizer(model, 0.5).attach(optimizer)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(model.get_parameter("backbone.layers.0.mixer.A_log"), before)
