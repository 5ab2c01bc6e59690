"""The weights of a checkpoint or state dict as they act, and why other tensors are left out."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spectreg.checkpoints.adapters import adapter_of, adapters_in, is_second_factor, merged, name_in, product
from spectreg.checkpoints.quantized import (
    PACKED,
    NotReadableError,
    belongs_to_a_coded_weight,
    decoded,
    is_coded,
    is_packed,
)

NO_ADAPTER = "base is for a checkpoint of adapters (LoRA), and there is no adapter here: leave it out."


def acting_weights(
    tensors: Mapping[str, Tensor],
    skipped: dict[str, str],
    base: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights one by one: codes times their scales, adapters as the products of their factors.

    Several adapters of one layer are told apart by the ends of their names: ``layer.lora.first``.

    Args:
        skipped: Gets every other tensor, with the reason why it is left out.
        base: The weights that adapters adapt; they are then given as W + (α/r)·BA, else as (α/r)·BA.

    >>> skipped = {}
    >>> state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "steps": torch.tensor(3)}
    >>> [name for name, _ in acting_weights(state, skipped)], skipped
    (['weight'], {'bias': '1 dimension', 'steps': 'int64'})
    """
    config, adapters = getattr(tensors, "adapter", None), adapters_in(tensors)
    if base is not None and not adapters:
        raise ValueError(NO_ADAPTER)
    for name in tensors:
        try:
            weight = _acting(name, tensors, base, config, adapters)
        except NotReadableError as error:
            skipped[name] = str(error)
            continue
        yield weight
        del weight  # one at a time


def _acting(
    name: str,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None,
    config: Mapping[str, Any] | None,
    adapters: Mapping[str, int],
) -> tuple[str, Tensor]:
    adapter = adapter_of(name)
    if adapter is not None:
        change = product(adapter, tensors, config)
        own = f".{adapter.own_name}" if adapter.own_name and adapters[adapter.layer] > 1 else ""
        if adapter.own_base in tensors:
            base = {f"{adapter.layer}.weight": weight_in(tensors, adapter.own_base)}
        if base is None:
            return f"{adapter.layer}.lora{own}", change
        weight = weight_in(base, name_in(base, adapter.layer))
        turned = bool(config and config.get("fan_in_fan_out"))
        return f"{adapter.layer}.weight{own}", merged(weight, change, turned)
    if is_second_factor(name):
        raise NotReadableError("a factor of an adapter, measured as its product")
    if name.endswith(".base_layer.weight"):
        raise NotReadableError("measured with its adapter")
    return name, weight_in(tensors, name)


def weight_in(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor ``name`` as it acts; raises where it is no weight."""
    owner = belongs_to_a_coded_weight(name, tensors)
    if owner is not None:
        raise NotReadableError(f"belongs to {owner!r}")
    tensor = tensors[name]
    reason = why_not(name, tensor, tensors)
    if reason is not None:
        del tensor  # which the error would keep alive
        raise NotReadableError(reason)
    return decoded(name, tensor, tensors) if is_coded(tensor) else tensor


def why_not(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a tensor is no weight that can be measured; None where it is one."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"stored as {dtype}, {tensor.layout}"
    if tensor.dtype in PACKED and is_packed(name, tensors):
        return f"packed in {dtype} (GPTQ, AWQ, 4 bits): dequantize it with its own library"
    if not (tensor.is_floating_point() or is_coded(tensor)):
        return dtype
    if tensor.ndim < 2:
        return f"{tensor.ndim} dimension{'s' * (tensor.ndim != 1)}"
    return None if tensor.numel() else "empty"
