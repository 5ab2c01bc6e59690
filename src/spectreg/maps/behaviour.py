"""Whether a layer computes what its attributes say, and a way to run it that leaves no trace."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry
from torch.nn.parameter import is_lazy

from spectreg.maps.base import LinearMap

OF_EVERY_MODULE = vars(nn.Module()).keys()  # what torch itself keeps in each
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
METHODS = ("__call__", "_call_impl", "_wrapped_call_impl", "forward", "_conv_forward", "_output_padding")


def calls_torch(module: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> bool:
    """Whether calling ``module`` runs the forward of one of ``kinds`` and nothing else.

    Not so for a subclass with a forward of its own, a forward set on the object, and hooks.

    >>> layer = nn.Linear(2, 2)
    >>> calls_torch(layer)
    True
    >>> _ = layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    >>> calls_torch(layer)
    False
    """
    return not hooks(module) and has_forward_of(module, kinds)


def has_forward_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether class and object have the forward of one of ``kinds``; hooks apart."""
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    inherited = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in METHODS)
    return kind is not None and inherited and vars(module).keys().isdisjoint(METHODS)


def hooks(module: nn.Module) -> list[Any]:
    """The hooks that run before or after the forward of ``module``, those for all modules among them."""
    tables = (
        module._forward_pre_hooks, module._forward_hooks, registry._global_forward_pre_hooks,
        registry._global_forward_hooks,
    )  # fmt: skip
    return [hook for table in tables for hook in table.values()]


def acts_as(layer: nn.Module, A: LinearMap, shape: tuple[int, ...]) -> bool:
    """Whether ``layer`` maps inputs of ``shape`` as ``A`` does with its weight, and its gradients alike.

    Certain where ``calls_torch``; else found by random inputs of two sizes and their opposites, in evaluation mode. Of
    sharded weights and those without storage only the forward's origin is known; the hooks of ``fully_shard`` change
    nothing.
    """
    if calls_torch(layer):
        return True
    some = next(layer.parameters(), None)
    if some is None or some.is_meta or is_sharded(some):
        return has_forward_of(layer, LAYERS) and all(shards(hook) for hook in hooks(layer))
    generator = torch.Generator().manual_seed(0)
    with undisturbed(layer), torch.inference_mode(False), torch.enable_grad():
        W: Any = layer.weight  # before a hook of the forward pass can set it
        try:
            inputs = [scale * gaussian(shape, W, generator) for scale in (1.0, 1e3)]
            return all(agree(layer, A, W.detach(), sign * x) for x in inputs for sign in (1.0, -1.0))
        except Exception:  # the layer's own code, which can raise anything on an input of one tensor
            return False


def agree(layer: nn.Module, A: LinearMap, W: Tensor, x: Tensor) -> bool:
    """Whether ``layer`` gives the same for ``x`` as ``A`` with W, plus its bias, and the same gradient."""
    bias: Any = layer.bias
    y = layer(x.requires_grad_())
    expected = A.forward(W, x.detach().flatten())
    if y.numel() != expected.numel():
        return False
    expected = expected.view_as(y)
    expected = expected if bias is None else expected + bias.detach().view(-1, *[1] * (y.ndim - 2))
    u = expected.detach() / expected.abs().max().clamp_min(torch.finfo(y.dtype).tiny)
    (g,) = torch.autograd.grad(y, x, u)
    return close(y.detach(), expected) and close(g, A.adjoint(W, u.flatten()).view_as(g))


def gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(1, *shape, generator=generator, dtype=torch.float64, device=generator.device).to(like)


def is_sharded(W: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and seldom needed

    return isinstance(W, DTensor)


def shards(hook: Any) -> bool:
    """Whether a hook is one of ``fully_shard``, which gathers weights and frees them."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed._composable_state import _State

    return isinstance(getattr(hook, "__self__", None), _State)


@contextmanager
def random_state_kept(module: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside, on the CPU and where ``module`` lives, the global generators are as before."""
    devices = {t.device for t in module.parameters() if t.device.type in ("cuda", "xpu")}
    kind = next((d.type for d in devices), "cuda")
    with torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind):
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, attributes, buffers and random states are as they were.

    A forward pass may set attributes (a weight made by a hook, a cache) and fill lists and dictionaries.
    """
    if lazy := next((name for name, p in model.named_parameters() if is_lazy(p)), None):
        raise ValueError(f"parameter {lazy!r} is uninitialized (a lazy module): run the model forward once before.")
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers = [(c, c.copy()) for _, own in attributes for c in own.values() if isinstance(c, dict | list)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        for module, _ in attributes:
            module.training = False
        with random_state_kept(model):
            yield
    finally:
        for module, own in attributes:
            put_back(vars(module), own)
        for container, before in containers:
            put_back(container, before)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # an unneeded write would invalidate graphs in flight
                    buffer.copy_(value)


def put_back(now: Any, before: Any) -> None:
    """Give a dictionary or list the very entries that it had, unless it has them still."""
    pairs = [(now, before)] if isinstance(now, list) else [(now, before), (now.values(), before.values())]
    if len(now) == len(before) and all(all(map(operator.is_, a, b)) for a, b in pairs):
        return
    now.clear()
    now.update(before) if isinstance(now, dict) else now.extend(before)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether the two agree but for rounding."""
    if actual.shape != expected.shape:
        return False
    size = expected.abs().max() if expected.numel() else 0.0
    return bool(((actual - expected).abs() <= torch.finfo(actual.dtype).eps ** 0.75 * size).all())
