"""Measure: the bound on a network's Lipschitz constant that its layers give (Section 3.1 of arXiv:1705.10941)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from spectreg.lipschitz.rules import Call, Constant, UnknownConstantError
from spectreg.lipschitz.table import COMBINATIONS, CONSTANTS
from spectreg.measures._model import as_found, device_of

FUSABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Factor:
    """What one operation contributes: its Lipschitz constant, and the bound on all up to and with it."""

    name: str
    operation: str
    constant: float
    bound: float


@dataclass(frozen=True)
class LipschitzBound:
    """``‖f(x) − f(z)‖₂ ≤ value·‖x − z‖₂`` for all inputs of the shape; the factors in the order of the graph."""

    value: float
    factors: tuple[Factor, ...]


def lipschitz_bound(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    constants: Mapping[Any, Constant | float] | None = None,
    grid: int = 40,
) -> LipschitzBound:
    """A certified bound on how much ``model`` in evaluation mode stretches the distance between two inputs.

    Traced by ``torch.fx``; each operation contributes a constant. Batch normalization is fused into the convolution
    or linear layer before it; concatenation takes the root of the sum of squares, addition the sum. The model is left
    as found.

    Args:
        input_shape: Of one example.
        constants: For operations not known here: module type, function or method name → its constant, or a function
            of a ``Call`` that gives it. A module type given here is not traced into.
        grid: Frequencies a dimension for a convolution's norm, see ``norm_bound``.

    Raises:
        ValueError: A shape that the model does not take, a graph that cannot be traced, or an operation without a
            known constant (named).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    ...     _ = model[2].weight.copy_(torch.tensor([[0.0, 2.0]]))
    >>> round(lipschitz_bound(model, (2,)).value, 6)
    6.0
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("a scripted model cannot be traced by torch.fx: give the module it was scripted from.")
    with as_found(model), torch.no_grad():
        walk = Walk(traced(model, constants or {}), constants or {}, grid)
        parameter = next(model.parameters(), torch.zeros(()))
        dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        x = torch.randn(2, *input_shape, dtype=dtype, device=device_of(model))  # as_found puts the generator back
        eager = output_of(model, x.clone(), input_shape)
        graph = walk.run(x)
        if not torch.allclose(graph, eager, rtol=1e-3, atol=1e-3 * eager.abs().max().item()):
            raise ValueError("the graph that torch.fx traced computes something else: look for in-place changes.")
    return LipschitzBound(walk.result, tuple(walk.factors))


def output_of(model: nn.Module, x: Tensor, input_shape: tuple[int, ...]) -> Any:
    try:
        return model(x)
    except Exception as error:  # the model's own code, which can raise anything
        raise ValueError(
            f"{type(model).__name__} fails on input_shape={input_shape}, which is the shape of one example without the "
            f"batch: {error}"
        ) from error


