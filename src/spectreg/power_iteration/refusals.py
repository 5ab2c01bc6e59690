"""What the regularizer cannot act on, and what to do then: one clear error each."""

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from spectreg.maps.factors import Factors, Value, tensors_of
from spectreg.power_iteration.layout import is_sharded
from spectreg.weights.selection import Weight

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_number(name: str, value: Any, fine: Callable[[Any], bool], what: str) -> None:
    """Raise unless the setting ``name`` is a number that is ``fine``."""
    if not (is_number(value) and fine(value)):
        raise ValueError(f"{name} is {value!r}: it must be {what}.")


def is_number(value: Any) -> bool:
    """Whether ``value`` is one real number, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def check_seed(seed: Any) -> None:
    """Raise unless ``seed`` is one that a generator takes."""
    check_number("seed", seed, lambda x: -(2**63) <= x < 2**64 and x % 1 == 0, "a whole number from -2⁶³ to 2⁶⁴ - 1")


def check_strength(name: str, number: Any, every: int) -> None:
    """Raise unless ``number`` × ``every`` is 0, or one that float32 can hold."""
    check_number(name, number, lambda x: 0 <= x < inf, "a finite number from 0")
    if number and not SMALLEST <= number * every <= LARGEST:
        times = f" × every={every}" if every > 1 else ""
        raise ValueError(
            f"{name} is {number!r}{times}: it must be 0, or from {SMALLEST:.3g} to {LARGEST:.3g}, which float32 can "
            "hold."
        )


def refuse_unfit(weights: Sequence[Weight], tensors: Sequence[Value]) -> None:
    """Refuse weights without values, and those that no longer have the shape they had."""
    for weight, W in zip(weights, tensors, strict=True):
        if isinstance(W, Factors):
            _refuse_scattered(weight.name, W)
        if W.is_meta:
            raise ValueError(
                f"weight {weight.name!r} is on the meta device and has no values: offloaded by accelerate, or never "
                "loaded. Load the whole model first (after to_empty(), or without device_map)."
            )
        if tuple(W.shape) != weight.shape:
            raise ValueError(
                f"weight {weight.name!r} has the shape {tuple(W.shape)} now, and had {weight.shape} when the "
                "regularizer was built: build a new one."
            )


def some_share_memory(weights: Sequence[Value]) -> bool:
    """Whether two of these may be one: asked at every step, since weights may be tied at any time."""
    if torch.compiler.is_compiling():
        return False
    places = [W.data_ptr() if type(W) is Parameter and W.device.type in ("cpu", "cuda") else id(W) for W in weights]
    return len(set(places)) < len(places)


def refuse_twice_in_memory(weights: Sequence[Weight]) -> None:
    """Refuse a trained parameter that comes twice, or two that begin at the same place in memory."""
    begins: dict[Hashable, tuple[str, int]] = {}
    for weight in weights:
        W = weight.tensor
        if isinstance(W, Tensor) and W.requires_grad and not weight.computed:
            place = place_in_memory(W)
            if place in begins:
                name, other = begins[place]
                what = "one parameter" if other == id(W) else "two parameters in the same memory"
                raise ValueError(
                    f"weights {name!r} and {weight.name!r} are {what}, which would be acted on twice: tie them by one "
                    "parameter or a parametrization, or leave one of them out with select."
                )
            begins[place] = weight.name, id(W)


def place_in_memory(W: Tensor) -> Hashable:
    """Where the numbers of ``W`` begin; of shards, sparse tensors and those without numbers, which object it is."""
    if is_sharded(W) or W.is_meta or W.layout != torch.strided or not W.numel():
        return id(W)
    return W.untyped_storage()._cdata, int(W.storage_offset())


def _refuse_scattered(name: str, W: Factors) -> None:
    """Refuse a product of sharded factors, or of ones on several devices."""
    if is_sharded(W):
        raise NotImplementedError(
            f"a factor of the product {name!r} is sharded (a DTensor), which is not supported for products: act on the "
            "factors, whose norms bound that of the product (SpectralNormRegularizer(model, …) or SpectralNormCap)."
        )
    if len({x.device for x in W if x.ndim}) > 1:
        raise ValueError(f"the factors of the product {name!r} are on several devices: move them to one.")


def refuse_computed(weights: Sequence[Weight]) -> None:
    """Refuse weights that have no gradient of their own; frozen ones have none to miss."""
    for weight in weights:
        if weight.computed and weight.tensor.requires_grad:
            raise ValueError(
                f"weight {weight.name!r} is under a parametrization: it is computed (as one under a pruning mask is) "
                "and has no gradient of its own. Use penalty(), which acts on the effective weight, or leave it out "
                "with select."
            )


def refuse_constants(weights: Sequence[Weight], tensors: Sequence[Value]) -> None:
    """Refuse computed weights through which no gradient reaches the parameters that they are made of."""
    for weight, W in zip(weights, tensors, strict=True):
        parts = zip(weight.factors, tensors_of(W), strict=True)
        if any(part.computed and T.requires_grad and T.is_leaf for part, T in parts):
            raise ValueError(
                f"weight {weight.name!r} is under a parametrization that gives a constant in evaluation mode: call "
                "penalty() in training mode, or under no_grad() for its value."
            )


def refuse_gradients_by_sample(weights: Sequence[Weight]) -> None:
    """Refuse weights whose gradients Opacus takes sample by sample: its optimizer makes `.grad` anew from those."""
    for weight in (part for w in weights for part in w.factors):
        parameter = weight.module._parameters.get(weight.attribute)
        if parameter is not None and hasattr(parameter, "grad_sample"):
            raise RuntimeError(
                f"weight {weight.name!r} has gradients by sample (Opacus), from which DPOptimizer makes the gradient "
                "anew: neither add_gradient() nor penalty() would have an effect. Use attach(dp_optimizer), which acts "
                "after clipping and noise."
            )


def refuse_gathered(names: Sequence[str]) -> None:
    """Refuse weights that were sharded and, now, are not."""
    if names:
        raise RuntimeError(
            f"weight {names[0]!r} is gathered, but its optimizer steps the shards: a gradient added now would be lost. "
            "Call reshard() of the fully_shard model before, leave set_reshard_after_backward alone, and with "
            "reshard_after_forward=<int> take penalty() before the forward pass."
        )


def refuse_resharded(weight: Weight, tensors: Sequence[Tensor]) -> None:
    """Refuse the gradient of parameters that were gathered at penalty(), are sharded now, and still have it.

    That is known at the end of the backward pass only: fully_shard may take it with that of another forward pass. Where
    gradients are not synchronized it would stay there to be taken later, which cannot be told from one that is lost.
    """
    gathered = [
        T for part, T in zip(weight.factors, tensors, strict=True)
        if T.is_leaf and not is_sharded(T) and is_sharded(part.tensor)
    ]  # fmt: skip

    def check() -> None:
        if any(T.grad is not None for T in gathered):
            raise RuntimeError(
                f"weight {weight.name!r} was gathered when penalty() was taken, and was sharded again before the "
                "gradient of the penalty came, which would be lost: take penalty() after the forward pass of training, "
                "or call reshard() of the fully_shard model before (after validation, say)."
            )

    if gathered:
        torch.autograd.Variable._execution_engine.queue_callback(check)


def refuse_schedules_in_a_graph(capturing: bool) -> None:
    """Refuse a strength that is a function of the step in a CUDA graph, every replay of which would have the first."""
    if capturing:
        raise RuntimeError(
            "strength is a function of the step, which no replay of a CUDA graph would call: give a number, and assign "
            "regularizer.strength between the replays."
        )


def refuse_strangers(members: Sequence[Weight], weights: Sequence[Value], held: Container[int]) -> None:
    """Refuse weights that are not among the parameters (by id) that the optimizer holds."""
    for w, W in zip(members, weights, strict=True):
        if any(T.requires_grad and id(T) not in held for T in tensors_of(W)):
            raise RuntimeError(
                f"weight {w.name!r} is not a parameter of the optimizer that held it at attach(): it was "
                "replaced or thawed since. Let its optimizer hold it, then detach() and attach() again."
            )


def refuse_other_weights(own: Mapping[str, Mapping[str, Any]], vectors: Mapping[str, Any]) -> None:
    """Refuse ``vectors`` that were saved of weights of other names or shapes than one's ``own``."""
    torn = [name for name, saved in vectors.items() if not {"u", "v", "sigma", "calls"} <= set(saved)]
    if torn:
        raise ValueError(f"this state is torn: of {', '.join(torn)} it lacks u, v, sigma or calls.")
    missing = [name for name in own if name not in vectors]
    unexpected = [name for name in vectors if name not in own]
    different = [
        f"{name} {tuple(vectors[name][x].shape)} instead of {tuple(own[name][x].shape)}"
        for name in own
        for x in ("u", "v", "sigma")
        if name in vectors and vectors[name][x].shape != own[name][x].shape
    ]
    if missing or unexpected or different:
        raise ValueError(
            f"this state is of another model or map, or of other vectors (k or tracked): missing {missing}, unexpected "
            f"{unexpected}, shapes that differ {different}. Build the regularizer as it was when the state was saved."
        )


@contextmanager
def torch_func_refused() -> Iterator[None]:
    """Say what to do where a transform of ``torch.func`` meets a function that it cannot differentiate."""
    try:
        yield
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        raise NotImplementedError(
            "penalty() is not differentiated by torch.func (grad, vmap, jacrev and others), which sees other weights "
            "than the model's own. Use backward() or torch.autograd.grad, or add_gradient()."
        ) from error
