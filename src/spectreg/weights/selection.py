"""Which parameters count as weights, and the linear map of each."""

import sys
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from spectreg.maps.base import LinearMap
from spectreg.maps.behaviour import LAYERS, OF_EVERY_MODULE, has_forward_of
from spectreg.weights.kinds import InputSize, chosen_map, maps_of
from spectreg.weights.module_names import named_modules
from spectreg.weights.patterns import Patterns, some
from spectreg.weights.reading import read_weight
from spectreg.weights.roles import Role, role_of

Select = Callable[[str, Tensor], bool]
Candidate = tuple[str, nn.Module, str, Tensor]


@dataclass(frozen=True)
class Weight:
    """One weight of a model: its name, where it lives, and the linear map it is.

    ``tensor`` is looked up in the module each time, so that a weight replaced by ``.to()`` or ``fully_shard`` is
    followed.
    """

    name: str
    module: nn.Module
    attribute: str
    map: LinearMap
    shape: tuple[int, ...]

    @property
    def tensor(self) -> Tensor:
        """The weight as it is now; it lives in the module and is not copied (a computed one is computed)."""
        return read_weight(self.module, self.attribute)

    @property
    def computed(self) -> bool:
        """Whether it is no parameter, but made of others: by a parametrization, or by a pruning mask."""
        return self.module._parameters.get(self.attribute) is None

    @property
    def factors(self) -> tuple[Any, ...]:
        """What is read: the weight itself; of a `spectreg.weights.product.Product` each of its factors."""
        return (self,)


