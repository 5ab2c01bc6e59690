"""Spectral norms held at or below a cap after each step of the optimizer, against an SVD."""

import copy

import pytest
import torch
import torch.distributed as dist
from cases import KINDS, Kind, gpt2_projection, mlp, seeded, unchecked_types
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from spectreg import SpectralNormCap, SpectralNormRegularizer

PROMISE = 1e-3


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x))).transpose(1, 2)


def batch(model: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Targets that do not depend on the inputs: the weights grow as far as they are let."""
    if isinstance(model, Transformer):
        return tuple(torch.randint(20, (2, 16, 6), generator=generator))
    return torch.randn(32, 32, generator=generator), torch.randint(10, (32,), generator=generator)


def optimizers(name: str, model: nn.Module, weights: list[Tensor]) -> list[torch.optim.Optimizer]:
    if name == "AdamW":
        return [torch.optim.AdamW(model.parameters(), lr=0.01)]
    ids = {id(w) for w in weights}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.Muon(weights, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


@pytest.mark.untraced
@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "name", "value", "settings"),
    [
        (perceptron, "Muon", 1.0, {}),
        (perceptron, "AdamW", "shape", {"retract": True}),
        (perceptron, "AdamW", 1.0, {"by": "clip"}),
        (Transformer, "Muon", "shape", {"retract": True}),
        (Transformer, "AdamW", 1.0, {}),
        (Transformer, "Muon", 1.0, {"by": "clip"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_through_300_steps_every_norm_is_within_a_thousandth_of_the_cap(build, name, settings, value):
    model, retract = build(), "retract" in settings
    cap = SpectralNormCap(model, value, **settings)
    weights = [w.tensor for w in cap.weights]
    several = optimizers(name, model, weights)
    cap.attach(several[0])
    generator, worst, touched = torch.Generator().manual_seed(1), -1.0, 0
    data = [batch(model, generator) for _ in range(8)]
    for step in range(300):
        x, y = data[step % 8]
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        for optimizer in several:
            optimizer.step()
        for w in cap.weights:
            blocks = w.tensor.detach().double().chunk(3 if "in_proj" in w.name else 1)  # queries, keys, values
            excess = max(torch.linalg.matrix_norm(block, 2).item() for block in blocks) / cap.caps[w.name] - 1
            worst = max(worst, abs(excess) if retract else excess)
            touched += abs(excess) < PROMISE
    assert worst <= PROMISE
    assert touched > 300


def norms(kind: Kind, W: Tensor) -> Tensor:
    """The norm of each block, or of the whole map if the blocks are on the diagonal of one."""
    each = torch.stack([torch.linalg.matrix_norm(m, 2) for m in kind.matrices(W.detach())])
    return each if kind.each else each.max()


@pytest.mark.parametrize("retract", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_every_kind_of_weight_is_scaled_block_by_block_where_these_are_maps_of_their_own(kind, retract):
    model = seeded(kind.build)
    W = dict(model.named_parameters())[kind.weight]
    before, old = norms(kind, W), W.detach().clone()
    c = before.max().item() * 0.7
    cap = SpectralNormCap(model, c, retract=retract, select=lambda name, _: name == kind.weight,
                          **kind.settings)  # fmt: skip
    cap.apply()
    after = torch.full_like(before, c) if retract else before.clamp_max(c)
    torch.testing.assert_close(norms(kind, W), after, rtol=1e-6, atol=0)
    torch.testing.assert_close(cap.sigma()[kind.weight], norms(kind, W).max(), rtol=1e-6, atol=0)
    if before.ndim == 0:
        torch.testing.assert_close(W.detach(), old * (c / before), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.settings.get("map") != "operator"], ids=repr)
def test_clipping_leaves_of_every_block_its_singular_vectors_and_the_values_below_the_cap(kind):
    model = seeded(kind.build)
    W = dict(model.named_parameters())[kind.weight]
    old = [m.clone() for m in kind.matrices(W.detach())]
    values = torch.cat([torch.linalg.svdvals(m) for m in old]).sort().values
    c = values[len(values) // 2].item() * 0.99
    cap = SpectralNormCap(model, c, by="clip", select=lambda name, _: name == kind.weight, **kind.settings)
    cap.apply()
    for m, new in zip(old, kind.matrices(W.detach()), strict=True):
        U, S, V = torch.linalg.svd(m, full_matrices=False)
        torch.testing.assert_close(new, U * S.clamp_max(c) @ V, rtol=1e-9, atol=1e-9)
    assert cap.sigma()[kind.weight].item() == pytest.approx(c)


@pytest.mark.parametrize("by", ["scale", "clip"])
def test_a_weight_below_its_cap_is_left_as_it_is_to_the_bit(by):
    model, plain = mlp(), mlp()
    SpectralNormCap(model, 100.0, by=by).apply()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_cap_in_units_of_the_shape_is_the_root_of_outputs_over_inputs_times_the_factor():
    model = mlp(widths=(4, 9, 2))
    SpectralNormCap(model, "shape", factor=0.1, retract=True).apply()
    assert torch.linalg.matrix_norm(model[0].weight.detach(), 2).item() == pytest.approx(0.15)
    assert torch.linalg.matrix_norm(model[2].weight.detach(), 2).item() == pytest.approx(0.1 * (2 / 9) ** 0.5)


def test_a_weight_that_no_pattern_matches_and_a_frozen_one_are_left_alone():
    model, plain = mlp(), mlp()
    model[2].weight.requires_grad_(False)
    cap = SpectralNormCap(model, {"0.*": 0.1, "2.*": 0.1})
    cap.apply()
    assert torch.equal(model[2].weight, plain[2].weight)
    assert torch.equal(model[4].weight, plain[4].weight)
    assert list(cap.sigma()) == ["0.weight"]
    assert torch.linalg.matrix_norm(model[0].weight.detach(), 2).item() == pytest.approx(0.1)


@pytest.mark.parametrize("settings", [{"retract": True}, {"by": "clip"}], ids=repr)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_that_is_zero_or_not_finite_is_left_and_the_next_one_is_found_again(value, settings):
    model = nn.Linear(6, 5, bias=False).double()
    cap = SpectralNormCap(model, 0.5, **settings)
    with torch.no_grad():
        model.weight.fill_(value)
        cap.apply()
        assert torch.equal(model.weight.nan_to_num(7.0), torch.full_like(model.weight, value).nan_to_num(7.0))
        model.weight.copy_(torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    cap.apply()
    assert torch.linalg.matrix_norm(model.weight.detach(), 2).item() == pytest.approx(0.5, rel=PROMISE)


@pytest.mark.parametrize("by", ["scale", "clip"])
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_weights_whose_squares_float32_cannot_hold_are_capped(size, by):
    model = seeded(lambda: nn.Linear(6, 5, bias=False)).float()
    with torch.no_grad():
        model.weight.mul_(size)
    cap = SpectralNormCap(model, size / 100, by=by)
    cap.apply()
    assert torch.linalg.matrix_norm(model.weight.detach().double(), 2).item() == pytest.approx(size / 100, rel=1e-5)


@pytest.mark.parametrize("by", ["scale", "clip"])
@pytest.mark.parametrize("jump", [1.1, 2.0])
def test_a_weight_far_below_its_cap_is_brought_to_it_in_the_step_in_which_a_new_direction_takes_it_above(jump, by):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Linear(256, 256, bias=False)
        cap = SpectralNormCap(model, 1.0, by=by)
        with torch.no_grad():
            model.weight.copy_(torch.randn(256, 256, generator=generator) / 64)
            for _ in range(4):
                cap.apply()
            a, b = (x / x.norm() for x in torch.randn(2, 256, generator=generator))
            model.weight.add_(jump * torch.outer(a, b))
        cap.apply()
        assert torch.linalg.matrix_norm(model.weight.detach().double(), 2).item() <= 1 + PROMISE


class Products(TorchDispatchMode):
    """Counts products of matrices with anything."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__ in ("mv", "mm", "bmm", "addmv_", "addmm_", "_linalg_eigh")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("by", ["scale", "clip"])
def test_weights_far_below_their_caps_take_the_products_of_one_power_step(by):
    model = mlp()
    cap, regularizer = SpectralNormCap(model, 100.0, by=by), SpectralNormRegularizer(model, 1.0, tracked=8)
    counts = []
    for act in (cap.apply, regularizer.sigma):
        act()
    for act in (cap.apply, lambda: regularizer._state.step()):
        with Products() as products:
            act()
        counts.append(products.count)
    assert counts[0] <= counts[1]


def trained(model: nn.Module, cap: SpectralNormCap, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_a_capped_training_goes_on_from_a_saved_state_and_in_a_copy_as_if_it_had_not_been_interrupted():
    whole, cut = mlp(), mlp()
    cap, first = (SpectralNormCap(m, 0.3, retract=True, tracked=1, depth=1, warmup=0) for m in (whole, cut))
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    cap.attach(optimizer)
    trained(whole, cap, optimizer, 6)
    optimizer = torch.optim.SGD(cut.parameters(), lr=0.1)
    trained(cut, first.attach(optimizer), optimizer, 3)
    copied, its = copy.deepcopy((cut, first))
    second = SpectralNormCap(cut, 0.3, retract=True, tracked=1, depth=1, warmup=0)
    second.load_state_dict(first.state_dict())
    first.detach()
    for model, follower in ((cut, second), (copied, its)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trained(model, follower.attach(optimizer), optimizer, 3)
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))


class Averaging(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_what_a_cap_cannot_act_on_is_refused_by_name():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cap = SpectralNormCap(model, 1.0).attach(optimizer)
    with pytest.raises(RuntimeError, match="this cap is attached already"):
        cap.attach(optimizer)
    with pytest.raises(ValueError, match="between two averages that it keeps, which would not be capped"):
        SpectralNormCap(model, 1.0).attach(Averaging(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"does not hold 2.weight, 4.weight"):
        SpectralNormCap(model, 1.0).attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"weight '0.weight' is torch.bfloat16, whose rounding is coarser"):
        SpectralNormCap(mlp().bfloat16(), 1.0)
    with pytest.raises(ValueError, match=r"cap of '0.weight' is -1.0: it must be a finite number above 0, or 'shape'"):
        SpectralNormCap(model, -1.0)
    with pytest.raises(ValueError, match="depth is 0: it must be a whole number from 1"):
        SpectralNormCap(model, 1.0, depth=0)
    with pytest.raises(ValueError, match="by is 'norm': it must be 'scale' or 'clip'"):
        SpectralNormCap(model, 1.0, by="norm")
    with pytest.raises(ValueError, match="retract and depth are for by='scale'"):
        SpectralNormCap(model, 1.0, by="clip", depth=4)
    convolution = nn.Conv2d(2, 2, 3)
    with pytest.raises(ValueError, match="'weight' is no matrix by itself"):
        SpectralNormCap(convolution, 1.0, by="clip", map="operator", input_size=(4, 4)).apply()
    with pytest.raises(ValueError, match="cap: no weight matches 'x'"):
        SpectralNormCap(model, {"x": 1.0})
    with pytest.raises(ValueError, match="is under a parametrization"):
        SpectralNormCap(nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3))), 1.0).apply()
    with pytest.raises(ValueError, match="format version None"):
        cap.load_state_dict({})


