"""Every kind of weight: the linear maps that it can be taken for, by the module it belongs to."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spectreg.maps.base import LinearMap
from spectreg.maps.behaviour import acts_as
from spectreg.maps.convolution import OperatorMap
from spectreg.maps.matrix import MatrixMap
from spectreg.weights.patterns import Patterns
from spectreg.weights.roles import is_kernel, is_stored_transposed, is_weight_of_a_layer

InputSize = tuple[int, ...]

MAPS = ("matrix", "joint", "each", "heads", "operator")
HEADS = ("n_head", "n_heads", "num_heads", "num_attention_heads")
WIDTHS = ("d_head", "head_dim", "attention_head_size")
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1}


def maps_of(
    module: nn.Module, attribute: str, weight: Tensor, input_size: InputSize | None = None
) -> dict[str, LinearMap]:
    """Every map that ``weight``, which belongs to ``module``, can be taken for, by name; ``"matrix"`` is always one.

    ``"operator"`` is among them for a convolution whose ``input_size`` is known.
    """
    shape = tuple(weight.shape)
    if not is_weight_of_a_layer(module, attribute, shape):
        return _maps_of_a_bare_one(module, shape)
    joint = MatrixMap(shape)
    if is_kernel(module, attribute, shape):
        maps = _maps_of_convolution(module, shape)
        if input_size is not None:
            maps["operator"] = OperatorMap.of(module, input_size)
        return maps
    gates = next((number for kind, number in GATES.items() if isinstance(module, kind)), None)
    if gates is not None and not attribute.startswith("weight_hr"):
        return {"matrix": MatrixMap(shape, gates, norm="each"), "joint": joint}
    if isinstance(module, nn.MultiheadAttention):
        parts = 3 if attribute == "in_proj_weight" else 1
        heads = MatrixMap(shape, parts * module.num_heads, norm="each")
        return {"matrix": MatrixMap(shape, parts, norm="each"), "joint": joint, "heads": heads}
    if is_stored_transposed(module, attribute, shape):
        return {"matrix": MatrixMap(shape, layout="columns")}
    return {"matrix": joint}


def _maps_of_a_bare_one(module: nn.Module, shape: tuple[int, ...]) -> dict[str, LinearMap]:
    """Three dimensions are a stack of matrices, such as experts; four or more a kernel, but for a first one of 1.

    Where the module says that the last two are heads and their width, three dimensions are one matrix.
    """
    joint = MatrixMap(shape)
    if len(shape) < 3:
        return {"matrix": joint}
    stack = MatrixMap(shape, shape[0], norm="each", layout="stack")
    says = (module, getattr(module, "config", None))
    heads, widths = ({getattr(x, name, None) for x in says for name in names} for names in (HEADS, WIDTHS))
    is_stack = shape[0] == 1 or (len(shape) == 3 and not (shape[1] in heads and shape[2] in widths))
    return {"matrix": stack if is_stack else joint, "each": stack, "joint": joint}


def _maps_of_convolution(module: _ConvNd, shape: tuple[int, ...]) -> dict[str, LinearMap]:
    layout: Any = "transposed" if isinstance(module, _ConvTransposeNd) else "rows"
    maps: dict[str, LinearMap] = {"matrix": MatrixMap(shape, module.groups, layout=layout)}
    if module.groups > 1:
        maps["each"] = MatrixMap(shape, module.groups, norm="each", layout=layout)
        maps["joint"] = MatrixMap(shape, layout=layout)
    return maps


def chosen_map(name: str, maps: dict[str, LinearMap], wanted: Patterns, module: nn.Module, weight: Tensor) -> LinearMap:
    """The one of ``maps`` that is ``wanted`` for the weight ``name``; raises where it does not fit."""
    how = wanted.get(name, "matrix")
    if isinstance(how, int) and not isinstance(how, bool):
        return _cut(name, maps["matrix"], how)
    if how not in MAPS:
        raise ValueError(f"unknown map {how!r} for {name!r}: it is one of {', '.join(MAPS)}, or a number of parts.")
    if how == "operator" and how not in maps and is_kernel(module, name.rpartition(".")[2], tuple(weight.shape)):
        raise ValueError(
            f"map='operator' needs the size of the input of {name!r}, whose norm depends on it. "
            "Give input_size=(32, 32), or a mapping from name patterns to sizes (spectreg.input_sizes finds them)."
        )
    if how not in maps:
        if isinstance(wanted.value, Mapping):
            raise ValueError(f"map {how!r} does not fit {name!r} ({type(module).__name__}): {', '.join(maps)} would.")
        return maps["matrix"]
    if isinstance(m := maps[how], OperatorMap) and not acts_as(module, m, m.input_shape):
        raise ValueError(
            f"map='operator' does not fit {name!r}: {type(module).__name__} does not compute the convolution of its "
            "weight by its stride, padding, dilation and groups (a forward of its own, or a hook). "
            "Use map='matrix' for it."
        )
    wanted.used_values.add(how)
    return maps[how]


def map_of_a_tensor(name: str, shape: tuple[int, ...], wanted: Patterns) -> LinearMap:
    """What is ``wanted`` of a tensor without its module; by default its first dimension against all others.

    Three dimensions called experts are a stack of matrices, as a model's bare ones are.
    """
    maps: dict[str, LinearMap] = {"matrix": MatrixMap(shape), "joint": MatrixMap(shape)}
    if len(shape) > 2:
        maps["each"] = MatrixMap(shape, shape[0], norm="each", layout="stack")
        if len(shape) == 3 and "experts" in re.split(r"[._]", name):
            maps["matrix"] = maps["each"]
    how = wanted.get(name, "matrix")
    if isinstance(how, int) and not isinstance(how, bool):
        return _cut(name, maps["matrix"], how)
    if how not in maps and (how not in MAPS or isinstance(wanted.value, Mapping)):
        raise ValueError(f"map {how!r} does not fit {name!r} {shape}: {', '.join(maps)} or a number of parts would.")
    return maps.get(how, maps["matrix"])


def _cut(name: str, m: LinearMap, parts: int) -> LinearMap:
    if isinstance(m, MatrixMap) and m.layout == "stack":
        raise ValueError(
            f"map {parts} does not fit {name!r}, a stack of {m.blocks} matrices: 'each' takes them apart, 'joint' does "
            "not."
        )
    rows = m.blocks * m.outputs
    if parts < 1 or rows % parts or not isinstance(m, MatrixMap) or m.layout == "transposed":
        raise ValueError(f"map {parts} does not fit {name!r}: {rows} outputs cannot be cut into {parts} equal parts.")
    return replace(m, blocks=parts, norm="each")
