"""One call at least of every operation whose Lipschitz constant is known, on an example of 2 × 4 × 4 in float64."""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import seeded
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]
SHAPE = (2, 4, 4)
_G = torch.Generator().manual_seed(3)


def constant(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_G, dtype=torch.float64)


scale, variance, channels = constant(2, 1, 1), constant(2).square(), constant(2)
square, stack, kernel = constant(4, 4), constant(2, 4, 4), constant(3, 2, 3, 3)
line, paired, solid = constant(6, 4, 3), constant(4, 1, 3, 3), constant(2, 1, 2, 2, 2)
column = torch.tensor([1, 1, 2, 1, 1]).expand(1, 2, 4, 5)
mask = torch.eye(4).bool()


def first(function: Callable[..., Any]) -> Callable[..., Any]:
    """The values of an operation that gives them with their indices."""
    return lambda *args: function(*args)[0]


def method(name: str) -> Callable[..., Any]:
    return lambda x, *args: getattr(x, name)(*args)


# The arguments after the input; each is tried with the function of torch and with the method of that name.
LINEAR = {
    "clone": [()], "flatten": [(), (2,)], "reshape": [((1, -1),)], "unflatten": [(2, (2, 2))],
    "permute": [((0, 2, 3, 1),)], "transpose": [(1, 2)], "movedim": [(1, 3)], "moveaxis": [(1, 3)],
    "swapaxes": [(1, 2)], "swapdims": [(1, 2)], "squeeze": [(), (0,)], "unsqueeze": [(0,)], "flip": [((1, 2),)],
    "fliplr": [()], "rot90": [(1, (2, 3))], "roll": [(1, 2)], "narrow": [(2, 1, 2)], "select": [(1, 0)],
    "diagonal": [(0, 2, 3)], "diag_embed": [()], "tril": [()], "triu": [(1,)], "tile": [((1, 3, 1, 2),)],
    "repeat_interleave": [(3, 2)], "masked_fill": [(mask, 7.0)],
    "index_select": [(2, torch.tensor([0, 0, 3, 0]))], "gather": [(3, column)], "take_along_dim": [(column, 3)],
    "take": [(torch.tensor([5, 5, 5, 0]),)], "masked_select": [(mask,)], "neg": [()], "negative": [()],
    "positive": [()], "detach": [()], "mean": [(), ((2, 3),)], "sum": [(), (3,)], "cumsum": [(2,)],
    "add": [(1,)], "sub": [(scale,)], "subtract": [(2,)], "mul": [(scale,)], "multiply": [(-2,)], "div": [(scale,)],
    "divide": [(2,)], "true_divide": [(scale,)], "matmul": [(square,)],
}  # fmt: skip
METHODS = {
    "view": [(1, -1)], "contiguous": [()], "repeat": [(2, 1, 3, 1)], "unfold": [(2, 3, 1)],
    "to": [(torch.float64,)], "double": [()], "cpu": [()],
}  # fmt: skip
CURVED = {
    "relu": [()], "relu_": [()], "tanh": [()], "tanh_": [()], "abs": [()], "absolute": [()], "sin": [()], "cos": [()],
    "atan": [()], "arctan": [()], "asinh": [()], "sigmoid": [()], "sigmoid_": [()], "erf": [()],
    "clamp": [(-1.0, 1.0), (0.5, None)], "clamp_": [(-1.0, 1.0)], "clip": [(None, 0.3)], "clamp_min": [(0.1,)],
    "clamp_max": [(0.1,)], "softmax": [(1,), (3,)], "log_softmax": [(1,), (-1,)], "logsumexp": [(3,), ((2, 3),)],
    "norm": [(), (2, (2, 3)), (math.inf, 1)], "amax": [((2, 3),), ()], "amin": [(1,)], "max": [(), (scale,)],
    "min": [()], "maximum": [(scale,)], "minimum": [(scale,)], "fmax": [(scale,)], "fmin": [(scale,)],
    "prelu": [(channels * 3,)],
}  # fmt: skip
INDEXED = {"sort": [(2,), (1, True)], "topk": [(3, 2)], "max": [(2,)], "min": [(3, True)]}
PIECES = {"chunk": [(2, 2)], "split": [(3, 2)], "tensor_split": [(3, 3)], "unbind": [(1,)]}


