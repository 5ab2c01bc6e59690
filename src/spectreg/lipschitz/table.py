"""The operations that networks are built of, and the rule for the Lipschitz constant of each: a table."""

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from spectreg.lipschitz import activations, combinations, layers
from spectreg.lipschitz.activations import refused, times
from spectreg.lipschitz.calls import Call, Operand, Rule
from spectreg.lipschitz.combinations import copied


def both(*names: str) -> Iterator[Any]:
    """The functions of torch with these names, and the names, which are those of methods."""
    for name in names:
        yield from (getattr(torch, name), name)


def every(rule: Rule, *operations: Any) -> dict[Any, Rule]:
    return dict.fromkeys(operations, rule)


def of(rule: Rule, *attributes: str, **constants: Any) -> Rule:
    """The rule of a module: that of a function, given attributes of the module as its arguments."""

    def rule_of_module(call: Call, input: Operand) -> float:
        return rule(call, input, **{name: getattr(call.module, name) for name in attributes}, **constants)

    return rule_of_module


def by_dimension(rule: Rule, stem: str, home: Any, *attributes: str) -> dict[Any, Rule]:
    """A rule for the one-, two- and three-dimensional form of an operation."""
    rules: dict[Any, Rule] = {getattr(home, f"{stem}{d}d"): partial(rule, d=d) for d in (1, 2, 3)}
    return {key: of(rule, *attributes) for key, rule in rules.items()} if attributes else rules


STEEP = refused("its slope has no bound on all inputs")
JUMPING = refused("it jumps")
ATTENTION = refused("dot-product attention is not Lipschitz on all inputs (Kim et al., arXiv:2006.04710)")
GATED = refused("a gate times an unbounded function of the input is not Lipschitz on all inputs")

SIGMOID, SILU, MISH, SELU = times(0.25), times(1.0999), times(1.0885), times(1.7581)
# at x = 0; 2.3994: 1.09984; 1.08849; scale · alpha = 1.75810
HARDSIGMOID, HARDSWISH, ERF = times(0.1667), times(1.5), times(1.1284)  # 1/6; at x = 3; 2/√π = 1.12838
CONV, TRANSPOSED = layers.convolution, layers.transposed_convolution