def named_weights(
    model: nn.Module,
    select: Select | None = None,
    map: str | int | Mapping[str, str | int] = "matrix",
    input_size: InputSize | Mapping[str, InputSize] | None = None,
    embeddings: bool = False,
) -> list[Weight]:
    """The weights of ``model`` that have a spectral norm, in the order of ``model.named_modules()``.

    These are all parameters of two or more dimensions but biases, scales, states, embeddings and other tables, and bare
    parameters that are a vector in disguise (one dimension longer than 1); docs/weights.md has the list. A weight tied
    between modules appears once, under its first name; one tied to an embedding is an embedding. Names carry neither
    ``_orig_mod.`` of ``torch.compile`` nor ``module.`` of data parallel wrappers. A weight under a parametrization
    appears as the weight that the forward pass uses.

    Args:
        select: ``(name, weight) -> bool``: which of them to keep.
        map: The linear map that a weight is taken for, or a mapping from name patterns (``fnmatch``) to maps:
            ``"matrix"``, ``"joint"``, ``"each"``, ``"heads"`` or ``"operator"``; docs/weights.md has the table. A
            number cuts the outputs into so many equal parts, each a map of its own. A parameter whose name the mapping
            has in full counts, whatever it is.
        input_size: For ``map="operator"``: height and width (one to three numbers) of a convolution's input, or a
            mapping from name patterns to them.
        embeddings: Whether tables count: embeddings, and learned positions, tokens and codebooks.

    Raises:
        TypeError: ``model`` is no module, or ``select`` no function.
        ValueError: No weight is left; a map is unknown or fits none of the weights; an ``input_size`` that no map
            needs; a weight is stored in a way that hides its shape.

    >>> [(w.name, w.map.blocks, w.map.outputs, w.map.inputs) for w in named_weights(nn.Conv2d(4, 6, 3, groups=2))]
    [('weight', 2, 3, 18)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}: give the nn.Module itself, not its parameters.")
    if select is not None and not callable(select):
        raise TypeError(f"select is {select!r}: it must be a function (name, weight) -> bool.")
    sizes = Patterns("input_size", input_size)
    wanted = Patterns("map", map)
    weights: list[Weight] = []
    names: list[str] = []
    exported = {id(inner) for module in model.modules() if _is_exported(module) for inner in module.modules()}
    asked: set[Any] = set()
    for name, module, attribute, tensor in _candidates(model, embeddings, map if isinstance(map, Mapping) else ()):
        names.append(name)
        size, asked = sizes.get(name), asked | {wanted.get(name)}  # also for weights that ``select`` leaves out
        if select is not None and not select(name, tensor):
            continue
        _refuse_traced(name, module, exported)
        _refuse_unsupported(name, module, attribute, tensor)
        try:
            maps = maps_of(module, attribute, tensor, size)
        except ValueError as error:
            raise ValueError(f"weight {name!r}: {error}") from error
        chosen = chosen_map(name, maps, wanted, module, tensor)
        weights.append(Weight(name, module, attribute, chosen, tuple(tensor.shape)))
    _check_not_empty(model, names, weights)
    for patterns in (wanted, sizes):
        patterns.check_all_used(names)
    if isinstance(map, str) and map not in wanted.used_values | {"matrix"}:
        raise ValueError(f"map={map!r} fits none of the weights ({some(names)}). Leave it out, or see docs/weights.md.")
    if input_size is not None and "operator" not in asked | wanted.used_values:
        raise ValueError("input_size is used by map='operator' only: give that too, or leave input_size out.")
    return weights


def _candidates(model: nn.Module, embeddings: bool, named: Container[str]) -> Iterator[Candidate]:
    """Name, module, attribute and tensor of each weight; one that is tied once, under its first name.

    A tensor that is a table anywhere is one wherever it is tied. What is ``named`` counts whatever it is.
    """
    owners: dict[Hashable, list[tuple[Role, Candidate]]] = {}
    for path, module in named_modules(model):
        _refuse_flattened(path, module)
        for attribute, tensor, key in _tensors_of(module):
            name = f"{path}.{attribute}".lstrip(".")
            _refuse_hidden(name, tensor)
            role = role_of(path, module, attribute, tensor)
            if name in named and role is not Role.LAYER:
                role = Role.BARE
            if role is not Role.NONE:
                owners.setdefault(key, []).append((role, (name, module, attribute, tensor)))
    for tied in owners.values():
        roles, candidates = zip(*tied, strict=True)
        if embeddings or Role.TABLE not in roles or any(c[0] in named for c in candidates):
            best = roles.index(Role.LAYER) if Role.LAYER in roles else 0
            yield (candidates[0][0], *candidates[best][1:])


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor, Hashable]]:
    """The parameters a module calls its own, and what tells tied ones apart; effective ones where parametrized.

    Also a weight that is a plain tensor, which is refused unless it is left out.
    """
    if isinstance(module, ParametrizationList):
        return
    if isinstance(plain := vars(module).get("weight"), Tensor) and _is_set_by_others(module, "weight"):
        yield "weight", plain, id(plain)
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter, id(parameter)
    if is_parametrized(module):
        for attribute, parametrization in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield attribute, read_weight(module, attribute), _made_of(parametrization)


def _made_of(parametrization: ParametrizationList) -> Hashable:
    """The same for two that make the same of the same parameters: of one kind, with equal numbers for settings."""
    settings = [(name, s) for x in parametrization for name, s in vars(x).items() if name not in OF_EVERY_MODULE]
    known = all(isinstance(s, int | float) for _, s in settings) and not any([*x.children()] for x in parametrization)
    if next(parametrization.buffers(), None) is not None or not known:
        return id(parametrization)
    return *map(id, parametrization.parameters()), *map(type, parametrization), *settings


def _is_exported(module: nn.Module) -> bool:
    """Whether it is what torch.export makes of a model: a graph of operators without layers."""
    graph = getattr(module, "graph", None)
    if not isinstance(graph, fx.Graph) or not any(isinstance(node.target, OpOverload) for node in graph.nodes):
        return False
    called = [module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]
    return all(next(layer.parameters(), None) is None for layer in called)


def _refuse_traced(name: str, module: nn.Module, exported: Container[int]) -> None:
    """Raise where the layers are gone: in TorchScript, and in what torch.export makes of a model."""
    made = "exported" if id(module) in exported else "scripted"
    if made == "exported" or isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"weight {name!r} is of a model that was {made}, and no longer says which layer it belongs to: give the "
            "model as it was before, or leave the weight out with select."
        )


def _refuse_flattened(path: str, module: nn.Module) -> None:
    """Raise where FSDP1 has made one vector of all weights, of which each rank holds a part."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FullyShardedDataParallel):
        return
    if module.sharding_strategy != fsdp.ShardingStrategy.NO_SHARD:
        raise ValueError(
            f"module {path or type(module).__name__!r} is wrapped in FSDP1 (FullyShardedDataParallel), which hides the "
            "shapes of its weights. Use fully_shard (FSDP2) instead."
        )


