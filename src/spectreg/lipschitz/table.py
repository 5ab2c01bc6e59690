"""The Lipschitz constants of the operations that networks are built of, in the ℓ2 norm: a table."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from spectreg.lipschitz.rules import (
    Call,
    Constant,
    adaptive_average_pool,
    added,
    attention,
    attribute,
    average_pool,
    batch_norm,
    concatenated,
    convolution,
    divided,
    dropout,
    elu,
    gated,
    instance_norm,
    linear,
    live_norm,
    max_pool,
    mean,
    multiplied,
    plain_index,
    prelu,
    slope,
    total,
    view,
)

ISOMETRIC = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, operator.neg, torch.neg,
    "flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "chunk", "split",
    "clone", "neg", nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
NON_EXPANSIVE = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Tanhshrink, nn.Softmax,
    nn.Softplus, nn.CELU, F.celu, F.relu, F.relu6, F.hardtanh, F.softsign, F.softplus, F.softmax, torch.relu,
    torch.tanh, torch.abs, torch.relu_, torch.softmax, "relu", "relu_", "tanh", "abs", "softmax",
)  # fmt: skip
CONSTANTS: dict[Any, float | Constant] = {
    **dict.fromkeys((*ISOMETRIC, *NON_EXPANSIVE), 1.0),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), 0.25),
    **dict.fromkeys((nn.GELU, F.gelu), 1.1290),  # at x = √2: Φ(x) + xφ(x) = 1.12890; the tanh form 1.12900
    **dict.fromkeys((nn.SiLU, F.silu), 1.0999),  # at x = 2.3994: 1.09984
    **dict.fromkeys((nn.Mish, F.mish), 1.0885),  # 1.08849
    **dict.fromkeys((nn.SELU, F.selu), 1.7581),  # scale · alpha = 1.75810
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu), slope),
    **dict.fromkeys((nn.ELU, F.elu), elu),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), dropout),
    **dict.fromkeys((F.dropout, F.dropout2d), dropout),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), batch_norm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), convolution),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), max_pool),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), average_pool),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), average_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), adaptive_average_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), adaptive_average_pool),
    **dict.fromkeys((torch.mean, "mean"), mean),
    **dict.fromkeys((torch.sum, "sum"), total),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), live_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm),
    **dict.fromkeys((nn.MultiheadAttention, F.scaled_dot_product_attention), attention),
    **dict.fromkeys((nn.GLU, F.glu), gated),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), 0.1667),
    **dict.fromkeys((nn.Hardswish, F.hardswish), 1.5),  # at x = 3
    nn.Linear: linear,
    "view": view,
    getattr: attribute,
    nn.PReLU: prelu,
    operator.getitem: plain_index,
}

Combination = Callable[[Call, Any], float]
COMBINATIONS: dict[Any, Combination] = {
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), concatenated),
    **dict.fromkeys((operator.add, torch.add, "add"), added),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), added),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), multiplied),
    **dict.fromkeys((operator.truediv, torch.div, "div"), divided),
}
