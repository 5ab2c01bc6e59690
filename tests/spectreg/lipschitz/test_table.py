"""Every rule of the table of Lipschitz constants, held against a search among pairs."""

import operator

import pytest
import torch
from operations import SHAPE, curved, linear, scale
from stretch import Apply, largest_stretch, matrix_norm
from torch import nn
from torch.nn import functional as F

from spectreg import lipschitz_bound
from spectreg.lipschitz.table import FUNCTIONS, MODULES, rule_of
from spectreg.lipschitz.tracing import traced

CASES = [pytest.param(f, id=name) for name, f in (*linear(), *curved())]


def module_of(function):
    return function if isinstance(function, nn.Module) else Apply(function)


@pytest.mark.slow
@pytest.mark.parametrize("function", CASES)
def test_no_pair_is_stretched_by_more_than_the_rule_says(function):
    bound = lipschitz_bound(module_of(function).double(), SHAPE).value
    assert 0 < largest_stretch(lambda x: function(x.clone()), SHAPE) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("function", [pytest.param(f, id=name) for name, f in linear()])
def test_the_bound_of_a_linear_operation_is_near_the_norm_of_its_matrix(function):
    truth = matrix_norm(lambda x: function(x.clone()), SHAPE)
    assert truth <= lipschitz_bound(module_of(function).double(), SHAPE).value * (1 + 1e-9) <= 3.001 * truth