def test_several_optimizers_cap_the_weights_that_each_of_them_holds_and_none_after_detaching():
    model = mlp()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model[::2]]
    before = model[2].weight.detach().clone()
    cap = SpectralNormCap(model, 0.1).attach(*optimizers)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers[0].step()
    assert torch.linalg.matrix_norm(model[0].weight.detach(), 2).item() == pytest.approx(0.1)
    assert torch.equal(model[2].weight, before)
    cap.detach()
    optimizers[1].step()
    assert torch.equal(model[2].weight, before)


def sharded_training() -> None:
    for settings in ({}, {"retract": True}, {"map": {"0.*": 2}}, {"by": "clip"}, {"by": "clip", "map": {"0.*": 2}}):
        plain = mlp(widths=(5, 8, 2, 3))
        sharded = copy.deepcopy(plain)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            cap = SpectralNormCap(model, 0.3, **settings).attach(optimizer)
            trained(model, cap, optimizer, 4)
        for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.full_tensor(), p)


@pytest.mark.slow
def test_a_capped_training_of_sharded_weights_equals_the_unsharded_one():
    on_ranks(2, sharded_training)


def sharded_scaling() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dim, messages in ((0, 3), (1, 5)):
        plain = mlp(widths=(5, 8, 3))
        sharded = copy.deepcopy(plain)
        for layer in (sharded[0], sharded[2]):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dim)]))
        for model in (plain, sharded):
            cap = SpectralNormCap(model, 0.5, tracked=3, warmup=2)
            cap.sigma()
            with CommDebugMode() as said:
                cap.apply()
        assert sum(said.get_comm_counts().values()) == messages
        for p, q in zip(plain[::2], sharded[::2], strict=True):
            torch.testing.assert_close(q.weight.full_tensor(), p.weight)


