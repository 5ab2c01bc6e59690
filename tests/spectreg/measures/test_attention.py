"""Bounds of attention logits against the product formed in float64, and against logits themselves."""

import math

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from spectreg import logit_bound

WIDTH, HEADS = 12, 3


def tokens():
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def drawn(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(WIDTH))
    return model.double()


def norms(Q, K, group=1):
    """‖W_QᵀW_K‖ of each head, the product formed; rows of Q and K are heads."""
    return torch.stack(
        [torch.linalg.matrix_norm(q.double().T @ K[h // group].double(), 2) for h, q in enumerate(Q)]
    ).detach()


class Own(nn.Module):
    """Attention written by hand: ``arrange`` takes x to heads × width queries and keys."""

    def __init__(self, outputs, arrange, scale=None):
        super().__init__()
        self.layer = nn.Linear(WIDTH, outputs)
        self.arrange, self.scale = arrange, scale

    def forward(self, x):
        q, k, v = self.arrange(self.layer(x))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)


def apart(y, *counts):
    """Heads of width 4 of queries, keys and values that lie one after the other."""
    return [part.unflatten(2, (-1, 4)).transpose(1, 2) for part in y.split([4 * n for n in counts], 2)]


def sequences(seed=2):
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}])
def test_each_head_of_torchs_attention_has_the_norm_of_its_product(sizes):
    model = drawn(nn.MultiheadAttention(WIDTH, HEADS, **sizes))
    Q, K = (model.q_proj_weight, model.k_proj_weight) if sizes else model.in_proj_weight.chunk(3)[:2]
    bound = logit_bound(model)[""]
    expected = norms(Q.view(HEADS, 4, -1), K.view(HEADS, 4, -1))
    torch.testing.assert_close(bound.sigma, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(bound.value, expected / 2, rtol=1e-12, atol=0)


def test_a_bound_is_met_by_the_worst_inputs_and_by_no_others():
    model = drawn(nn.MultiheadAttention(WIDTH, HEADS, bias=False))
    value = logit_bound(model)[""].value
    for h in range(HEADS):
        Q, K, _ = (W.view(HEADS, 4, WIDTH)[h] for W in model.in_proj_weight.detach().chunk(3))
        U, _, V = torch.linalg.svd(Q.T @ K)
        torch.testing.assert_close((Q @ U[:, 0]) @ (K @ V[0]) / 2, value[h])
        x, y = F.normalize(torch.randn(2, 1000, WIDTH, dtype=torch.float64), dim=2)
        assert ((x @ Q.T @ K) * y).sum(1).abs().max() / 2 < value[h]


def test_biases_count_in_the_bound_for_inputs_of_given_lengths():
    model = drawn(nn.MultiheadAttention(WIDTH, HEADS))
    bound = logit_bound(model)[""]
    Q, K, _ = (W.detach().view(HEADS, 4, WIDTH) for W in model.in_proj_weight.chunk(3))
    b, c, _ = (x.detach().view(HEADS, 4) for x in model.in_proj_bias.chunk(3))
    generator = torch.Generator().manual_seed(3)
    x, y = (F.normalize(torch.randn(4000, WIDTH, generator=generator).double(), dim=1) for _ in range(2))
    for h in range(HEADS):
        largest = (((0.5 * x @ Q[h].T + b[h]) * (3 * y @ K[h].T + c[h])).sum(1).abs() / 2).max()
        assert largest <= bound.at(0.5, 3)[h]
    torch.testing.assert_close(bound.at(0, 0), (b * c).sum(1).abs() / 2)
    expected = 0.5 * (Q.mT @ c[:, :, None]).norm(dim=(1, 2))
    torch.testing.assert_close(bound.at(1, 0) - bound.at(0, 0), expected)


ARRANGED = {
    "queries, keys, values": (9, lambda y: apart(y, 3, 3, 3), lambda W: (W[:3], W[3:6], 1)),
    "keys, values, queries": (9, lambda y: [apart(y, 3, 3, 3)[i] for i in (2, 0, 1)], lambda W: (W[6:], W[:3], 1)),
    "head by head": (
        9,
        lambda y: y.unflatten(2, (3, 3, 4)).transpose(1, 2).unbind(3),
        lambda W: (W[0::3], W[1::3], 1),
    ),
    "two keys for four queries": (8, lambda y: apart(y, 4, 2, 2), lambda W: (W[:4], W[4:6], 2)),
    "one key for all": (6, lambda y: apart(y, 4, 1, 1), lambda W: (W[:4], W[4:5], 4)),
    "keys repeated": (
        8,
        lambda y: [p.repeat_interleave(4 // p.shape[1], 1) for p in apart(y, 4, 2, 2)],
        lambda W: (W[:4], W[4:6], 2),
    ),
}


@pytest.mark.parametrize("form", ARRANGED)
def test_heads_are_told_by_what_they_do_however_they_are_stored(form):
    count, arrange, parts = ARRANGED[form]
    model = drawn(Own(4 * count, arrange, scale=0.3))
    (bound,) = logit_bound(model, sequences()).values()
    expected = norms(*parts(model.layer.weight.view(count, 4, WIDTH)))
    torch.testing.assert_close(bound.sigma, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(bound.value, 0.3 * expected, rtol=1e-6, atol=0)
    assert not bound.rotated


def test_queries_scaled_before_count_with_their_scale():
    model = drawn(Own(36, lambda y: [s * p for s, p in zip((-0.5, 2.0, 1.0), apart(y, 3, 3, 3), strict=True)]))
    (bound,) = logit_bound(model, sequences()).values()
    torch.testing.assert_close(bound.value, bound.sigma * 0.5)


def test_attention_without_heads_is_one_head():
    model = drawn(Own(36, lambda y: y.chunk(3, 2)))
    (bound,) = logit_bound(model, sequences()).values()
    Q, K, _ = model.layer.weight.chunk(3)
    torch.testing.assert_close(bound.sigma, norms(Q[None], K[None]), rtol=1e-12, atol=0)


def test_projections_with_an_adapter_beside_them_are_refused_until_it_is_merged():
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(), settings).double()
    with pytest.raises(ValueError, match=r"are no outputs of a linear layer.* an adapter: merge it"):
        logit_bound(model, tokens())
    model.merge_adapter()
    (bound,) = logit_bound(model, tokens()).values()
    Q, K, _ = model.base_model.model.h[0].attn.c_attn.base_layer.weight.T.chunk(3)
    torch.testing.assert_close(bound.sigma, norms(Q.view(3, 4, -1), K.view(3, 4, -1)), rtol=1e-12, atol=0)


def test_an_adapter_on_the_weights_of_torchs_attention_is_refused():
    model = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(4, 2)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"is wrapped by an adapter: .* merge_and_unload"):
        logit_bound(model)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_head=HEADS, n_layer=1, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return drawn(transformers.GPT2Model(config))


def llama(kind=transformers.LlamaForCausalLM, config=transformers.LlamaConfig, **settings):
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return drawn(kind(config(**sizes, head_dim=4, intermediate_size=8, vocab_size=40, **settings)))


def test_gpt2_stores_three_projections_transposed_in_one():
    model = gpt2()
    bound = logit_bound(model, tokens())["h.0.attn"]
    Q, K, _ = model.h[0].attn.c_attn.weight.T.chunk(3)
    torch.testing.assert_close(bound.sigma, norms(Q.view(3, 4, -1), K.view(3, 4, -1)), rtol=1e-12, atol=0)


def test_between_rotated_queries_and_keys_the_product_at_no_rotation_bounds_nothing():
    model = llama()
    bound = logit_bound(model, tokens())["model.layers.0.self_attn"]
    attention = model.model.layers[0].self_attn
    Q, K = attention.q_proj.weight.detach().view(3, 4, -1), attention.k_proj.weight.detach()
    expected = torch.linalg.matrix_norm(Q, 2) * torch.linalg.matrix_norm(K, 2)
    assert bound.rotated
    torch.testing.assert_close(bound.value, expected / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(bound.sigma, norms(Q, K[None], 3), rtol=1e-12, atol=0)
    turns = [torch.block_diag(*[turn(a * f) for f in (1.0, 0.37)]) for a in torch.linspace(0, 60, 400).tolist()]
    reached = torch.stack([torch.linalg.matrix_norm(Q.mT @ R @ K, 2) for R in turns]).amax(0)
    assert (reached <= expected).all()
    assert (reached > bound.sigma).any()


def turn(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def test_logits_of_a_real_model_stay_below_the_bound():
    model = llama()
    seen = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["hidden_states"].norm(dim=2).max()), with_kwargs=True
    )
    bound = logit_bound(model, tokens())["model.layers.0.self_attn"]
    logits = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                q, k = args[:2]
                logits.append((q @ k.repeat_interleave(3 // k.shape[1], 1).mT).abs().amax((0, 2, 3)) / 2)
            return function(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        model(tokens())
    assert (logits[0] <= bound.at(seen[0].item())).all()
    assert (logits[0] > 0.02 * bound.at(seen[0].item())).all()


@pytest.mark.parametrize("cast", [True, False])
def test_a_model_in_low_precision_is_told_as_well(cast):
    model = llama().float()
    expected = logit_bound(model, tokens())["model.layers.0.self_attn"]
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found = logit_bound(model if cast else model.bfloat16(), tokens())["model.layers.0.self_attn"]
    assert found.rotated
    torch.testing.assert_close(found.value, expected.value, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_normalized_queries_are_refused(dtype):
    model = llama(transformers.Qwen3ForCausalLM, transformers.Qwen3Config).to(dtype)
    with pytest.raises(ValueError, match=r"queries of the attention in 'model.layers.0.self_attn' are no outputs"):
        logit_bound(model, tokens())


def test_a_softmax_of_its_own_is_refused():
    model = llama(attn_implementation="eager")
    with pytest.raises(ValueError, match=r"self_attn' .* takes a softmax of its own.*attn_implementation='sdpa'"):
        logit_bound(model, tokens())


def test_an_example_that_cannot_tell_heads_apart_is_refused():
    with pytest.raises(ValueError, match="the example cannot tell"):
        logit_bound(drawn(Own(36, lambda y: apart(y, 3, 3, 3))), torch.zeros(2, 6, WIDTH, dtype=torch.float64))


def test_heads_that_differ_only_in_what_the_example_lacks_are_refused():
    model, x = drawn(Own(36, lambda y: apart(y, 3, 3, 3))), sequences()
    with torch.no_grad():
        model.layer.weight[4:8, 1:] = model.layer.weight[:4, 1:]
        model.layer.bias[4:8] = model.layer.bias[:4]
    assert len(logit_bound(model, x)[""].sigma) == 3
    x[..., 0] = 0
    with pytest.raises(ValueError, match="the example cannot tell"):
        logit_bound(model, x)


class Halved(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(args[0] / 2, *args[1:], **kwargs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear has no nn.MultiheadAttention: give an example"),
        (Halved(4, 2), "has a forward of its own"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "has bias_k, a key that no weight makes"),
    ],
)
def test_what_is_not_known_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        logit_bound(model)


def test_an_example_without_attention_is_refused():
    with pytest.raises(ValueError, match="called no scaled_dot_product_attention"):
        logit_bound(nn.Linear(2, 2), torch.ones(3, 2))


def test_the_model_is_left_as_found():
    model = gpt2().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    logit_bound(model, tokens())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("unit", [1e-160, 1e160])
def test_the_units_of_the_weights_do_not_matter(unit):
    model = drawn(nn.MultiheadAttention(WIDTH, HEADS, bias=False))
    expected = logit_bound(model)[""].sigma
    with torch.no_grad():
        model.in_proj_weight[:WIDTH] *= unit
        model.in_proj_weight[WIDTH : 2 * WIDTH] /= unit
    torch.testing.assert_close(logit_bound(model)[""].sigma, expected, rtol=1e-10, atol=0)


def test_the_heads_are_cut_as_the_forward_pass_cuts_them():
    layer = drawn(nn.MultiheadAttention(WIDTH, 4, bias=False))
    layer.num_heads = 2
    Q, K, _ = layer.in_proj_weight.chunk(3)
    expected = norms(Q.unflatten(0, (2, -1)), K.unflatten(0, (2, -1))) / math.sqrt(WIDTH / 2)
    torch.testing.assert_close(logit_bound(layer)[""].value, expected)


class OneHead(nn.Module):
    """Attention of one head written by hand, in three dimensions; ``head`` gives probabilities of tokens at the end."""

    def __init__(self, softmax, attends=True):
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.q, self.k, self.head = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.softmax, self.attends = softmax, attends

    def forward(self, x):
        x, _ = self.first(x, x, x, need_weights=False)
        if self.attends:
            x = self.softmax((self.q(x) @ self.k(x).mT) / WIDTH**0.5) @ x
        return torch.softmax(self.head(x) @ self.q.weight.t(), dim=-1)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda a: a.softmax(-1),
        lambda a: torch.softmax(input=a, dim=2),
        lambda a: F.softmax(a.masked_fill(a > 9, 0), -1),
    ],
)
def test_attention_by_hand_of_one_head_is_refused_by_name_and_no_other_softmax_is(softmax):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"OneHead.* takes a softmax of its own"):
        logit_bound(drawn(OneHead(softmax)), x)
    assert list(logit_bound(drawn(OneHead(softmax, attends=False)), x)) == ["first"]
