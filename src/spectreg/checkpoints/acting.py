"""The weights of a checkpoint or state dict as they act, and why other tensors are left out."""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spectreg.checkpoints.adapters import (
    Adapter,
    adapter_of,
    adapters_in,
    is_second_factor,
    merged,
    name_in,
    other_kind,
    product,
    refuse_moved_base,
)
from spectreg.checkpoints.quantized import (
    PACKED,
    TWO_IN_ONE,
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
    acting = Acting(tensors, base)
    for stored in tensors:
        try:
            weight = acting.weight(stored)
        except NotReadableError as error:
            skipped[stored] = str(error)
            continue
        yield acting.name(stored), weight
        del weight  # one at a time


class Acting:
    """What the tensors of a checkpoint act as: names and weights; arguments as of `acting_weights`."""

    def __init__(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> None:
        self.tensors, self.base, self.adapters = tensors, base, adapters_in(tensors)
        self.config: Mapping[str, Any] | None = getattr(tensors, "adapter", None)
        if base is not None and not self.adapters:
            raise ValueError(NO_ADAPTER)

    def name(self, stored: str) -> str:
        """The name of the weight that the tensor ``stored`` acts as, or the first factor of."""
        adapter = adapter_of(stored)
        if adapter is None:
            return stored
        own = f".{adapter.own_name}" if adapter.own_name and self.adapters[adapter.layer] > 1 else ""
        merges = self.base is not None or adapter.own_base in self.tensors
        return f"{adapter.layer}.{'weight' if merges else 'lora'}{own}"

    def weight(self, stored: str) -> Tensor:
        """That weight; raises where it is none."""
        adapter = adapter_of(stored)
        if adapter is not None:
            return self._adapted(adapter)
        if is_second_factor(stored):
            raise NotReadableError("a factor of an adapter, measured as its product")
        if stored.endswith(".base_layer.weight"):
            raise NotReadableError("measured with its adapter")
        if kind := other_kind(stored):
            raise NotReadableError(f"part of an adapter of another kind ({kind}): merge it and save that")
        return weight_in(self.tensors, stored)

    def _adapted(self, adapter: Adapter) -> Tensor:
        change = product(adapter, self.tensors, self.config)
        if adapter.own_base in self.tensors:
            weight = weight_in(self.tensors, adapter.own_base)
        elif self.base is None:
            return change
        else:
            refuse_moved_base(self.config or {})
            weight = weight_in(self.base, name_in(self.base, adapter.layer))
        return merged(weight, change, self._is_turned(adapter, change, weight.flatten(1).shape))

    def _is_turned(self, adapter: Adapter, change: Tensor, stored: torch.Size) -> bool:
        """Whether the weight is stored as inputs × outputs: its shape says so, and of a square one the configuration.

        That has one ``fan_in_fan_out`` for all layers, whatever each of them is.
        """
        if self.config is None or adapter.kind == "lora_embedding_A":
            return False
        if change.shape[0] != change.shape[1]:
            return stored == change.shape[::-1]
        if self._misled_by:
            raise NotReadableError(
                "square, and whether it is stored as inputs × outputs is not known: fan_in_fan_out of "
                f"adapter_config.json, one for all layers, is not that of {self._misled_by!r}; merge it and save that"
            )
        return self._turns

    @property
    def _turns(self) -> bool:
        return bool(self.config and self.config.get("fan_in_fan_out"))

    @cached_property
    def _misled_by(self) -> str | None:
        """A layer that is stored the other way than the configuration says."""
        for adapter in filter(None, map(adapter_of, self.tensors)):
            if adapter.second in self.tensors and adapter.kind != "lora_embedding_A":
                change = len(self.tensors[adapter.second]), self.tensors[adapter.first][0].numel()
                said = change[::-1] if self._turns else change
                if change[0] != change[1] and self._stored_shape(adapter) == said[::-1]:
                    return adapter.layer
        return None

    def _stored_shape(self, adapter: Adapter) -> tuple[int, ...] | None:
        """Rows and columns of the weight that is adapted, as it is stored."""
        try:
            if adapter.own_base in self.tensors:
                shape = self.tensors[adapter.own_base].shape
            else:
                shape = (self.base or {})[name_in(self.base or {}, adapter.layer)].shape
        except NotReadableError:
            return None
        return shape[0], math.prod(shape[1:])


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
    if tensor.dtype in TWO_IN_ONE or (tensor.dtype in PACKED and is_packed(name, tensors)):
        return f"packed in {dtype} (GPTQ, AWQ, 4 bits): dequantize it with its own library"
    if not (tensor.is_floating_point() or is_coded(tensor)):
        return dtype
    if tensor.ndim < 2:
        return f"{tensor.ndim} dimension{'s' * (tensor.ndim != 1)}"
    return None if tensor.numel() else "empty"