@pytest.mark.slow
def test_sharded_weights_are_scaled_as_whole_ones_with_a_message_for_each_product_that_needs_one():
    on_ranks(2, sharded_scaling)


def sharded_clipping() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for build in (gpt2_projection, lambda: nn.ConvTranspose2d(4, 6, 2), lambda: nn.Conv2d(4, 6, 2, groups=2)):
        for dim in (0, 1):
            plain = seeded(build)
            sharded = copy.deepcopy(plain)
            W = nn.Parameter(distribute_tensor(sharded.weight.detach(), mesh, [Shard(dim)]))
            sharded.weight = W
            c = 0.5 * torch.linalg.matrix_norm(plain.weight.detach().flatten(1), 2).item()
            for model in (plain, sharded):
                cap = SpectralNormCap(model, c, by="clip", select=lambda name, _: name == "weight", warmup=0)
                cap.sigma()
                with CommDebugMode() as said:
                    cap.apply()
            assert sum(said.get_comm_counts().values()) == 1
            torch.testing.assert_close(W.full_tensor(), plain.weight)


@pytest.mark.slow
def test_sharded_weights_are_clipped_as_whole_ones_with_one_message_whatever_is_sharded():
    on_ranks(2, sharded_clipping)


@pytest.mark.parametrize("by", ["scale", "clip"])
@pytest.mark.parametrize("growth", [1.03, 1.3])
def test_a_block_apart_from_the_rest_that_grows_later_is_held_too(by, growth):
    layer = nn.Linear(24, 24, bias=False)
    layer.weight.data = torch.diag(torch.linspace(0.5, 0.1, 24))
    cap = SpectralNormCap(layer, 1.0, by=by)
    for _ in range(100):
        cap.apply()
    for _ in range(150):
        layer.weight.data[23, 23] *= growth
        cap.apply()
        assert torch.linalg.matrix_norm(layer.weight.detach(), 2) <= 1 + PROMISE