REFUSED = [
    (lambda x: torch.div(x, 2, rounding_mode="floor"), r"\(div\): with rounding_mode='floor' it jumps"),
    (lambda x: x.div(2, rounding_mode="trunc"), r"\(div\): with rounding_mode='trunc' it jumps"),
    (lambda x: x / 0, r"\(truediv\): it divides by zero"),
    (lambda x: x / torch.tensor([1.0, 0, 0, 0]), r"\(truediv\): it divides by zero"),
    (lambda x: 1 / (1 + x), r"\(truediv\): the divisor depends on the input"),
    (
        lambda x: F.softplus(x, threshold=1),
        r"\(softplus\): with beta=1.*threshold=1 it jumps in .*; use a threshold of 37",
    ),
    (lambda x: F.softplus(x, 1, 5.0), r"\(softplus\): .*threshold=5.0 it jumps"),
    (nn.Softplus(threshold=2), r"\(Softplus\): .*threshold=2.* it jumps"),
    (lambda x: F.celu(x, -1.0), r"\(celu\): with a negative alpha it grows"),
    (nn.CELU(-0.5), r"\(CELU\): with a negative alpha it grows"),
    (lambda x: F.threshold(x, 0.5, 0.0), r"\(_?threshold\): it jumps at 0.5 to 0.0"),
    (nn.Threshold(0.5, 0.0), r"\(Threshold\): it jumps at 0.5"),
    (lambda x: F.rrelu(x, training=True), r"\(rrelu\): it draws its slopes"),
    (lambda x: F.dropout(x), r"\(dropout\): it is called with training=True; pass training=self.training"),
    (lambda x: F.alpha_dropout(x, training=True), r"\(alpha_dropout\): it is called with training=True"),
    (lambda x: x * x, r"\(mul\): both factors depend on the input"),
    (lambda x: torch.mul(input=x, other=x), r"\(mul\): both factors depend on the input"),
    (lambda x: x @ x.mT, r"\(matmul\): both factors depend on the input"),
    (lambda x: F.linear(x, x[0, 0]), r"\(linear\): its argument 'weight' depends on the input"),
    (lambda x: F.conv2d(x, x), r"\(conv2d\): its argument 'weight' depends on the input"),
    (lambda x: F.layer_norm(x, (4,), x[0, 0, 0]), r"\(layer_norm\): its argument 'weight' depends on the input"),
    (lambda x: x.clamp(max=x.mT), r"\(clamp\): its argument 'max' depends on the input"),
    (lambda x: torch.where(x > 0, x, -x), r"\(gt\): no constant is known"),
    (lambda x: x.masked_fill(x.mT.bool(), 0), r"\(bool\): no constant is known"),
    (lambda x: x[:, x.max(1)[1][0, 0]], r"\(getitem\): its result is of torch.int64: it jumps"),
    (lambda x: x.sort(1).indices, r"\(getattr\): no constant is known for the attribute 'indices'"),
    (lambda x: torch.stack(list(x.max(1))), "cannot be traced"),
    (lambda x: torch.stack(x.max(1)), r"\(stack\): it joins values of torch.int64"),
    (lambda x: x.argmax(1), r"\(argmax\): it jumps"),
    (lambda x: x.int(), r"\(int\): no constant is known"),
    (lambda x: x.to(torch.int64), r"\(to\): its result is of torch.int64"),
    (lambda x: x.view(torch.int64), r"\(view\): it reads the same bits as another type"),
    (lambda x: x.chunk(2, 2) + x.chunk(2, 2), r"\(add\): it is given a tuple of values"),
    (lambda x: (x.chunk(2, 2) * 2)[3], r"\(mul\): it is given a tuple of values"),
    (lambda x: F.batch_norm(x, None, None, training=True), r"\(batch_norm\): it keeps no running statistics"),
    (lambda x: F.batch_norm(x, scale.flatten(), -(scale.flatten() ** 2)), r"\(batch_norm\): .* NaN or infinite"),
    (lambda x: F.rms_norm(x, (4,)), r"\(rms_norm\): without a positive eps"),
    (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], r"\(max_pool2d_with_indices\): no constant is known"),
    (nn.MaxPool2d(2, return_indices=True), r"\(MaxPool2d\): it returns indices"),
    (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override is not covered"),
    (lambda x: torch.linalg.vector_norm(x, 1), r"\(linalg_vector_norm\): the norm of order 1 is not covered"),
    (lambda x: x.norm(p=0.5), r"\(norm\): the norm of order 0.5 is not covered"),
    (lambda x: x.sqrt(), r"\(sqrt\): its slope has no bound"),
    (lambda x: x**2, r"\(pow\): its slope has no bound"),
    (lambda x: x.exp().log(), r"\(exp\): its slope has no bound"),
    (lambda x: x // 2, r"\(floordiv\): it jumps"),
    (lambda x: x.round(), r"\(round\): it jumps"),
    (lambda x: torch.add(x, x, out=torch.empty(0)), r"\(add\): it is called with an argument that is not covered"),
    (lambda x: F.glu(x), r"\(glu\): a gate times"),
    (lambda x: F.scaled_dot_product_attention(x, x, x), r"dot-product attention is not Lipschitz"),
    (lambda x: torch.full_like(x, x.sum()), r"\(full_like\): no constant is known"),
    (lambda x: torch.empty_like(x), r"\(empty_like\): no constant is known"),
    (lambda x: torch.outer(x.flatten(), x.flatten()), r"\(outer\): no constant is known"),
]


@pytest.mark.parametrize(("function", "message"), REFUSED)
def test_an_argument_that_changes_a_rule_is_checked_and_what_has_no_constant_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(module_of(function).double(), SHAPE)


def met(function):
    """The entries of the table that a function meets when it is traced."""
    graph = traced(module_of(function), {})
    for node in graph.graph.nodes:
        if node.op == "call_module":
            yield rule_of(graph.get_submodule(node.target))[0]
        elif node.op.startswith("call"):
            yield node.target


# Of these every form is refused.
STEEP = ("sqrt", "rsqrt", "exp", "expm1", "log", "log2", "log10", "log1p", "pow", "square", "reciprocal", "tan", "sinh",
         "cosh")  # fmt: skip
JUMPING = ("sign", "round", "floor", "ceil", "trunc", "frac", "floor_divide", "remainder", "fmod", "argmax", "argmin")
NEVER = {
    operator.pow, operator.floordiv, operator.mod, F.glu, F.scaled_dot_product_attention, nn.GLU, nn.MultiheadAttention,
    *STEEP, *JUMPING, *(getattr(torch, name) for name in (*STEEP, *JUMPING)),
}  # fmt: skip
ROUNDING = {"float", "half", "bfloat16", "cuda"}  # these round, or need another device


def test_every_rule_is_held_against_pairs():
    held = {key for _, function in (*linear(), *curved()) for key in met(function)}
    assert (FUNCTIONS.keys() | MODULES.keys()) - held - NEVER - ROUNDING == set()


@pytest.mark.parametrize("name", [*STEEP, *JUMPING])
def test_a_function_without_a_bound_is_refused_as_function_and_as_method(name):
    args = (3,) if name in ("pow", "floor_divide", "remainder", "fmod") else ()
    for function in (lambda x: getattr(torch, name)(x.abs(), *args), lambda x: getattr(x.abs(), name)(*args)):
        with pytest.raises(ValueError, match=rf"\({name}\): (its slope has no bound|it jumps)"):
            lipschitz_bound(Apply(function), SHAPE)
