import copy
import math

import pytest
import torch
from altered import ALTERED, AS_THEIR_ATTRIBUTES_SAY, dense, snapshot
from cases import seeded, unchecked_types
from hypothesis import given, settings
from hypothesis import strategies as st
from stretch import Apply, largest_stretch
from torch import nn
from torch.nn import functional as F

from spectreg.lipschitz.convolution_bound import norm_bound
from spectreg.lipschitz.network import lipschitz_bound
from spectreg.measures.jacobian import jacobian_norm


def settled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """float64, with batch statistics of random data."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *shape, dtype=torch.float64, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(-2, 2, generator=generator)
                module.bias.normal_(generator=generator)
    return model


def local_norms(model, shape, n=8):
    x = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return jacobian_norm(model, x, exact=True).value


class Functional(nn.Module):
    """A graph of functions and methods: branches, a residual, a product with a constant, views."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("scale", torch.tensor([0.5, -2.0, 1.0, 3.0]).view(4, 1, 1))

    def forward(self, x):
        x = F.relu(self.first(x))
        y = torch.tanh(self.second(x)) + x * self.scale
        y = y - 0.5 * x
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2, 2)], dim=1) / 2
        y = F.adaptive_avg_pool2d(F.dropout(y, 0.5, self.training), 2)
        return y.view(y.size(0), -1).sigmoid().mean(1, keepdim=True) + y.flatten(1)[:, 3:]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU()), (5,)),
        (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
                nn.Conv2d(4, 4, 3), nn.ELU(), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(),
                nn.Flatten(), nn.Linear(4, 3),
            ),
            (2, 9, 9),
        ),
        (Functional(), (2, 8, 8)),
    ],
)  # fmt: skip
def test_no_local_jacobian_exceeds_the_bound(model, shape):
    model = settled(model, shape)
    bound = lipschitz_bound(model, shape)
    local = local_norms(model, shape)
    assert local.max().item() <= bound.value < math.inf
    assert local.max() > 0


def lab_networks():
    from spectreg_lab.models.densenet import densenet
    from spectreg_lab.models.nin import nin
    from spectreg_lab.models.vgg import vgg
    from spectreg_lab.settings.config import NIN, VGG, DenseNet

    yield "vgg", lambda shape: vgg(VGG(width=4, stages=(1, 2), hidden=8, batch_norm=True), shape, 3)
    yield (
        "vgg without batch normalization",
        lambda shape: vgg(VGG(width=4, stages=(1, 2), hidden=8, batch_norm=False), shape, 3),
    )
    yield "nin", lambda shape: nin(NIN(width=6), shape, 3)
    yield "nin with batch normalization", lambda shape: nin(NIN(width=6, batch_norm=True), shape, 3)
    yield "densenet", lambda shape: densenet(DenseNet(depth=10, growth=3), shape, 3)


@pytest.mark.parametrize(("name", "build"), list(lab_networks()))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11)])
def test_it_covers_every_network_of_the_lab(name, build, shape):
    torch.manual_seed(0)
    model = settled(build(shape), shape)
    bound = lipschitz_bound(model, shape)
    assert local_norms(model, shape).max().item() <= bound.value
    assert sum("Conv" in factor.operation for factor in bound.factors) == sum(
        isinstance(m, nn.Conv2d) for m in model.modules()
    )


@pytest.mark.parametrize(("name", "build"), list(lab_networks()))
def test_without_biases_every_network_of_the_lab_is_its_jacobian_times_x(name, build):
    torch.manual_seed(0)
    model = settled(build((1, 8, 8)), (1, 8, 8)).eval()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key.endswith(("bias", "running_mean")):
            nn.init.zeros_(tensor)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobians = torch.func.vmap(torch.func.jacrev(lambda z: model(z[None])[0]))(x).flatten(2)
    torch.testing.assert_close(model(x), torch.einsum("boi,bi->bo", jacobians, x.flatten(1)))
    stretch = model(x).norm(dim=1) / x.flatten(1).norm(dim=1)
    norms = jacobian_norm(model, x).value
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(jacobians, 2))
    assert (stretch <= norms * (1 + 1e-12)).all()
    assert norms.max().item() <= lipschitz_bound(model, (1, 8, 8)).value