@pytest.mark.parametrize("tracked", [2, 8])
def test_what_a_cap_does_depends_on_no_sign_of_the_vectors(tracked):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    cap = SpectralNormCap(layer, 0.5, tracked=tracked)
    cap.apply()
    twin = copy.deepcopy(layer)
    other = SpectralNormCap(twin, 0.5, tracked=tracked)
    state = cap.state_dict()
    for saved in state["vectors"].values():
        saved["u"][..., -1].neg_()
        saved["v"][..., -1].neg_()
    other.load_state_dict(state)
    for _ in range(4):
        for one, holding in ((layer, cap), (twin, other)):
            one.weight.data += 0.1 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
            holding.apply()
    torch.testing.assert_close(twin.weight, layer.weight, rtol=1e-5, atol=1e-6)


def test_weights_of_two_optimizers_are_held_after_the_steps_of_both():
    torch.manual_seed(0)
    model = nn.ModuleDict({"shared": nn.Linear(6, 6), "a": nn.Linear(6, 2), "b": nn.Linear(6, 2)})
    optimizers = {
        head: torch.optim.SGD([*model["shared"].parameters(), *model[head].parameters()], lr=5.0) for head in "ab"
    }
    SpectralNormCap(model, 1.0).attach(*optimizers.values())
    for head, optimizer in optimizers.items():
        optimizer.zero_grad()
        model[head](model["shared"](torch.randn(8, 6))).square().mean().backward()
        optimizer.step()
        assert torch.linalg.matrix_norm(model["shared"].weight.detach(), 2) <= 1 + PROMISE