def forms(table: dict[str, list[tuple]], only_methods: bool = False) -> Iterator[tuple[str, Function]]:
    for name, cases in table.items():
        for args in cases:
            ways = [method(name)] if only_methods else [getattr(torch, name), method(name)]
            for way in ways:
                changes = name.endswith("_")
                yield f"{name}{args}", lambda x, w=way, a=args, c=changes: w(x.clone() if c else x, *a)


LINEAR_FUNCTIONS: list[Function] = [
    lambda x: torch.t(x.flatten(2)[0]).t(),
    lambda x: torch.flipud(x[0]).flipud(),
    lambda x: torch.broadcast_to(x[0], (3, 2, 4, 4)).broadcast_to((2, 3, 2, 4, 4)),
    lambda x: x[:, None].expand(-1, 5, -1, -1, -1),
    lambda x: torch.diag(x[0, 0]) + x[0, 1].diag(),
    lambda x: -x,
    lambda x: +x,
    lambda x: x.mT,
    lambda x: x[:, 1:, ::2],
    lambda x: x[:, (0, 0, 0, 1)],
    lambda x: x[:, [0, 0, 1]],
    lambda x: x[..., torch.tensor([2, 2, 2]), None],
    lambda x: x[:, :, mask],
    lambda x: F.pad(x, (1, 2, 0, 1)),
    lambda x: F.pad(x, (-1, 2), value=3.0),
    lambda x: F.pad(x, (3, 2, 1, 0), mode="reflect"),
    lambda x: F.pad(x, (2, 2, 2, 2), mode="replicate"),
    lambda x: F.pad(input=x, pad=(4, 1, 1, 4), mode="circular"),
    lambda x: F.pixel_shuffle(x.reshape(-1, 4, 2, 4), 2),
    lambda x: F.pixel_unshuffle(x, 2),
    lambda x: F.channel_shuffle(x.reshape(-1, 4, 2, 4), 2),
    lambda x: F.unfold(x, 3, padding=1),
    lambda x: torch.cat(x.chunk(2, dim=1), 2),
    lambda x: torch.cat([x.split(3, 2)[0], x.split(3, 2)[0]], 1),
    lambda x: torch.stack(x.unbind(1)[0:2]),
    lambda x: torch.concat([x, 2 * x], 1),
    lambda x: torch.concatenate(tensors=[x, x], dim=1),
    lambda x: torch.cat(tensors=(x, torch.ones_like(x))),
    lambda x: torch.hstack([x, -x]),
    lambda x: torch.vstack([x[0], x[0], x[0]]),
    lambda x: torch.dstack([x, x]),
    lambda x: x + x.mean((2, 3), keepdim=True),
    lambda x: torch.add(input=x, other=x, alpha=3),
    lambda x: operator.iadd(x.clone(), x),
    lambda x: operator.isub(2 * x, x),
    lambda x: operator.imul(x.clone(), 3),
    lambda x: operator.itruediv(x.clone(), 4),
    lambda x: torch.add(x, 5),
    lambda x: x.add(x, alpha=-2),
    lambda x: x.clone().add_(x),
    lambda x: 3 * x - x,
    lambda x: torch.sub(x, x.flip(2), alpha=2),
    lambda x: x.sub(other=x.mT),
    lambda x: x.clone().sub_(x.mT),
    lambda x: x * scale,
    lambda x: torch.mul(input=scale, other=x),
    lambda x: x.clone().mul_(2),
    lambda x: x / 4,
    lambda x: torch.div(input=x, other=scale),
    lambda x: x.clone().div_(2),
    lambda x: x @ square,
    lambda x: square @ x,
    lambda x: stack @ x[0],
    lambda x: x[0, 0] @ square[0],
    lambda x: stack @ x[0, 0],
    lambda x: torch.mm(x[0, 0], square).mm(square),
    lambda x: torch.bmm(x[0], stack).bmm(stack),
    lambda x: torch.mv(square, x[0, 0, 0]) + x[0, 0].mv(square[1]),
    lambda x: F.linear(x, square, bias=square[0]),
    lambda x: F.linear(input=x, weight=square[0]),
    lambda x: F.conv1d(x.flatten(1, 2)[:, :4], line, stride=2, padding=1),
    lambda x: F.conv2d(x, kernel, padding="same"),
    lambda x: F.conv2d(input=x, weight=kernel, stride=(2,), padding=1, dilation=(1, 2)),
    lambda x: F.conv2d(x, paired, groups=2, padding=(0, 1)),
    lambda x: F.conv2d(x[0], kernel),
    lambda x: F.conv3d(x[:, None], solid, padding=1),
    lambda x: F.conv_transpose1d(x.flatten(1, 2)[:, :6], line, stride=2),
    lambda x: F.conv_transpose2d(x, paired[:2], stride=2, output_padding=1, groups=2),
    lambda x: F.conv_transpose2d(x, kernel[:2], dilation=2, padding=1),
    lambda x: F.conv_transpose3d(x[:, None].expand(-1, 2, -1, -1, -1), solid, stride=(1, 2, 1)),
    lambda x: F.avg_pool1d(x[0], 3, 1),
    lambda x: F.avg_pool2d(x, (3, 2), (1, 2), 1, count_include_pad=False),
    lambda x: F.avg_pool2d(input=x, kernel_size=3, stride=2, ceil_mode=True),
    lambda x: F.avg_pool3d(x, 2),
    lambda x: F.adaptive_avg_pool1d(x[0], 3),
    lambda x: F.adaptive_avg_pool2d(x, output_size=(3, None)),
    lambda x: F.adaptive_avg_pool3d(x, (1, 3, 2)),
    lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.interpolate(x, (3, 7), mode="bilinear", align_corners=True),
    lambda x: F.interpolate(x, scale_factor=(1.3, 2.6), mode="bilinear"),
    lambda x: F.interpolate(x, scale_factor=1.7, mode="bicubic", recompute_scale_factor=True),
    lambda x: F.interpolate(x, size=3, mode="bicubic", antialias=True),
    lambda x: F.interpolate(x, size=3, mode="area"),
    lambda x: F.interpolate(x, size=7, mode="nearest-exact"),
    lambda x: F.interpolate(x[:, 0], size=7, mode="linear"),
    lambda x: F.interpolate(x[:, None], size=(3, 5, 4), mode="trilinear"),
    lambda x: F.upsample(x, scale_factor=2),
    lambda x: F.batch_norm(x, channels, variance, channels),
    lambda x: F.instance_norm(x, channels, variance, use_input_stats=False),
    lambda x: torch.where(mask, x, 1.0),
]
CURVED_FUNCTIONS: list[Function] = [
    abs,
    F.relu,
    lambda x: F.relu(x, inplace=False),
    F.relu6,
    F.softsign,
    F.logsigmoid,
    F.tanhshrink,
    F.tanh,
    F.sigmoid,
    F.silu,
    F.mish,
    F.selu,
    torch.selu,
    F.hardsigmoid,
    F.hardswish,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.leaky_relu(x, -3.0),
    lambda x: F.leaky_relu(input=x, negative_slope=2),
    lambda x: F.rrelu(x, 2.0, 4.0),
    lambda x: F.prelu(x, weight=channels * 4),
    lambda x: F.elu(x, alpha=2.5),
    lambda x: F.elu(x, -2.0),
    lambda x: F.celu(x, 0.3),
    lambda x: torch.celu(x, alpha=2.0),
    lambda x: F.softplus(x, 5, threshold=40),
    lambda x: F.softplus(x, beta=-2.0, threshold=40),
    lambda x: F.softshrink(x, 0.7),
    lambda x: F.threshold(x, 0.3, 0.3),
    lambda x: F.hardtanh(x, -2, 0.5),
    lambda x: x.clamp(min=scale, max=2 + scale),
    lambda x: F.dropout(x, 0.5, False),
    lambda x: F.dropout1d(x[0], training=False),
    lambda x: F.dropout2d(x, training=False),
    lambda x: F.dropout3d(x[:, None], training=False),
    lambda x: F.alpha_dropout(x, 0.5),
    lambda x: F.feature_alpha_dropout(x),
    lambda x: F.softmax(3 * x, dim=1),
    lambda x: F.softmin(x, dim=3, dtype=torch.float64),
    lambda x: F.log_softmax(x, dim=1),
    lambda x: torch.linalg.vector_norm(x, dim=1),
    lambda x: torch.max(x, other=x.mT),
    lambda x: torch.min(input=x, dim=3, keepdim=True).values,
    lambda x: torch.maximum(x, -2 * x),
    lambda x: torch.maximum(x[:, :1], x),
    lambda x: torch.where(mask, x, 2 * x.mT),
    lambda x: F.layer_norm(x, (4,), square[0], eps=0.3),
    lambda x: F.group_norm(x, 1, channels, channels, 0.2),
    lambda x: F.rms_norm(x, (4, 4), eps=0.1),
    lambda x: F.instance_norm(x, weight=channels, eps=0.1),
    lambda x: F.max_pool1d(x[0], 3, 1),
    lambda x: F.max_pool2d(x, kernel_size=(3, 2), stride=1, padding=1),
    lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    lambda x: F.max_pool3d(x, 2, 1),
    lambda x: torch.max_pool1d(x[0], 2, 1),
    lambda x: torch.max_pool2d(x, 3),
    lambda x: torch.max_pool3d(x, 2, 1),
    lambda x: F.adaptive_max_pool1d(x[0], 3),
    lambda x: F.adaptive_max_pool2d(x, (3, 3)),
    lambda x: F.adaptive_max_pool3d(x, (2, 3, 1)),
]
LINEAR_MODULES: list[nn.Module] = [
    nn.Identity(), nn.Flatten(), nn.Unflatten(2, (2, 2)), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Unfold(3),
    nn.Sequential(nn.Flatten(1, 2), nn.Unflatten(1, (4, 2)), nn.PixelShuffle(2)),
    nn.ZeroPad2d(2), nn.ConstantPad2d((1, 0, 2, 1), 3.0), nn.ReflectionPad2d(3), nn.ReplicationPad2d((2, 0, 1, 3)),
    nn.CircularPad2d((4, 2, 1, 0)),
    *[nn.Sequential(nn.Flatten(1, 2), pad(2)) for pad in (nn.ZeroPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d,
                                                          nn.CircularPad1d)],
    nn.Sequential(nn.Flatten(1, 2), nn.ConstantPad1d(2, 1.0)),
    *[nn.Sequential(nn.Unflatten(1, (1, 2)), pad(1)) for pad in (nn.ZeroPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d,
                                                                 nn.CircularPad3d)],
    nn.Sequential(nn.Unflatten(1, (1, 2)), nn.ConstantPad3d(1, 2.0)),
    nn.Linear(4, 3), nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), nn.ConvTranspose2d(2, 3, 3, stride=2),
    nn.Sequential(nn.Flatten(1, 2), nn.Conv1d(8, 3, 3), nn.ConvTranspose1d(3, 2, 2)),
    nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 2, 2), nn.ConvTranspose3d(2, 1, 2)),
    nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False, eps=0.1), nn.SyncBatchNorm(2),
    nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(2)), nn.Sequential(nn.Unflatten(1, (1, 2)), nn.BatchNorm3d(1)),
    nn.InstanceNorm2d(2, track_running_stats=True, affine=True),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Sequential(nn.Flatten(1, 2), nn.AvgPool1d(3, 1)),
    nn.AvgPool3d(2, 1), nn.AdaptiveAvgPool2d((3, None)), nn.AdaptiveAvgPool3d(2),
    nn.Sequential(nn.Flatten(1, 2), nn.AdaptiveAvgPool1d(3)),
    nn.Upsample(scale_factor=1.6, mode="bilinear"), nn.UpsamplingNearest2d(7), nn.UpsamplingBilinear2d(scale_factor=2),
    nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)),
    nn.Sequential(nn.Linear(4, 3), nn.BatchNorm2d(2)),
    nn.Sequential(nn.Flatten(), nn.Linear(32, 5), nn.BatchNorm1d(5, affine=False)),
]  # fmt: skip
CURVED_MODULES: list[nn.Module] = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Tanh(), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(),
    nn.Sigmoid(), nn.SiLU(),
    nn.Mish(), nn.SELU(), nn.Hardsigmoid(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(-3.0),
    nn.RReLU(2.0, 5.0), nn.PReLU(2), nn.ELU(2.0), nn.ELU(-1.5), nn.CELU(0.5), nn.Softplus(5, 40), nn.Softshrink(1.0),
    nn.Threshold(1.0, 1.0), nn.Hardtanh(-2, 2), nn.Softmax(1), nn.Softmin(3), nn.Softmax2d(), nn.LogSoftmax(1),
    nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(),
    nn.Sequential(nn.Flatten(1, 2), nn.Dropout1d()), nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Dropout3d()),
    nn.InstanceNorm2d(2, eps=0.1, affine=True), nn.LayerNorm((4, 4), eps=0.1), nn.LayerNorm(4, bias=False, eps=0.1),
    nn.Sequential(nn.Flatten(1, 2), nn.InstanceNorm1d(8, eps=0.1)),
    nn.Sequential(nn.Unflatten(1, (1, 2)), nn.InstanceNorm3d(1, eps=0.1)),
    nn.GroupNorm(2, 2, eps=0.1), nn.RMSNorm(4, eps=0.1), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1, dilation=2),
    nn.Sequential(nn.Flatten(1, 2), nn.MaxPool1d(3, 1)), nn.MaxPool3d(2, 1), nn.AdaptiveMaxPool2d(3),
    nn.Sequential(nn.Flatten(1, 2), nn.AdaptiveMaxPool1d(3)), nn.AdaptiveMaxPool3d((2, 3, 1)),
]  # fmt: skip


