"""The graph of a model by ``torch.fx``: modules that compute what the table says stay whole, others are traced into."""

import operator
import traceback
from collections.abc import Container
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from spectreg.lipschitz.table import rule_of
from spectreg.maps.behaviour import has_forward_of, hooks

LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, str(Path(__file__).parents[1])))


def traced(model: nn.Module, whole: Container[Any]) -> fx.GraphModule:
    """The graph of ``model``; modules of the types in ``whole`` are not traced into."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("a scripted model cannot be traced by torch.fx: give the module it was scripted from.")
    root, tracer = nn.Sequential(model), Tracer(whole)  # a model that is itself one layer becomes a node
    try:
        return fx.GraphModule(root, tracer.trace(root))
    except Exception as error:  # tracing runs the model's own code, which can raise anything
        inner = tracer.inner if tracer.inner is not None else model
        hooked = f" {type(inner).__name__} has hooks, so that it is traced into." if hooks(inner) else ""
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx: {str(error).rstrip('.')}{place(error)}.{hooked} If "
            f"you know the Lipschitz constant L of {type(inner).__name__}, or of a module around it, give "
            f"lipschitz_bound(…, constants={{{type(inner).__name__}: L}})."
        ) from error


class InPlace(fx.Proxy):
    """A traced value whose ``x += y`` changes it, as it does a tensor; torch's own makes ``x = x + y`` of that."""

    def _changed(self, operation: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    __iadd__ = partialmethod(_changed, operator.iadd)
    __isub__ = partialmethod(_changed, operator.isub)
    __imul__ = partialmethod(_changed, operator.imul)
    __itruediv__ = partialmethod(_changed, operator.itruediv)
    __ifloordiv__ = partialmethod(_changed, operator.ifloordiv)
    __imod__ = partialmethod(_changed, operator.imod)
    __ipow__ = partialmethod(_changed, operator.ipow)


class Tracer(fx.Tracer):
    def __init__(self, whole: Container[Any]) -> None:
        super().__init__()
        self.whole = whole
        self.inner: nn.Module | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlace(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in self.whole:
            return True
        kind, _ = rule_of(m)
        if kind is None:
            return super().is_leaf_module(m, module_qualified_name) and not hooks(m) and "forward" not in vars(m)
        return not hooks(m) and has_forward_of(m, (kind,))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.inner = self.inner or m
            raise


def place(error: Exception) -> str:
    """Where in the user's own code an error arose: the last line that is neither torch's nor this library's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*LIBRARIES, "<")):
            return f", at {frame.filename}:{frame.lineno}: {frame.line}"
    return ""