def test_no_cap_at_all_and_a_seed_that_is_no_number_are_refused():
    with unchecked_types(), pytest.raises(ValueError, match="cap is None"):
        SpectralNormCap(mlp(), None)
    with unchecked_types(), pytest.raises(ValueError, match=r"seed is 1\.5"):
        SpectralNormCap(mlp(), 1.0, seed=1.5)


@pytest.mark.parametrize("own", [True, False], ids=["another optimizer", "no optimizer"])
def test_a_weight_that_is_thawed_after_attaching_is_refused_and_not_left_uncapped(own):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    model[2].requires_grad_(False)
    one, other = (torch.optim.SGD(layer.parameters(), lr=1.0) for layer in model[:2])
    SpectralNormCap(model, 1.0).attach(one, other)
    model[2].requires_grad_(True)
    if own:
        other.add_param_group({"params": list(model[2].parameters())})
    for p in model.parameters():
        p.grad = -torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'2\.weight' is not a parameter of the optimizer"):
        one.step()


@pytest.mark.parametrize("top", [1.5, 5.0, 7.9])
def test_clipping_under_autocast_holds_the_promise(top):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 64))[0] for _ in range(2))
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = U @ torch.diag(torch.linspace(top, 0.2, 64)) @ V
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    SpectralNormCap(layer, 1.0, by="clip").attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 64)).sum().backward()
        optimizer.step()
    assert torch.linalg.matrix_norm(layer.weight.detach().double(), 2) <= 1 + PROMISE


class Lookahead(torch.optim.Optimizer):
    """Every second step the weights go half the way back to slow ones that it keeps."""

    def __init__(self, base: torch.optim.Optimizer, hooked: bool) -> None:
        if hooked:
            super().__init__(base.param_groups, {})
        self.base, self.param_groups, self.state, self.steps = base, base.param_groups, base.state, 0
        self.slow = [p.detach().clone() for p in base.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))


@pytest.mark.parametrize("settings", [{}, {"retract": True}, {"by": "clip"}], ids=["scale", "retract", "clip"])
def test_a_cap_holds_after_the_step_of_a_wrapper_that_moves_the_weights_once_more(settings):
    layer = seeded(lambda: nn.Linear(8, 8, bias=False))
    layer.weight.data *= 10
    optimizer = Lookahead(torch.optim.SGD(layer.parameters(), lr=0.1), hooked=True)
    SpectralNormCap(layer, 1.0, **settings).attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.ones(3, 8, dtype=layer.weight.dtype)).sum().backward()
        optimizer.step()
        assert torch.linalg.matrix_norm(layer.weight, 2) <= 1 + PROMISE
    unhooked = Lookahead(torch.optim.SGD(layer.parameters(), lr=0.1), hooked=False)
    with unchecked_types(), pytest.raises(ValueError, match=r"Lookahead keeps weights of its own .* call apply\(\)"):
        SpectralNormCap(layer, 1.0).attach(unhooked)


class Warmup(torch.optim.Optimizer):
    """A wrapper that keeps no weights of its own, and has no state."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.scale = base, base.param_groups, torch.tensor(1.0)
        self.params = [p for group in base.param_groups for p in group["params"]]

    def step(self, closure=None):
        self.base.step(closure)


def test_a_wrapper_without_weights_of_its_own_is_no_hindrance():
    layer = seeded(lambda: nn.Linear(8, 8, bias=False))
    layer.weight.data *= 10
    optimizer = Warmup(torch.optim.SGD(layer.parameters(), lr=0.1))
    SpectralNormCap(layer, 1.0).attach(optimizer)
    layer(torch.ones(3, 8, dtype=layer.weight.dtype)).sum().backward()
    optimizer.step()
    assert torch.linalg.matrix_norm(layer.weight, 2) <= 1 + PROMISE


def test_frozen_weights_may_be_tied_after_the_first_cap():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    model[:2].requires_grad_(False)
    cap = SpectralNormCap(model, 0.1)
    cap.apply()
    model[1].weight = model[0].weight
    cap.apply()
    assert torch.linalg.matrix_norm(model[2].weight, 2) <= 0.1 * (1 + PROMISE)