FUNCTIONS: dict[Any, Rule] = {
    **every(
        times(1.0), operator.neg, operator.pos, operator.abs, F.relu, F.relu6, F.softsign, F.logsigmoid, F.tanhshrink,
        *both("relu", "relu_", "tanh", "tanh_", "abs", "absolute", "neg", "negative", "positive", "sin", "cos",
        "atan", "arctan", "asinh", "detach"),
    ),
    **every(SIGMOID, *both("sigmoid", "sigmoid_")),
    **every(ERF, *both("erf")),
    F.silu: SILU, F.mish: MISH, F.selu: SELU, torch.selu: SELU, F.hardsigmoid: HARDSIGMOID, F.hardswish: HARDSWISH,
    F.gelu: activations.gelu, F.leaky_relu: activations.leaky_relu, F.rrelu: activations.rrelu,
    **every(activations.prelu, F.prelu, *both("prelu")),
    F.elu: activations.elu, F.celu: activations.celu, torch.celu: activations.celu, F.softplus: activations.softplus,
    F.softshrink: activations.softshrink, F.threshold: activations.threshold, F.hardtanh: activations.hardtanh,
    **every(activations.clamp, *both("clamp", "clamp_", "clip")),
    **every(activations.clamp, *both("clamp_min", "clamp_max")),
    **every(activations.dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    **every(activations.alpha_dropout, F.alpha_dropout, F.feature_alpha_dropout),
    **every(activations.softmax, F.softmax, F.softmin, *both("softmax")),
    **every(activations.log_softmax, F.log_softmax, *both("log_softmax")),
    **every(activations.logsumexp, *both("logsumexp")),
    **every(activations.vector_norm, torch.linalg.vector_norm, *both("norm")),
    **every(activations.extreme, *both("amax", "amin")),
    **every(activations.extreme_or_pair, *both("max", "min")),
    **every(activations.pair, *both("maximum", "minimum", "fmax", "fmin")),
    **every(activations.sort, *both("sort")),
    **every(activations.topk, *both("topk")),
    **every(activations.where, torch.where),
    **every(
        combinations.added, operator.add, operator.iadd, operator.sub, operator.isub, *both("add", "sub", "subtract"),
        "add_", "sub_",
    ),
    **every(combinations.multiplied, operator.mul, operator.imul, *both("mul", "multiply"), "mul_"),
    **every(combinations.divided, operator.truediv, operator.itruediv, *both("div", "divide", "true_divide"), "div_"),
    **every(
        combinations.concatenated, torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack,
        torch.dstack,
    ),
    **every(
        copied, F.pad, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, F.unfold, "view", "contiguous", "expand",
        "repeat", "unfold",
        *both("clone", "flatten", "reshape", "unflatten", "permute", "transpose", "t", "movedim", "moveaxis",
        "swapaxes", "swapdims", "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "flip", "fliplr",
        "flipud", "rot90", "roll", "narrow", "select", "diagonal", "diag", "diag_embed", "tril", "triu", "tile",
        "repeat_interleave", "broadcast_to", "index_select", "gather", "take_along_dim", "take", "masked_fill",
        "masked_select"),
    ),
    operator.getitem: combinations.indexed, getattr: combinations.attribute,
    **every(combinations.cast, "to", "float", "double", "half", "bfloat16", "cpu", "cuda"),
    **every(combinations.mean, *both("mean")),
    **every(combinations.total, *both("sum")),
    **every(combinations.cumulated, *both("cumsum")),
    F.linear: layers.linear,
    **every(layers.product, operator.matmul, *both("matmul", "mm", "bmm", "mv")),
    **every(CONV, F.conv1d, F.conv2d, F.conv3d),
    **every(TRANSPOSED, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    F.batch_norm: layers.batch_norm, F.layer_norm: layers.layer_norm, F.group_norm: layers.group_norm,
    F.rms_norm: layers.rms_norm, F.instance_norm: layers.instance_norm,
    **by_dimension(layers.max_pool, "max_pool", F), **by_dimension(layers.max_pool, "max_pool", torch),
    **by_dimension(layers.adaptive_max_pool, "adaptive_max_pool", F),
    **by_dimension(layers.average_pool, "avg_pool", F),
    **by_dimension(layers.adaptive_average_pool, "adaptive_avg_pool", F),
    F.interpolate: layers.interpolation,
    F.scaled_dot_product_attention: ATTENTION, F.glu: GATED,
    **every(
        STEEP, operator.pow, *both("sqrt", "rsqrt", "exp", "expm1", "log", "log2", "log10", "log1p", "pow", "square",
        "reciprocal", "tan", "sinh", "cosh"),
    ),
    **every(
        JUMPING, operator.floordiv, operator.mod, *both("sign", "round", "floor", "ceil", "trunc", "frac",
        "floor_divide", "remainder", "fmod", "argmax", "argmin"),
    ),
}  # fmt: skip

POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
AVERAGING = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
RESIZING = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
STATISTICS = ("running_mean", "running_var", "weight", "bias", "eps")
MODULES: dict[Any, Rule] = {
    **every(of(times(1.0)), nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink),
    nn.Sigmoid: of(SIGMOID), nn.SiLU: of(SILU), nn.Mish: of(MISH), nn.SELU: of(SELU),
    nn.Hardsigmoid: of(HARDSIGMOID), nn.Hardswish: of(HARDSWISH), nn.GELU: of(activations.gelu, "approximate"),
    nn.LeakyReLU: of(activations.leaky_relu, "negative_slope"), nn.RReLU: of(activations.rrelu, "lower", "upper"),
    nn.PReLU: of(activations.prelu, "weight"), nn.ELU: of(activations.elu, "alpha"),
    nn.CELU: of(activations.celu, "alpha"), nn.Softplus: of(activations.softplus, "beta", "threshold"),
    nn.Softshrink: of(activations.softshrink, "lambd"),
    nn.Threshold: of(activations.threshold, "threshold", "value"),
    nn.Hardtanh: of(activations.hardtanh, "min_val", "max_val"),
    **every(of(activations.softmax), nn.Softmax, nn.Softmin, nn.Softmax2d),
    nn.LogSoftmax: of(activations.log_softmax, "dim"),
    **every(
        of(times(1.0)), nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    ),
    **every(
        copied, nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold,
        nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
        nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
        nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    ),
    nn.Linear: of(layers.linear, "weight", "bias"),
    **every(
        layers.convolution_module, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    ),
    **every(of(layers.batch_norm, *STATISTICS), nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    **every(layers.instance_norm_module, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.LayerNorm: of(layers.layer_norm, "normalized_shape", "weight", "bias", "eps"),
    nn.GroupNorm: of(layers.group_norm, "num_groups", "weight", "bias", "eps"),
    nn.RMSNorm: of(layers.rms_norm, "normalized_shape", "weight", "eps"),
    **by_dimension(layers.max_pool, "MaxPool", nn, *POOLING),
    **by_dimension(layers.adaptive_max_pool, "AdaptiveMaxPool", nn, "output_size", "return_indices"),
    **by_dimension(layers.adaptive_average_pool, "AdaptiveAvgPool", nn, "output_size"),
    nn.AvgPool1d: of(partial(layers.average_pool, d=1), *AVERAGING),
    nn.AvgPool2d: of(partial(layers.average_pool, d=2), *AVERAGING, "divisor_override"),
    nn.AvgPool3d: of(partial(layers.average_pool, d=3), *AVERAGING, "divisor_override"),
    nn.Upsample: of(layers.interpolation, *RESIZING),
    nn.MultiheadAttention: ATTENTION, nn.GLU: GATED,
}  # fmt: skip


def rule_of(module: nn.Module) -> tuple[type[nn.Module] | None, Rule | None]:
    """The kind of module in the table that this one is, and its rule; a subclass is of its nearest parent's kind."""
    for kind in type(module).__mro__:
        if kind in MODULES:
            return kind, MODULES[kind]
    return None, None