def test_a_network_of_orthogonal_layers_has_the_constant_one():
    model = nn.Sequential(
        *[nn.utils.parametrizations.orthogonal(nn.Linear(6, 6, dtype=torch.float64)) for _ in range(4)]
    )
    assert lipschitz_bound(model, (6,)).value == pytest.approx(1.0, rel=1e-8)
    assert local_norms(model, (6,)).max().item() == pytest.approx(1.0, rel=1e-8)


def dense_norm(function, shape):
    """The norm of a linear map from its matrix."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64).unflatten(1, shape)
    return torch.linalg.matrix_norm(function(eye).flatten(1).T, 2).item()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool2d(2), (1, 6, 6)),
        (nn.AvgPool2d(3, 2, 1), (1, 7, 8)),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 7, 8)),
        (nn.AvgPool2d(3, 2, ceil_mode=True), (1, 8, 8)),
        (nn.AvgPool2d((3, 2), (1, 2)), (1, 6, 6)),
        (nn.AvgPool1d(3, 1), (2, 7)),
        (nn.AdaptiveAvgPool2d(1), (2, 5, 4)),
        (nn.AdaptiveAvgPool2d((3, 2)), (1, 7, 5)),
        (nn.AdaptiveAvgPool2d((None, 2)), (1, 4, 5)),
        (nn.BatchNorm2d(3, eps=0.1).eval(), (3, 2, 2)),
        (nn.Flatten(), (3, 2)),
    ],
)
def test_the_constant_of_a_linear_operation_is_the_norm_of_its_matrix(layer, shape):
    layer = settled(layer, shape).eval()
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    assert lipschitz_bound(layer, shape).value == pytest.approx(dense_norm(lambda x: layer(x) - zero, shape), rel=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=1),
        lambda x: x.sum(3),
        lambda x: torch.cat([x, 2 * x], 1),
        lambda x: x + x.mean((2, 3), keepdim=True),
        lambda x: 3 * x - x,
        lambda x: torch.add(x, x, alpha=3),
        lambda x: x * torch.tensor([1.0, -4.0], dtype=torch.float64).view(2, 1, 1),
        lambda x: x / 4,
        lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1),
        lambda x: x[:, 1:, ::2],
        lambda x: x.mT,
        lambda x: torch.stack([x, -x], 1),
        lambda x: torch.cat(x.chunk(2, dim=1), 2),
    ],
)
def test_a_function_of_the_graph_is_bounded_from_above(function):
    truth = dense_norm(function, (2, 4, 4))
    assert truth <= lipschitz_bound(Apply(function), (2, 4, 4)).value * (1 + 1e-9) <= 3 * truth


@pytest.mark.parametrize("kernel", [(2, 2), (3, 2), (3, 1), ((2, 3), (1, 2)), (3, 2, 1, 2)])
def test_max_pooling_reaches_its_constant_where_windows_overlap(kernel):
    layer = nn.MaxPool2d(*kernel)
    bound = lipschitz_bound(layer, (1, 9, 9)).value
    bump = torch.zeros(81, 1, 9, 9, dtype=torch.float64)
    bump.view(81, 81).fill_diagonal_(1.0)  # one positive entry: every window that holds it gives 1
    assert layer(bump).flatten(1).norm(dim=1).max().item() == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize(
    ("layer", "constant"),
    [
        (nn.Sigmoid(), 0.25), (nn.Tanh(), 1), (nn.GELU(), 1.1289), (nn.GELU("tanh"), 1.129), (nn.SiLU(), 1.0998),
        (nn.Mish(), 1.0885), (nn.SELU(), 1.7581), (nn.ELU(2.0), 2), (nn.ELU(0.3), 1), (nn.LeakyReLU(-3.0), 3),
        (nn.LeakyReLU(0.1), 1), (nn.Softplus(), 1), (nn.Softplus(beta=5), 1), (nn.PReLU(init=1.5), 1.5),
        (nn.Hardtanh(-2, 2), 1), (nn.Softsign(), 1), (nn.LogSigmoid(), 1), (nn.Softshrink(), 1),
        (nn.Tanhshrink(), 1), (nn.ReLU6(), 1), (nn.Softmax(1), 0.5),
        (nn.CELU(0.5), 1), (nn.Hardsigmoid(), 1 / 6), (nn.Hardswish(), 1.5),
    ],
)  # fmt: skip
def test_no_slope_of_an_activation_exceeds_its_constant(layer, constant):
    bound = lipschitz_bound(layer, (1,)).value
    x = torch.linspace(-30, 30, 240001, dtype=torch.float64)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(layer.double()(x).sum(), x)
    assert slope.abs().max().item() <= bound
    assert bound == pytest.approx(constant, rel=1e-3)


def shaken(layer: nn.Module) -> nn.Module:
    for p in layer.double().parameters():
        nn.init.uniform_(p, -2, 2, generator=torch.Generator().manual_seed(0))
    return layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(6, eps=1e-2), (6,)),
        (nn.LayerNorm((3, 4), eps=1e-3), (2, 3, 4)),
        (nn.LayerNorm(6, eps=1e-2, elementwise_affine=False), (6,)),
        (nn.GroupNorm(2, 4, eps=1e-2), (4, 3)),
        (nn.RMSNorm(5, eps=1e-2), (5,)),
        (nn.InstanceNorm1d(3, eps=1e-2, affine=True), (3, 4)),
    ],
)
def test_a_normalization_by_the_example_itself_comes_near_its_constant_at_zero_and_nowhere_above(layer, shape):
    layer = shaken(layer)
    bound = lipschitz_bound(layer, shape).value
    x = torch.randn(40, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-6, 1, 40, dtype=torch.float64).view(-1, *[1] * len(shape))
    local = jacobian_norm(layer, x, exact=True).value
    assert 0.7 * bound <= local.max().item() <= bound


def test_instance_normalization_told_to_leave_its_running_statistics_is_one_by_the_example_itself():
    model = nn.InstanceNorm2d(1, track_running_stats=True).double()
    model.track_running_stats = False
    nn.init.constant_(model.running_var, 1e4)
    J = torch.autograd.functional.jacobian(model.eval(), torch.zeros(1, 1, 2, 2, dtype=torch.float64)).view(4, 4)
    assert lipschitz_bound(model, (1, 2, 2)).value >= torch.linalg.matrix_norm(J, 2) > 300


def test_padding_with_zeros_keeps_lengths():
    assert lipschitz_bound(nn.ZeroPad2d(2), (1, 3, 3)).value == 1.0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


def test_batch_normalization_is_fused_into_the_layer_before_it():
    model = settled(seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3))), (2, 5, 5)).eval()
    bound = lipschitz_bound(model, (2, 5, 5))
    zero = model(torch.zeros(1, 2, 5, 5, dtype=torch.float64))
    truth = dense_norm(lambda x: model(x) - zero, (2, 5, 5))
    fused, norm = copy.deepcopy(model[0]), model[1]
    fused.weight.data *= (norm.weight / (norm.running_var + norm.eps).sqrt()).view(3, 1, 1, 1)
    assert truth <= bound.value == pytest.approx(norm_bound(fused, (5, 5)))
    assert [factor.name for factor in bound.factors] == ["0", "1"]
    assert bound.factors[1].constant == 1.0


def test_a_float32_layer_fused_with_its_batch_normalization_is_bounded_in_exact_arithmetic():
    for seed in range(30):
        torch.manual_seed(seed)
        model = settled(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), (1,)).float().eval()
        linear, norm = model[0].weight.double().item(), model[1]
        truth = abs(linear * norm.weight.double().item()) / math.sqrt(norm.running_var.double().item() + norm.eps)
        assert truth <= lipschitz_bound(model, (1,)).value <= truth * (1 + 1e-9)


def test_the_factors_of_a_chain_multiply_to_the_bound():
    bound = lipschitz_bound(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid()), (3,))
    assert math.prod(factor.constant for factor in bound.factors) == pytest.approx(bound.value, rel=1e-12)
    assert [factor.operation for factor in bound.factors] == ["Linear", "ReLU", "Linear", "Sigmoid"]


def test_an_expanding_change_in_place_of_a_value_used_elsewhere_is_refused():
    class Aliased(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.first, self.activation = nn.ReLU(), activation

        def forward(self, x):
            y = self.first(x)
            return torch.cat([self.activation(y), y], 1)

    with pytest.raises(ValueError, match="it changes in place a value that is used elsewhere"):
        lipschitz_bound(Aliased(nn.SELU(inplace=True)), (4,))
    with pytest.raises(ValueError, match="it changes in place a value that is used elsewhere"):
        lipschitz_bound(Aliased(Apply(lambda x: F.selu(x, inplace=True))), (4,))
    assert lipschitz_bound(Aliased(nn.ReLU(inplace=True)), (4,)).value == pytest.approx(2**0.5)


class Doubling(nn.Module):
    def forward(self, x):
        return x.sinc() * 2


def test_an_unknown_operation_can_be_given_its_constant():
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardshrink(), Doubling())
    with pytest.raises(ValueError, match=r"'1' \(Hardshrink\): no constant is known.*constants=\{Hardshrink: L\}"):
        lipschitz_bound(model, (3,))
    with pytest.raises(ValueError, match=r"'sinc' \(sinc\): no constant is known"):
        lipschitz_bound(model, (3,), constants={nn.Hardshrink: 5.0})
    plain = lipschitz_bound(model[:1], (3,)).value
    given = {nn.Hardshrink: 5.0, Doubling: lambda call: float(call.output.shape[-1])}
    assert lipschitz_bound(model, (3,), constants=given).value == pytest.approx(plain * 5 * 3)
    assert lipschitz_bound(model, (3,), constants={nn.Hardshrink: 5.0, "sinc": 1}).value == pytest.approx(plain * 10)


def branch(x):
    return x if x.sum() > 0 else -x


def in_place(x):
    y = F.relu(x)
    z = y
    z += x
    return torch.cat([y, z])


def transposed_in_place(x):
    y = x.mT
    y += 1.0
    return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Apply(branch), "Apply cannot be traced by torch.fx"),
        (Apply(lambda x: x * x), r"'mul' \(mul\): both factors depend on the input"),
        (Apply(lambda x: 1 / (1 + x)), r"\(truediv\): the divisor depends on the input"),
        (Apply(lambda x: x @ x.T), r"\(matmul\): both factors depend on the input"),
        (Apply(lambda x: F.dropout(x, 0.5)), r"\(dropout\): it is called with training=True"),
        (Apply(lambda x: x - x.mean(0)), "the output of an example depends on the others in its batch"),
        (Apply(in_place), r"\(iadd\): it changes in place a value that is used elsewhere too"),
        (Apply(transposed_in_place), "traced computes something else: look for in-place changes"),
        (Apply(lambda x: (x, x)), "the model returns"),
        (nn.BatchNorm1d(4, track_running_stats=False), "keeps no running statistics"),
        (Apply(lambda x: x.view(torch.bfloat16)), r"\(view\): it reads the same bits as another type"),
        (Apply(lambda x: 2 * x.data), r"\(getattr\): no constant is known for the attribute 'data'"),
        (
            nn.Sequential(nn.Unflatten(1, (1, 4)), Attention()),
            r"inner' \(MultiheadAttention\): dot-product attention is",
        ),
        (nn.GLU(), r"\(GLU\): a gate times an unbounded function of the input is not Lipschitz"),
        (nn.RMSNorm(4), r"\(RMSNorm\): without a positive eps it has no Lipschitz constant"),
        (nn.Linear(3, 2), r"Linear fails on input_shape=\(4,\), which is the shape of one example without the batch"),
        (
            nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.AvgPool2d(2, divisor_override=3)),
            "divisor_override is not covered",
        ),
    ],
)
def test_what_cannot_be_bounded_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(model, (4,))


def test_a_statistic_that_is_not_finite_is_named():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))
    model[1].running_var[0] = float("nan")
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\): a weight or statistic of it is NaN or infinite"):
        lipschitz_bound(model, (3,))


def test_an_input_that_is_ignored_gives_zero():
    assert lipschitz_bound(Apply(lambda x: torch.zeros(2, 3)), (4,)).value == 0.0


def hooked(layer, factor=10.0, pre=False):
    if pre:
        layer.register_forward_pre_hook(lambda module, inputs: (factor * inputs[0],))
    else:
        layer.register_forward_hook(lambda module, inputs, output: factor * output)
    return layer


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("build", [nn.ReLU, lambda: nn.Linear(4, 4, bias=False), lambda: nn.LeakyReLU(2.0)])
def test_what_hooks_do_counts(build, pre):
    torch.manual_seed(0)
    layer = build()
    plain = lipschitz_bound(layer, (4,)).value
    assert lipschitz_bound(hooked(layer, pre=pre), (4,)).value == pytest.approx(10 * plain)


def test_a_hook_for_all_modules_counts():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 3 * output)
    try:  # of the ReLU, of the Sequential that it is in, and of the one around the model
        assert lipschitz_bound(nn.Sequential(nn.ReLU()), (4,)).value >= 9
    finally:
        handle.remove()


@pytest.mark.parametrize("pre", [False, True])
def test_a_batch_normalization_with_hooks_is_refused_with_the_line_and_the_way_out(pre):
    model = nn.Sequential(nn.Linear(4, 4), hooked(nn.BatchNorm1d(4), pre=pre))
    with pytest.raises(ValueError, match=r"cannot be traced.*BatchNorm1d has hooks.*constants=\{BatchNorm1d: L\}"):
        lipschitz_bound(model, (4,))
    with pytest.raises(ValueError, match="it has hooks, which may change its input or output"):
        lipschitz_bound(model, (4,), constants={nn.BatchNorm1d: 1.0})


@pytest.mark.parametrize("name", ALTERED | AS_THEIR_ATTRIBUTES_SAY)
def test_the_bound_of_a_convolution_follows_its_own_forward(name):
    layer = (ALTERED | AS_THEIR_ATTRIBUTES_SAY)[name]().train()
    before = snapshot(layer)
    bound = lipschitz_bound(layer, (2, 5, 6)).value
    assert snapshot(layer) == before
    truth = torch.linalg.matrix_norm(dense(layer.eval(), (2, 5, 6)), 2).item()
    assert truth <= bound <= 2 * truth


def test_a_model_that_cannot_be_traced_names_the_line_and_the_module_to_give_a_constant_for():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum().isfinite() else -x

    model = nn.Sequential(nn.Linear(4, 4), Gate())
    with pytest.raises(ValueError, match=r"test_network\.py:\d+: return x if x\.sum\(\).*constants=\{Gate: L\}"):
        lipschitz_bound(model, (4,))
    assert lipschitz_bound(model, (4,), constants={Gate: 1.0}).value > 0


def test_a_forward_pass_that_fills_lists_leaves_none_of_its_traces():
    class Hoarder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(4, 4), []

        def forward(self, x):
            self.seen.append(x)
            self.last = x
            return self.linear(x)

    model = Hoarder()
    assert lipschitz_bound(model, (4,)).value > 0
    assert model.seen == []
    assert not hasattr(model, "last")


def test_a_result_without_a_batch_dimension_is_that_of_one_example():
    assert lipschitz_bound(Apply(lambda x: x.mean()), (2,)).value == pytest.approx(2**-0.5)
    assert lipschitz_bound(Apply(lambda x: x.sum()), (9,)).value == pytest.approx(3)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.cat([y.add_(y), y], 1),
        lambda y: torch.cat([y.view(-1, 2, 2).mul_(5).flatten(1), y], 1),
        lambda y: torch.cat([F.selu(y[:, :2], inplace=True), y], 1),
    ],
)
def test_a_value_changed_in_place_through_whatever_view_is_not_used_with_its_old_bound(function):
    with pytest.raises(ValueError, match="it changes in place a value that is used elsewhere too"):
        lipschitz_bound(Apply(lambda x: function(F.relu(x))), (4,))


def test_subclasses_and_functions_have_the_bound_of_the_layers_they_are():
    class Sub(nn.Linear):
        pass

    torch.manual_seed(0)
    layer = Sub(4, 4)
    truth = torch.linalg.matrix_norm(layer.weight.double(), 2).item()
    assert lipschitz_bound(layer, (4,)).value == pytest.approx(truth)
    assert lipschitz_bound(Apply(lambda x: F.linear(x, layer.weight.double())), (4,)).value == pytest.approx(truth)


@pytest.mark.parametrize("exponent", [-30, 30])
def test_the_bound_scales_with_the_weights(exponent):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    bound = lipschitz_bound(model, (2, 4, 4)).value
    model[0].weight.data *= 10.0**exponent
    assert lipschitz_bound(model, (2, 4, 4)).value == pytest.approx(bound * 10.0**exponent, rel=1e-5)


def module_steps(width):
    return [
        lambda: nn.Linear(width, width), nn.ReLU, nn.Tanh, nn.GELU, lambda: nn.Softplus(threshold=40), nn.ELU,
        nn.LogSigmoid, nn.Sigmoid,
        lambda: nn.LeakyReLU(-2.0), lambda: nn.BatchNorm1d(width), lambda: nn.BatchNorm1d(width, affine=False),
        lambda: nn.LayerNorm(width, eps=0.5), lambda: nn.Softmax(1), lambda: nn.LogSoftmax(1), lambda: nn.PReLU(width),
        lambda: hooked(nn.Linear(width, width), -0.5), lambda: hooked(nn.Tanh(), 2.0, pre=True),
    ]  # fmt: skip


def function_steps(width, W):
    pooled = math.ceil(width / 2)
    return [
        lambda x: F.linear(x, W), lambda x: x @ W.T, lambda x: x + torch.tanh(F.linear(x, W)),
        lambda x: 2 * x - x.flip(1), lambda x: F.layer_norm(x, (width,), W[0], eps=0.4),
        lambda x: torch.clamp(x, -1, 1), lambda x: x / W[0].abs().add(1),
        lambda x: F.log_softmax(x, dim=-1), lambda x: x.roll(1, 1) + x.abs(), lambda x: torch.maximum(x, -0.5 * x),
        lambda x: F.pad(x[:, 1:], (0, 1), mode="constant"), lambda x: x[:, (0, *range(width - 1))],
        lambda x: torch.add(input=x, other=x.sin(), alpha=-2), lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.sort(1)[0], lambda x: F.max_pool1d(F.pad(x[:, None], (1, 1)), 3, 1)[:, 0],
        lambda x: torch.cat(tensors=[x[:, :pooled], x[:, pooled:]], dim=1), lambda x: x.cumsum(1),
        lambda x: F.interpolate(x[:, None], size=width, mode="linear")[:, 0], lambda x: F.dropout(x, 0.3, False),
    ]  # fmt: skip


@pytest.mark.slow
@given(data=st.data(), width=st.integers(2, 6), depth=st.integers(1, 5), seed=st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_no_jacobian_and_no_pair_of_a_random_network_exceeds_its_bound(data, width, depth, seed):
    W = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    steps = [(Apply, f) for f in function_steps(width, W)] + [(None, f) for f in module_steps(width)]
    chosen = data.draw(st.lists(st.sampled_from(steps), min_size=depth, max_size=depth))
    torch.manual_seed(seed)
    model = settled(nn.Sequential(*[build(f) if build else f() for build, f in chosen]), (width,)).eval()
    bound = lipschitz_bound(model, (width,)).value
    assert largest_stretch(lambda x: model(x.clone()), (width,), seed) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    "filled",
    [
        lambda x: x.sum().new_full((1, 3), fill_value=x.sum()),
        lambda x: x.new_tensor([x.sum()]),
    ],
)
def test_what_is_filled_from_the_input_is_no_constant(filled):
    with pytest.raises(ValueError, match=r"no constant is known|fails"):
        lipschitz_bound(Apply(filled), (4,))


def test_the_channels_of_a_convolution_without_a_batch_are_not_those_of_the_normalization_after_it():
    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv1d(1, 4, 1, bias=False), nn.BatchNorm1d(4)
            self.convolution.weight.data = torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1)
            self.norm.running_var = torch.tensor([1.0, 1e-4, 1, 1])

        def forward(self, x):
            return self.norm(self.convolution(x[0]))

    model = Unbatched().double().eval()
    truth = torch.linalg.matrix_norm(dense(model, (1, 4)), 2).item()
    assert lipschitz_bound(model, (1, 4)).value >= truth * (1 - 1e-9)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_bound_of_a_resizing_is_its_norm_also_from_and_to_a_single_row_or_column(mode, antialias, align_corners):
    for size in ((8, 5), (7, 1), (1, 6), (3, 12)):
        for target in ((4, 3), (11, 1), (1, 9), (5, 5)):
            model = Apply(
                lambda x, target=target: F.interpolate(
                    x, target, mode=mode, align_corners=align_corners, antialias=antialias
                )
            )
            eye = torch.eye(math.prod(size), dtype=torch.float64).view(-1, 1, *size)
            true = torch.linalg.matrix_norm(model(eye).flatten(1), 2).item()
            assert lipschitz_bound(model, (1, *size)).value == pytest.approx(true, rel=1e-6)


def test_a_function_is_no_module_and_a_number_no_shape():
    with unchecked_types():
        with pytest.raises(TypeError, match="the model is a builtin_function_or_method"):
            lipschitz_bound(torch.relu, (4,))
        with pytest.raises(TypeError, match=r"such as \(4,\)"):
            lipschitz_bound(nn.Linear(4, 4), 4)


class InPlace(nn.Module):
    """A residual network that writes ``h += f(x)`` where h is its input, and gives that or something else back."""

    def __init__(self, share: float, gives: str) -> None:
        super().__init__()
        self.share, self.gives = share, gives
        self.first, self.second = (nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2))
        for layer in (self.first, self.second):
            nn.init.eye_(layer.weight)

    def forward(self, x):
        h = x.clone() if self.gives == "copy" else x
        h += self.share * self.first(x)
        h += self.share * self.second(x)
        return x if self.gives == "input" else h


@pytest.mark.parametrize("share", [0.02, 1e-9])
@pytest.mark.parametrize("gives", ["sum", "input"])
def test_a_change_in_place_by_an_operator_of_a_value_used_elsewhere_is_refused(share, gives):
    with pytest.raises(ValueError, match="it changes in place a value that is used elsewhere too"):
        lipschitz_bound(InPlace(share, gives), (3,))


def test_a_change_in_place_by_an_operator_of_a_value_used_nowhere_else_is_bounded():
    assert lipschitz_bound(InPlace(0.5, "copy"), (3,)).value == pytest.approx(2.0)


def test_a_size_may_be_counted_up_by_an_operator():
    class Resized(nn.Module):
        def forward(self, x):
            n = x.shape[1]
            n *= 2
            n -= 1
            return x.repeat(1, 2)[:, :n]

    assert lipschitz_bound(Resized(), (3,)).value >= 1.0


def test_softplus_in_float64_needs_a_threshold_at_which_it_does_not_jump():
    with pytest.raises(ValueError, match=r"\(Softplus\): .* it jumps in torch.float64; use a threshold of 37 or more"):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3), nn.Softplus()).double(), (3,))
    assert lipschitz_bound(nn.Sequential(nn.Softplus(threshold=37)), (3,)).value == 1.0


def test_a_negative_constant_is_refused():
    with pytest.raises(ValueError, match=r"the Lipschitz constant of '.*' is -1.0, and must not be negative"):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3), nn.Hardshrink()), (3,), constants={nn.Hardshrink: -1.0})
