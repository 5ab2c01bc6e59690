"""Weights stored in eight bits beside scales, as the numbers they stand for."""

from collections.abc import Mapping

import torch
from torch import Tensor

SUFFIXES = ("_scale_inv", "_scale", "_zero_point", "_scale_2", "_shape")
BESIDE = ("scale_weight", "scale", "scales", "SCB", "qzeros", "g_idx", "weight_format", "weight_scale", "weight_shape")
PACKED = (torch.uint8, torch.int32)
TWO_IN_ONE = [getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)]  # of a newer torch
BLOCK = 128  # of FP8 weights scaled by blocks, unless the shapes say otherwise


class NotReadableError(ValueError):
    """Why a tensor cannot be taken for the weight it stands for."""


def is_coded(tensor: Tensor) -> bool:
    """Whether its entries are codes of eight bits: FP8 or int8."""
    return tensor.dtype == torch.int8 or (tensor.is_floating_point() and tensor.element_size() == 1)


def belongs_to_a_coded_weight(name: str, names: Mapping[str, Tensor]) -> str | None:
    """The weight whose scales, zero points or layout the tensor ``name`` holds, if it is one of these."""
    for suffix in SUFFIXES:
        owner = name.removesuffix(suffix)
        if owner != name and owner in names and names[owner].element_size() == 1:
            return owner
    prefix, _, last = name.rpartition(".")
    if last in BESIDE:
        for stored in ("weight", "qweight", "weight_packed"):
            owner = f"{prefix}.{stored}".lstrip(".")
            if owner in names and (is_coded(names[owner]) or names[owner].dtype in PACKED):
                return owner
    blocks = name.removesuffix("_scales") + "_blocks"  # MXFP4
    if blocks in names and blocks != name:
        return blocks
    parts = name.split(".")
    for i in range(1, len(parts)):  # bitsandbytes: weight.absmax, weight.quant_state.…
        if (owner := ".".join(parts[:i])) in names and names[owner].dtype in PACKED:
            return owner
    return None


def is_packed(name: str, names: Mapping[str, Tensor]) -> bool:
    """Whether several codes share an entry of the tensor ``name``."""
    last = name.rpartition(".")[2]
    known = last in ("qweight", "weight_packed") or last.endswith("_blocks")
    return known or any(other.startswith((f"{name}.", f"{name}_scale")) for other in names)


def decoded(name: str, codes: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight ``name`` as it acts: codes times their scales, by blocks, channels or as a whole.

    >>> codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
    >>> decoded("weight", codes, {"weight_scale": torch.tensor([10.0, 100.0])})
    tensor([[ 10.,  20.],
            [300., 400.]])
    """
    scale = _scale_of(name, tensors)
    if scale is None:
        prefix = name.rpartition(".")[0]
        others = [n for n in tensors if _is_scale(n, name, prefix)]
        if others:
            raise NotReadableError(f"{codes.dtype} with scales of an unknown kind ({', '.join(others)})")
        if codes.dtype == torch.int8:
            raise NotReadableError("int8 without a scale")
        return codes.float()
    if f"{name}_scale_2" in tensors or scale.dtype in PACKED:
        raise NotReadableError(f"{codes.dtype} with scales of {scale.dtype}, which are codes themselves")
    values = codes.float()
    zero = tensors.get(f"{name}_zero_point")
    if zero is not None:
        values = values - expanded(zero.float(), codes.shape)
    return values * expanded(scale.float(), codes.shape)


def _scale_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    prefix, _, last = name.rpartition(".")
    beside = ("scale_weight", "scale", "SCB") if last == "weight" else ()
    names = [name + suffix for suffix in ("_scale_inv", "_scale")] + [f"{prefix}.{x}".lstrip(".") for x in beside]
    stored = [x for x in names if x in tensors]
    if len(stored) > 1:
        raise NotReadableError(f"several scales: {', '.join(stored)}")
    if not stored:
        return None
    scale = tensors[stored[0]]
    return scale / 127 if stored[0].endswith("SCB") else scale  # bitsandbytes stores the largest entry of each row


def _is_scale(other: str, name: str, prefix: str) -> bool:
    own, _, last = other.rpartition(".")
    return other != name and own == prefix and "scale" in last and not last.startswith(("input", "output", "act"))


def expanded(scale: Tensor, shape: torch.Size) -> Tensor:
    """``scale`` with an entry for each entry of a weight of ``shape``; one number for a block of it before.

    >>> expanded(torch.tensor([[1.0, 2.0]]), torch.Size((2, 3)))  # three columns in blocks of two
    tensor([[1., 1., 2.],
            [1., 1., 2.]])
    """
    if scale.numel() == 1:
        return scale.reshape([1] * len(shape)).expand(shape)
    if scale.ndim < len(shape) and tuple(scale.shape) == tuple(shape[: scale.ndim]):  # of the channels
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    if scale.ndim != len(shape):
        raise NotReadableError(f"scales of shape {tuple(scale.shape)} for a weight of shape {tuple(shape)}")
    for d, size in enumerate(shape):
        block = block_of(size, scale.shape[d])
        scale = scale.repeat_interleave(block, d).narrow(d, 0, size)
    return scale


def block_of(size: int, count: int) -> int:
    """How many entries share one of ``count`` scales: 128, or another power of two, or equal parts.

    >>> block_of(300, 3), block_of(4096, 64), block_of(10, 1), block_of(10, 10)
    (128, 64, 10, 1)
    """
    if count in (1, size):
        return size // count
    powers = [BLOCK, *(2**i for i in range(20, 0, -1))]
    fitting = [block for block in powers if -(-size // block) == count]
    if fitting:
        return fitting[0]
    if size % count:
        raise NotReadableError(f"{count} scales for {size} entries")
    return size // count