def linear() -> Iterator[tuple[str, Function]]:
    """What is linear but for a constant."""
    yield from forms(LINEAR)
    yield from forms(METHODS, only_methods=True)
    for name, cases in PIECES.items():
        for args in cases:
            for way in (getattr(torch, name), method(name)):
                yield (
                    f"{name}{args}",
                    lambda x, way=way, args=args: torch.cat([way(x, *args)[i].flatten(1) for i in (0, 1)], 1),
                )
    yield from ((f"function {i}", f) for i, f in enumerate(LINEAR_FUNCTIONS))
    yield from ((f"module {i}: {m}", ready(m)) for i, m in enumerate(LINEAR_MODULES))


def curved() -> Iterator[tuple[str, Function]]:
    """What is not."""
    yield from forms(CURVED)
    for name, cases in INDEXED.items():
        for args in cases:
            for way in (getattr(torch, name), method(name)):
                yield f"{name}{args}", lambda x, way=way, args=args: way(x, *args)[0]
    yield from ((f"function {i}", f) for i, f in enumerate(CURVED_FUNCTIONS))
    yield from ((f"module {i}: {m}", ready(m)) for i, m in enumerate(CURVED_MODULES))


def ready(module: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with weights and statistics drawn."""
    module = seeded(lambda: module, 1)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.2, 2, generator=torch.Generator().manual_seed(1))
    return module.eval()