def _refuse_hidden(name: str, tensor: Tensor) -> None:
    """Raise where shapes are hidden, so that ``select`` could not choose either."""
    if getattr(tensor, "_is_flat_param", False):
        raise ValueError(
            f"parameter {name!r} is a flat parameter of FSDP1 (FullyShardedDataParallel), which hides the shapes of "
            "its weights. Use fully_shard (FSDP2) instead."
        )
    if hasattr(tensor, "ds_id"):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed's ZeRO stage 3, which hides its shape and values. "
            "Use stage 1 or 2 with penalty() in the loss, or fully_shard (FSDP2)."
        )


def _refuse_unsupported(name: str, module: nn.Module, attribute: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(f"parameter {name!r} is uninitialized (a lazy module): run the model forward once before.")
    if tensor.is_complex():
        raise ValueError(
            f"weight {name!r} is complex ({tensor.dtype}), which is not supported. "
            "Leave it out with select, or store its real and imaginary parts."
        )
    if tensor.layout != torch.strided:
        raise ValueError(
            f"weight {name!r} is sparse ({tensor.layout}), which is not supported: leave it out with select."
        )
    if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
        raise ValueError(
            f"parameter {name!r}, which map names, has the shape {tuple(tensor.shape)} and is of {tensor.dtype}: a "
            "weight has two dimensions, and numbers that can be trained."
        )
    if tensor.element_size() == 1:
        raise ValueError(f"weight {name!r} is of {tensor.dtype}, which cannot be trained: leave it out with select.")
    if _is_set_by_others(module, attribute):
        raise ValueError(
            f"{name!r} belongs to a layer whose weight is no parameter but a tensor that other code sets: use "
            "torch.nn.utils.parametrizations, and penalty(), or leave it out with select."
        )
    if _is_part_of_a_hooked_weight(module, attribute):
        raise ValueError(
            f"parameter {name!r} is part of a weight that a hook computes in the forward pass (weight_norm, "
            "spectral_norm or prune of torch.nn.utils). Use torch.nn.utils.parametrizations, and penalty()."
        )


def _is_set_by_others(module: nn.Module, attribute: str) -> bool:
    """Whether it is, or seems to be made into, the weight of a layer that somebody sets before each forward pass."""
    if hasattr(type(module), "weight") or not has_forward_of(module, (*LAYERS, nn.Bilinear)):
        return False  # a layer of its own kind, or none
    known = "weight" in module._parameters or is_parametrized(module, "weight") or "weight" in _made_by_hooks(module)
    return attribute.split("_")[0] == "weight" and not known


def _is_part_of_a_hooked_weight(module: nn.Module, attribute: str) -> bool:
    """Whether a hook of ``torch.nn.utils`` makes another attribute of this one before each forward pass."""
    made = _made_by_hooks(module) - {attribute}
    return attribute.removesuffix("_v").removesuffix("_g").removesuffix("_orig") in made


def _made_by_hooks(module: nn.Module) -> set[str | None]:
    return {getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in module._forward_pre_hooks.values()}


def _check_not_empty(model: nn.Module, names: list[str], weights: list[Weight]) -> None:
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no weight to regularize: no parameter with two or more dimensions "
            "(biases and normalization scales do not count; embeddings=True counts embeddings)."
        )
    if not weights:
        raise ValueError(f"select leaves none of the {len(names)} weights: {some(names)}.")
