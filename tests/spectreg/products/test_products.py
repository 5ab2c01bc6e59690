"""Products of weights in the penalty and the cap, against the product formed in float64."""

import copy
import math
import pickle

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from cases import unchecked_types
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from spectreg import SpectralNormCap, SpectralNormRegularizer, logit_bound, named_products, named_weights
from spectreg.maps.heads import HeadsMap
from spectreg.maps.product import Factor, ProductMap
from spectreg.weights.product import Product
from spectreg.weights.selection import Weight

WIDTH = 12


def drawn(model, seed=0):
    """In float64, every parameter from an own generator; top singular values stand clear since the mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) + 0.3) / math.sqrt(WIDTH))
    return model.double()


def tokens():
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def sequences(seed=2):
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Own(nn.Module):
    """Attention written by hand: ``arrange`` takes x to heads × width queries, keys and values."""

    def __init__(self, outputs, arrange):
        super().__init__()
        self.layer = nn.Linear(WIDTH, outputs)
        self.arrange = arrange

    def forward(self, x):
        q, k, v = self.arrange(self.layer(x))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def apart(y, width, *counts):
    return [part.unflatten(2, (-1, width)).transpose(1, 2) for part in y.split([width * n for n in counts], 2)]


def grouped(y):
    """Two keys, each stored after its own two queries and before its value."""
    q, k, v = y.unflatten(2, (2, 4, 3)).split([2, 1, 1], 3)
    return [part.flatten(2, 3).transpose(1, 2) for part in (q, k, v)]


def heads(W, width=3):
    return W.unflatten(0, (-1, width))


def gpt2():
    sizes = {"n_embd": WIDTH, "n_head": 3, "n_layer": 1, "vocab_size": 40, "n_positions": 16}
    return drawn(transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)))


def llama():
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, head_dim=4, intermediate_size=8, vocab_size=40)
    return drawn(transformers.LlamaForCausalLM(config))


def bert():
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 8}
    return drawn(transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40)))


def split(W, n=3):
    """Queries and keys of a fused q, k, v."""
    Q, K, _ = W.chunk(3)
    return [q.T @ k for q, k in zip(Q.chunk(n), K.chunk(n), strict=True)]


def of_pair(Q, K, width):
    Q, K = heads(Q, width), heads(K, width)
    return [q.T @ K[h // (len(Q) // len(K))] for h, q in enumerate(Q)]


def of_grouped(W):
    H = heads(W)
    return [H[q].T @ H[k] for q, k in ((0, 2), (1, 2), (4, 6), (5, 6))]


# Of each: the model, its example, and the products formed from its parameters by name.
ATTENTION = {
    "torch, fused": (lambda: nn.MultiheadAttention(WIDTH, 3), (), lambda p: split(p["in_proj_weight"])),
    "torch, apart": (
        lambda: nn.MultiheadAttention(WIDTH, 3, kdim=5, vdim=7), (),
        lambda p: of_pair(p["q_proj_weight"], p["k_proj_weight"], 4),
    ),
    "gpt-2": (gpt2, (tokens(),), lambda p: split(p["h.0.attn.c_attn.weight"].T)),
    "llama": (llama, (tokens(),), lambda p: of_pair(
        p["model.layers.0.self_attn.q_proj.weight"], p["model.layers.0.self_attn.k_proj.weight"], 4)),
    "bert": (bert, (tokens(),), lambda p: of_pair(
        p["encoder.layer.0.attention.self.query.weight"], p["encoder.layer.0.attention.self.key.weight"], 4)),
    "head by head": (
        lambda: Own(27, lambda y: y.unflatten(2, (3, 3, 3)).transpose(1, 2).unbind(3)), (sequences(),),
        lambda p: [q.T @ k for q, k in zip(heads(p["layer.weight"])[0::3], heads(p["layer.weight"])[1::3],
                                           strict=True)],
    ),
    "keys among their queries": (lambda: Own(24, grouped), (sequences(),), lambda p: of_grouped(p["layer.weight"])),
    "one key for all": (
        lambda: Own(18, lambda y: apart(y, 3, 4, 1, 1)), (sequences(),),
        lambda p: of_pair(p["layer.weight"][:12], p["layer.weight"][12:15], 3),
    ),
    "keys repeated": (
        lambda: Own(24, lambda y: [x.repeat_interleave(4 // x.shape[1], 1) for x in apart(y, 3, 4, 2, 2)]),
        (sequences(),), lambda p: of_pair(p["layer.weight"][:12], p["layer.weight"][12:18], 3),
    ),
}  # fmt: skip


def adapted(model, targets, **more):
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets,
                                                       init_lora_weights=False, **more))  # fmt: skip
    return drawn(model)


def lora(p, name, merged):
    """W + 3·BA from the parameters of one adapted layer, as outputs × inputs."""
    BA = 3 * p[f"{name}.lora_B.default.weight"].flatten(1) @ p[f"{name}.lora_A.default.weight"].flatten(1)
    return [BA + merged * p[f"{name}.base_layer.weight"].flatten(1)]


class Embedded(nn.Sequential):
    pass


LINEAR = "base_model.model.0"
ADAPTERS = {
    "linear": (lambda: adapted(nn.Sequential(nn.Linear(7, 5)), ["0"]), lambda p, m: lora(p, LINEAR, m)),
    "convolution": (lambda: adapted(nn.Sequential(nn.Conv2d(3, 5, 2)), ["0"]), lambda p, m: lora(p, LINEAR, m)),
    "embedding": (
        lambda: adapted(nn.Sequential(nn.Embedding(7, 5)), ["0"]),
        lambda p, m: [3 * p[f"{LINEAR}.lora_embedding_B.default"] @ p[f"{LINEAR}.lora_embedding_A.default"]
                      + m * p[f"{LINEAR}.base_layer.weight"].T],
    ),
    "gpt-2": (
        lambda: adapted(gpt2(), ["c_attn"], fan_in_fan_out=True),
        lambda p, m: [3 * p["base_model.model.h.0.attn.c_attn.lora_B.default.weight"]
                      @ p["base_model.model.h.0.attn.c_attn.lora_A.default.weight"]
                      + m * p["base_model.model.h.0.attn.c_attn.base_layer.weight"].T],
    ),
}  # fmt: skip


def normal(layer, kind, **more):
    model = drawn(
        nn.Sequential(layer, kind(layer.weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0], **more))
    )
    model[1].running_var.copy_(torch.rand(model[1].num_features, generator=torch.Generator().manual_seed(3)) + 0.1)
    return model.eval()


def scaled(matrices):
    """The blocks with their rows scaled by γ/√(var + ε), which is given as the last two entries."""

    def formed(p, var):
        gamma = p.get("1.weight", torch.ones_like(var))
        blocks = matrices(p["0.weight"])
        rows = (gamma / (var + 1e-5).sqrt()).chunk(len(blocks))
        return [s[:, None] * W for s, W in zip(rows, blocks, strict=True)]

    return formed


IMAGES = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NORMALIZED = {
    "linear": (lambda: normal(nn.Linear(6, 5), nn.BatchNorm1d), IMAGES[:, 0, :, 0].new_ones(1, 6),
               scaled(lambda W: [W])),
    "convolution": (lambda: normal(nn.Conv2d(4, 6, 3), nn.BatchNorm2d), IMAGES, scaled(lambda W: [W.flatten(1)])),
    "grouped": (lambda: normal(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d), IMAGES,
                scaled(lambda W: list(W.flatten(1).chunk(2)))),
    "transposed": (lambda: normal(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d), IMAGES,
                   scaled(lambda W: [W.transpose(0, 1).flatten(1)])),
    "no scale": (lambda: normal(nn.Conv2d(4, 6, 3), nn.BatchNorm2d, affine=False), IMAGES,
                 scaled(lambda W: [W.flatten(1)])),
}  # fmt: skip


def case(family, kind):
    """The model, its products, the function that forms them from parameters, and whether every block counts."""
    if family == "logits":
        build, example, formed = ATTENTION[kind]
        model = drawn(build())
        return model, named_products(model, "logits", *example), formed, True
    if family in ("update", "merged"):
        build, formed = ADAPTERS[kind]
        model = build()
        return model, named_products(model, family), lambda p: formed(p, float(family == "merged")), True
    build, x, formed = NORMALIZED[kind]
    model = build()
    var = model[1].running_var.clone()
    return model, named_products(model, "normalized", x), lambda p: formed(p, var), False


CASES = (
    [("logits", kind) for kind in ATTENTION]
    + [(family, kind) for family in ("update", "merged") for kind in ADAPTERS]
    + [("normalized", kind) for kind in NORMALIZED]
)


def truth(model, formed, each, phi=lambda sigma: sigma**2 / 2):
    """σ of every block of the products formed, and the gradients of Σφ(σ) by each parameter, by autograd of the SVD."""
    own = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    sigmas = torch.stack([torch.linalg.svdvals(matrix)[0] for matrix in formed(own)])
    trained = {name: p for name, p in own.items() if p.requires_grad}
    total = phi(sigmas if each else sigmas.max()).sum()
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return sigmas.detach(), dict(zip(trained, gradients, strict=True))


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("form", ["add_gradient", "penalty"])
def test_norm_and_gradient_of_every_factor_are_those_of_the_product_formed(family, kind, form):
    model, products, formed, each = case(family, kind)
    sigmas, expected = truth(model, formed, each)
    regularizer = SpectralNormRegularizer(products, 0.5, warmup=150)
    if form == "penalty":
        regularizer.penalty().backward()
    else:
        regularizer.add_gradient()
    (sigma,) = regularizer.sigma().values()
    torch.testing.assert_close(sigma, sigmas.max(), rtol=1e-9, atol=0)
    for name, parameter in model.named_parameters():
        wanted = expected.get(name)
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(
                parameter.grad, 0.5 * wanted, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_second_value_of_every_head_enters_where_two_are_asked_for():
    model = drawn(nn.MultiheadAttention(WIDTH, 3))
    W = model.in_proj_weight.detach().clone().requires_grad_()
    values = torch.stack([torch.linalg.svdvals(A)[:2] for A in split(W)])
    (0.25 * values.square().sum()).backward()
    SpectralNormRegularizer(named_products(model, "logits"), 0.5, k=2, tracked=4, warmup=150).add_gradient()
    torch.testing.assert_close(model.in_proj_weight.grad, W.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[0] != "merged" and "no scale" not in case])
@pytest.mark.parametrize("retract", [False, True])
def test_a_cap_brings_every_block_to_it_and_the_rest_of_each_product_with_it(family, kind, retract):
    model, products, formed, each = case(family, kind)
    before = torch.stack(formed(dict(model.named_parameters()))).detach()
    others = {name: p.detach().clone() for name, p in model.named_parameters()}
    sigmas = torch.linalg.matrix_norm(before, 2)
    c = sigmas.max().item() * (0.8 if each else 0.5)
    SpectralNormCap(products, c, retract=retract, warmup=60).apply()
    by = c / (sigmas if each else sigmas.max().expand(len(sigmas)))
    by = by if retract else by.clamp_max(1.0)
    after = torch.stack(formed(dict(model.named_parameters()))).detach()
    torch.testing.assert_close(after, by[:, None, None] * before, rtol=1e-6, atol=1e-9)
    held = {id(T) for product in products for T in product.tensor if T.requires_grad}
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if id(p) not in held)


@pytest.mark.parametrize("kind", ["torch, fused", "gpt-2", "llama"])
def test_both_factors_of_a_capped_product_are_scaled_by_the_root(kind):
    build, example, _ = ATTENTION[kind]
    model = drawn(build())
    (product,) = named_products(model, "logits", *example)
    W = product.tensor
    before = [factor.map.matrices(x).detach().clone() for factor, x in zip(product.factors, W, strict=True)]
    SpectralNormCap([product], 1e-3, retract=True, warmup=60).apply()
    after = [factor.map.matrices(x).detach() for factor, x in zip(product.factors, W, strict=True)]
    K, Q = ((y.norm(dim=(1, 2)) / x.norm(dim=(1, 2))) for x, y in zip(before, after, strict=True))
    if len(K) == len(Q):
        torch.testing.assert_close(K, Q)
    else:  # of the queries that share a key, those of the largest norm
        torch.testing.assert_close(K, Q.view(len(K), -1).amin(1))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_weight_is_brought_below_its_cap_by_its_adapter_alone(kind):
    model, products, formed, _ = case("merged", kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (sum_,) = formed(dict(model.named_parameters()))
    base = torch.linalg.matrix_norm(formed({n: p * (0 if "lora" in n else 1) for n, p in before.items()})[0], 2)
    sigma = torch.linalg.matrix_norm(sum_.detach(), 2)
    assert sigma > base
    c = (base + 0.7 * (sigma - base)).item()
    cap = SpectralNormCap(products, c)
    for _ in range(20):
        cap.apply()
        (after,) = formed(dict(model.named_parameters()))
        norm = torch.linalg.matrix_norm(after.detach(), 2).item()
        assert norm <= c * 1.001
    assert norm > 0.5 * c
    torch.testing.assert_close(next(iter(cap.sigma().values())).item(), norm, rtol=1e-3, atol=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora" not in name)
    with pytest.raises(ValueError, match=r"but what is frozen of it has the norm .* no scaling of the rest"):
        SpectralNormCap(products, 0.9 * base.item()).apply()
    with pytest.raises(ValueError, match=r"retract=True scales .* part of that sum is frozen"):
        SpectralNormCap(products, c, retract=True).apply()


@pytest.mark.slow
@pytest.mark.untraced
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6),
    st.sampled_from(["float64", "float32"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_for_any_heads_and_sharing_the_norm_is_that_of_the_product_formed(keys, shared, width, inputs, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Module()
    module.W = nn.Parameter(torch.randn((keys * shared + keys) * width, inputs, generator=generator,
                                        dtype=getattr(torch, dtype)))  # fmt: skip
    order = torch.randperm(keys * shared + keys, generator=generator).tolist()
    q, k = order[keys:], order[:keys]
    product = of_heads(module, width, q, k)
    H = heads(module.W.detach().double(), width)
    formed = torch.stack([H[slot].T @ H[k[i // shared]] for i, slot in enumerate(q)])
    torch.testing.assert_close(product.map.matrices(product.tensor).double(), formed, rtol=1e-5, atol=1e-5)
    regularizer = SpectralNormRegularizer([product], 1.0, warmup=100, tracked=2)
    expected = torch.linalg.matrix_norm(formed, 2)
    torch.testing.assert_close(regularizer.sigma()["logits"].double(), expected.max(), rtol=1e-3, atol=1e-6)
    assert (regularizer.residual()["logits"] <= 0.1 * expected.max() + 1e-6).all()
    c = expected.max().item() / 3
    SpectralNormCap([product], c, warmup=100).apply()
    H = heads(module.W.detach().double(), width)
    after = torch.stack([H[slot].T @ H[k[i // shared]] for i, slot in enumerate(q)])
    wanted = (c / expected).clamp_max(1.0)[:, None, None] * formed
    torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-3 * c)


def of_heads(module, width, queries, keys):
    """A product of heads of ``module.W``, as a model with those would have."""
    shape = tuple(module.W.shape)
    K, Q = (Weight("W", module, "W", HeadsMap(shape, width, tuple(slots)), shape) for slots in (keys, queries))
    chain = (Factor(0, K.map, shared=len(queries) // len(keys), share=0.5), Factor(1, Q.map, turned=True, share=0.5))
    m = ProductMap((chain,), shape[1], shape[1], len(queries), "each")
    return Product("logits", module, "", m, (shape, shape), parts=(K, Q))


def step(model, example, regularizer, optimizer, steps=3):
    regularizer.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*example).square().mean().backward()
        optimizer.step()
    regularizer.detach()


def own():
    return drawn(Own(18, lambda y: apart(y, 3, 4, 1, 1)))


def test_attached_it_does_before_each_step_what_adding_the_gradient_by_hand_does():
    by_hand, attached = own(), own()
    x = sequences()
    step(attached, (x,), SpectralNormRegularizer(named_products(attached, "logits", x), 0.3),
         torch.optim.SGD(attached.parameters(), lr=0.1))  # fmt: skip
    regularizer = SpectralNormRegularizer(named_products(by_hand, "logits", x), 0.3)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        by_hand(x).square().mean().backward()
        regularizer.add_gradient()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(by_hand.parameters(), attached.parameters(), strict=True))


def test_decoupled_it_moves_both_factors_by_their_gradients_times_their_learning_rates():
    model = drawn(nn.MultiheadAttention(WIDTH, 3, kdim=5, vdim=7))
    (product,) = named_products(model, "logits")
    Q, K = model.q_proj_weight, model.k_proj_weight
    _, expected = truth(model, lambda p: of_pair(p["q_proj_weight"], p["k_proj_weight"], 4), each=True)
    before = Q.detach().clone(), K.detach().clone()
    others = [p for p in model.parameters() if p is not Q and p is not K]
    groups = [{"params": [Q], "lr": 0.1}, {"params": [K], "lr": 0.01}, {"params": others, "lr": 1.0}]
    optimizer = torch.optim.SGD(groups)
    SpectralNormRegularizer([product], 0.5, decoupled=True, warmup=150).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(Q.detach(), before[0] - 0.05 * expected["q_proj_weight"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(K.detach(), before[1] - 0.005 * expected["k_proj_weight"], rtol=1e-6, atol=1e-9)


def test_training_goes_on_from_a_saved_state_a_copy_and_a_pickle_as_if_it_had_not_been_interrupted():
    def build():
        model = adapted(nn.Sequential(nn.Linear(7, 5)), ["0"])
        regularizer = SpectralNormRegularizer(named_products(model, "merged"), 0.3, warmup=1)
        return model, regularizer, (torch.ones(2, 7, dtype=torch.float64),)

    def optimizer(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)

    whole, regularizer, x = build()
    step(whole, x, regularizer, optimizer(whole), 6)
    cut, first, _ = build()
    step(cut, x, first, optimizer(cut), 3)
    pairs = [copy.deepcopy((cut, first)), pickle.loads(pickle.dumps((cut, first)))]
    second = SpectralNormRegularizer(named_products(cut, "merged"), 0.3, warmup=1)
    second.load_state_dict(first.state_dict())
    for model, its in [*pairs, (cut, second)]:
        step(model, x, its, optimizer(model))
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))


def test_weights_and_products_stand_together_in_one_regularizer_each_with_its_strength():
    model = drawn(nn.MultiheadAttention(WIDTH, 3))
    both = [*named_weights(model), *named_products(model, "logits")]
    regularizer = SpectralNormRegularizer(both, {"logits": 0.5, "out*": 0.25}, warmup=150)
    regularizer.add_gradient()
    _, expected = truth(model, lambda p: split(p["in_proj_weight"]), each=True)
    torch.testing.assert_close(model.in_proj_weight.grad, 0.5 * expected["in_proj_weight"], rtol=1e-6, atol=1e-9)
    sigma = regularizer.sigma()["out_proj.weight"]
    assert model.out_proj.weight.grad.norm().item() == pytest.approx(0.25 * sigma.item())
    assert "3 × 12 × 12, a product" in regularizer.summary()
    assert regularizer.stable_rank()["logits"].isnan()


def test_only_the_factor_that_is_trained_gets_the_gradient_or_is_scaled():
    model = drawn(nn.MultiheadAttention(WIDTH, 3, kdim=5, vdim=7))
    model.k_proj_weight.requires_grad_(False)
    products = named_products(model, "logits")
    _, expected = truth(model, lambda p: of_pair(p["q_proj_weight"], p["k_proj_weight"], 4), each=True)
    regularizer = SpectralNormRegularizer(products, 1.0, warmup=300)
    regularizer.add_gradient()
    torch.testing.assert_close(model.q_proj_weight.grad, expected["q_proj_weight"], rtol=1e-6, atol=1e-9)
    assert model.k_proj_weight.grad is None
    before = model.k_proj_weight.clone()
    SpectralNormCap(products, 0.01, retract=True, warmup=60).apply()
    after = torch.stack(of_pair(model.q_proj_weight, model.k_proj_weight, 4)).detach()
    torch.testing.assert_close(torch.linalg.matrix_norm(after, 2), torch.full((3,), 0.01, dtype=torch.float64))
    assert torch.equal(model.k_proj_weight, before)


def test_a_product_of_a_weight_with_itself_has_the_gradient_of_both_of_its_places():
    module = nn.Module()
    module.W = nn.Parameter(torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    product = of_heads(module, 3, [0, 1], [0, 1])
    _, expected = truth(module, lambda p: [h.T @ h for h in heads(p["W"])], each=True)
    SpectralNormRegularizer([product], 1.0, warmup=150).add_gradient()
    torch.testing.assert_close(module.W.grad, expected["W"], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="'W' would be scaled for 'logits' and for 'logits'"):
        SpectralNormCap([product], 1.0)


def test_the_zero_product_of_a_fresh_adapter_has_norm_zero_no_gradient_and_is_found_once_it_is_not():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(7, 5)), peft.LoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    regularizer = SpectralNormRegularizer(named_products(model, "update"), 1.0)
    regularizer.add_gradient()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert next(iter(regularizer.sigma().values())) == 0
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1.0)
    for _ in range(30):
        regularizer.add_gradient()
    BA = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(next(iter(regularizer.sigma().values())), torch.linalg.matrix_norm(BA, 2))
    layer.scaling["default"] *= 2
    regularizer.add_gradient()
    torch.testing.assert_close(next(iter(regularizer.sigma().values())), 2 * torch.linalg.matrix_norm(BA, 2))


def test_adapters_that_are_summed_and_those_in_low_precision_are_taken_together():
    model = adapted(nn.Sequential(nn.Linear(7, 5)), ["0"])
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model = model.float()
    layer = model.base_model.model[0]
    layer.base_layer.bfloat16()
    terms = [layer.scaling[a] * layer.lora_B[a].weight @ layer.lora_A[a].weight for a in ("default", "other")]
    for kind, formed in (("update", sum(terms)), ("merged", layer.base_layer.weight.float() + sum(terms))):
        regularizer = SpectralNormRegularizer(named_products(model, kind), 1.0, warmup=100)
        sigma = regularizer.sigma()[f"base_model.model.0.{kind}"]
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(formed.detach(), 2), rtol=1e-5, atol=0)


def test_sigma_is_what_the_measure_of_the_same_product_says():
    model = llama()
    (bound,) = logit_bound(model, tokens()).values()
    regularizer = SpectralNormRegularizer(named_products(model, "logits", tokens()), 1.0, warmup=150)
    torch.testing.assert_close(regularizer.sigma()["model.layers.0.self_attn.logits"], bound.sigma.max())


@pytest.mark.slow
@pytest.mark.parametrize("retract", [False, True])
def test_through_steps_of_adamw_the_logits_of_grouped_queries_stay_within_a_thousandth_of_their_cap(retract):
    model, c = llama().float(), 0.8
    products = named_products(model, "logits", tokens())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    SpectralNormCap(products, c, retract=retract).attach(optimizer)
    generator, worst, touched = torch.Generator().manual_seed(5), -1.0, 0
    attention = model.model.layers[0].self_attn
    for _ in range(100):
        x = torch.randint(40, (4, 8), generator=generator)
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        optimizer.step()
        formed = torch.stack(of_pair(attention.q_proj.weight.double(), attention.k_proj.weight.double(), 4)).detach()
        excess = torch.linalg.matrix_norm(formed, 2) / c - 1
        worst = max(worst, (excess.abs() if retract else excess).max().item())
        touched += int((excess.abs() < 1e-3).any())
    assert worst <= 1e-3
    assert touched > 50


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: named_products(own(), "attention", sequences()), "unknown kind of product 'attention': it is one of"),
        (lambda: named_products(own(), "logits"), "has no nn.MultiheadAttention: give an example"),
        (lambda: named_products(own(), "update"), "has no active adapter"),
        (lambda: named_products(own(), "merged", sequences()), "adapters are told without an example"),
        (lambda: named_products(own(), "normalized"), "which normalization follows which layer shows on an example"),
        (lambda: named_products(own(), "normalized", sequences()), "no batch normalization takes the output"),
        (lambda: SpectralNormRegularizer([], 1.0), "the list of weights and products is empty"),
        (lambda: SpectralNormRegularizer(named_weights(own()) * 2, 1.0), "'layer.weight' is in the list twice"),
        (lambda: SpectralNormRegularizer(named_weights(own()), 1.0, map="each"), "map is for the weights of a model"),
    ],
)  # fmt: skip
def test_what_is_no_product_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_parameters_in_place_of_a_model_are_refused():
    with (
        unchecked_types(),
        pytest.raises(TypeError, match=r"give the nn.Module itself, not its parameters"),
    ):
        SpectralNormRegularizer(list(own().parameters()), 1.0)


def test_heads_that_cannot_be_told_apart_are_refused():
    model = own()
    with torch.no_grad():
        model.layer.weight[3:6] = model.layer.weight[:3]
        model.layer.bias[3:6] = model.layer.bias[:3]
    with pytest.raises(ValueError, match="have the same weights, so that it cannot be told"):
        named_products(model, "logits", sequences())


def test_projections_that_cannot_be_told_apart_are_refused():
    model = llama()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight.copy_(attention.k_proj.weight)
    with pytest.raises(ValueError, match="have the same weights, so that it cannot be told"):
        named_products(model, "logits", tokens())


def test_adapters_that_are_merged_or_switched_since_are_refused():
    model = adapted(nn.Sequential(nn.Linear(7, 5)), ["0"])
    regularizer = SpectralNormRegularizer(named_products(model, "update"), 1.0)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"were active when this was built, and now \['default'\] are, merged"):
        regularizer.add_gradient()
    with pytest.raises(ValueError, match="are merged into its weight: unmerge them"):
        named_products(model, "update")
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(RuntimeError, match=r"and now \[\] are"):
        regularizer.add_gradient()
    regularizer.add_gradient()


def test_what_a_cap_of_products_cannot_do_is_refused_by_name():
    build, x, _ = NORMALIZED["no scale"]
    with pytest.raises(ValueError, match=r"no factor of the product '0.normalized' that could be scaled is trained"):
        SpectralNormCap(named_products(build(), "normalized", x), 1.0).apply()
    model = drawn(nn.MultiheadAttention(WIDTH, 3))
    both = [*named_weights(model), *named_products(model, "logits")]
    with pytest.raises(ValueError, match="'in_proj_weight' would be scaled for 'in_proj_weight' and for 'logits'"):
        SpectralNormCap(both, 1.0)
    with pytest.raises(ValueError, match=r"weight 'logits' is torch.bfloat16, whose rounding is coarser"):
        SpectralNormCap(named_products(model.bfloat16(), "logits"), 1.0)


def test_factors_in_several_optimizers_or_in_none_are_refused():
    model = drawn(nn.MultiheadAttention(WIDTH, 3, kdim=5, vdim=7))
    regularizer = SpectralNormRegularizer(named_products(model, "logits"), 1.0)
    Q, K = (torch.optim.SGD([p], lr=0.1) for p in (model.q_proj_weight, model.k_proj_weight))
    with pytest.raises(ValueError, match="the factors of 'logits' are held by several optimizers"):
        regularizer.attach(Q, K)
    with pytest.raises(ValueError, match="the optimizer does not hold logits"):
        regularizer.attach(Q)


def test_the_model_is_left_as_found():
    model = gpt2().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    named_products(model, "logits", tokens())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def sharded_product() -> None:
    model = drawn(nn.MultiheadAttention(WIDTH, 3))
    regularizer = SpectralNormRegularizer(named_products(model, "logits"), 1.0)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(NotImplementedError, match=r"a factor of the product 'logits' is sharded .* act on the factors"):
        regularizer.add_gradient()
    with pytest.raises(ValueError, match=r"parameter 'in_proj_weight' is sharded \(a DTensor\)"):
        named_products(model, "logits")


@pytest.mark.slow
def test_products_of_sharded_factors_are_refused_by_name():
    on_ranks(1, sharded_product)


@pytest.mark.parametrize("edit", [lambda W: W.data.mul_(2.5), lambda W: W.detach().mul_(2.5)], ids=["data", "detach"])
def test_a_cap_of_a_merged_weight_sees_every_edit_of_what_is_frozen(edit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    cap = SpectralNormCap(named_products(model, "merged"), 4.0)
    cap.apply()
    edit(W)
    U, _, V = torch.linalg.svd(W.detach())
    A.data.copy_(1.5 * V)
    B.data.copy_(2 * U)  # the update now adds to what is frozen
    cap.apply()
    assert torch.linalg.matrix_norm(W + B @ A, 2) <= 4.0 * (1 + 1e-3)