def traced(model: nn.Module, constants: Mapping[Any, Constant | float]) -> fx.GraphModule:
    """The graph of ``model``, in which modules with a given constant are not looked into."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return type(m) in constants or super().is_leaf_module(m, module_qualified_name)

    root = nn.Sequential(model)  # a model that is itself one layer becomes a node
    try:
        return fx.GraphModule(root, Tracer().trace(root))
    except Exception as error:  # tracing runs the model's own code, which can raise anything
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx: {error}") from error


class Walk(fx.Interpreter):
    """Runs a graph on an example and carries along a Lipschitz bound by the input for every value; 0: a constant."""

    def __init__(self, graph: fx.GraphModule, constants: Mapping[Any, Constant | float], grid: int) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.given, self.grid = constants, grid
        self.bounds: dict[fx.Node, float] = {}
        self.factors: list[Factor] = []
        self.fused: set[fx.Node] = set()
        self.result = 0.0

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        output = super().run_node(n)
        if n.op == "placeholder":
            self.bounds[n] = 1.0
        elif n.op == "output":
            self.finish(n)
        elif not any(self.bounds[node] for node in n.all_input_nodes) or is_shape(n, output):
            self.bounds[n] = 0.0
        else:
            module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
            self.bounds[n] = self.bound(n, Call(module, args, kwargs, output, self.grid))
        return output

    def finish(self, n: fx.Node) -> None:
        if not isinstance(n.args[0], fx.Node):
            raise ValueError(f"the model returns {n.args[0]}: a bound needs a single tensor.")
        self.result = self.bounds[n.args[0]]

    def bound(self, n: fx.Node, call: Call) -> float:
        """The bound of the value of ``n``; notes what the operation contributes."""
        operation = type(call.module).__name__ if call.module is not None else getattr(n.target, "__name__", n.target)
        before = max(self.bounds[node] for node in n.all_input_nodes)
        try:
            bound = self.bound_of(n, call, before)
            in_place = getattr(call.module, "inplace", False) or call.kwargs.get("inplace", False)
            if in_place and bound > before and len(n.all_input_nodes[0].users) > 1:
                raise UnknownConstantError("it changes in place a value that is used elsewhere too")
        except UnknownConstantError as reason:
            raise ValueError(
                f"{name_of(n)!r} ({operation}): {reason}. If you know its Lipschitz constant L, give "
                f"lipschitz_bound(…, constants={{{operation}: L}}), or a function of the call in place of L."
            ) from None
        self.factors.append(Factor(name_of(n), str(operation), bound / before, bound))
        return bound

    def bound_of(self, n: fx.Node, call: Call, before: float) -> float:
        key = n.target if call.module is None else type(call.module)
        if key in self.given or key not in COMBINATIONS:
            if sum(self.bounds[node] > 0 for node in n.all_input_nodes) > 1:
                raise UnknownConstantError("no constant is known for more than one input")
            return before * (1.0 if n in self.fused else self.constant(n, key, call))
        return COMBINATIONS[key](call, fx.node.map_arg(n.args, lambda node: self.bounds[node]))

    def constant(self, n: fx.Node, key: Any, call: Call) -> float:
        rule = self.given.get(key, rule_for(key))
        if rule is None:
            raise UnknownConstantError("no constant is known")
        if call.module is not None and call.module._forward_hooks:
            raise UnknownConstantError("it has forward hooks, which may change its output")
        following = self.batch_norm_after(n, call) if key not in self.given else None
        if following is not None:
            call = replace(call, module=fuse(call.module, self.fetch_attr(str(following.target))))
            self.fused.add(following)
        return rule(call) if callable(rule) else float(rule)

    def batch_norm_after(self, n: fx.Node, call: Call) -> fx.Node | None:
        """The batch normalization that alone reads what ``n`` gives, if it can be fused into it."""
        (user, *others) = n.users or [None]
        if others or user is None or user.op != "call_module" or type(call.module) not in FUSABLE:
            return None
        norm = self.fetch_attr(str(user.target))
        known = type(norm) not in self.given and isinstance(norm, _BatchNorm) and norm.running_var is not None
        flat = not isinstance(call.module, nn.Linear) or call.output.ndim == 2
        return user if known and flat and not call.module._forward_hooks else None


def is_shape(n: fx.Node, output: Any) -> bool:
    """Whether a node reads off a shape: the same for all inputs that the bound speaks of."""
    return n.op != "call_module" and n.target in ("size", "dim", getattr) and not isinstance(output, Tensor)


def rule_for(key: Any) -> float | Constant | None:
    """The constant of an operation; of a subclass that computes the same as its parent, the parent's."""
    if not isinstance(key, type):
        return CONSTANTS.get(key)
    for parent in key.__mro__:
        if parent in CONSTANTS:
            return CONSTANTS[parent] if getattr(parent, "forward", None) is getattr(key, "forward", None) else None
    return None


def fuse(layer: Any, norm: Any) -> nn.Module:
    """The two as one layer, in float64: rounding to float32 would spoil a certificate."""
    layer, norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    return fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)


def name_of(n: fx.Node) -> str:
    """The name of a module in the model, or of a node."""
    return str(n.target).removeprefix("0").removeprefix(".") or str(n.target) if n.op == "call_module" else n.name
