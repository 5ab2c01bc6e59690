"""Measure: the bound on a network's Lipschitz constant that its layers give (Section 3.1 of arXiv:1705.10941)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectreg.lipschitz.calls import Call, Constant, Operand, UnknownConstantError, bound_by, tensors_of
from spectreg.lipschitz.layers import fused
from spectreg.lipschitz.table import FUNCTIONS, rule_of
from spectreg.lipschitz.tracing import traced
from spectreg.maps.behaviour import hooks, undisturbed
from spectreg.measures._model import as_found, device_of

FUSABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHAPES = ("size", "dim", "numel", "nelement", "ndimension", "stride", "is_floating_point", getattr, torch.numel)
FILLED = (
    "new_zeros", "new_ones", "new_full", "new_tensor", torch.zeros_like, torch.ones_like, torch.full_like
)  # fmt: skip


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

    Of the function of one example, as a batch of one. Traced by ``torch.fx``; each operation contributes a constant.
    Batch normalization is fused into the convolution or linear layer before it; concatenation takes the root of the
    sum of squares, addition the sum. Modules with hooks or a forward of their own are traced into. In exact
    arithmetic: the rounding of the network itself is left out of account. The model is left as found.

    Args:
        input_shape: Of one example.
        constants: For operations not known here: module type, function or method name → its constant, or a function
            of a ``Call`` that gives it. A module type given here is not traced into.
        grid: Frequencies a dimension for a convolution's norm, see ``norm_bound``.

    Raises:
        ValueError: A shape that the model does not take, a graph that cannot be traced (the line is named), an
            operation without a known constant (named), or an output that depends on other examples of the batch.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    ...     _ = model[2].weight.copy_(torch.tensor([[0.0, 2.0]]))
    >>> round(lipschitz_bound(model, (2,)).value, 6)
    6.0
    """
    given = constants or {}
    if isinstance(input_shape, int):
        raise TypeError(f"input_shape is {input_shape}: it is the shape of one example, such as ({input_shape},).")
    with as_found(model), undisturbed(model), torch.inference_mode(False), torch.no_grad():
        require_running_statistics(model, given)
        walk = Walk(traced(model, given), given, grid)
        numbers = [t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        dtype = numbers[0] if numbers else torch.get_default_dtype()
        x = torch.randn(2, *input_shape, dtype=dtype, device=device_of(model))  # as_found puts the generator back
        one, two = (output_of(model, x[:n].clone(), input_shape) for n in (1, 2))
        graph = walk.value(x[:1].clone())
        if not close(graph, one, min(1e-3, torch.finfo(x.dtype).eps ** 0.75)):
            raise ValueError("the graph that torch.fx traced computes something else: look for in-place changes.")
        in_rows = one.shape[:1] == (1,) and two.shape == (2, *one.shape[1:])
        if in_rows and not close(two[:1], one, torch.finfo(x.dtype).eps ** 0.5):
            raise ValueError(
                "the output of an example depends on the others in its batch: look for means, sums or norms over the "
                "first dimension."
            )
    return LipschitzBound(walk.result, tuple(walk.factors))


def require_running_statistics(model: nn.Module, given: Mapping[Any, Any]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_var is None and type(module) not in given:
            raise ValueError(
                f"{name!r} ({type(module).__name__}): it keeps no running statistics, so an example's output depends "
                "on its batch. Build it with track_running_stats=True, or give its constant in constants."
            )


def output_of(model: nn.Module, x: Tensor, input_shape: tuple[int, ...]) -> Any:
    try:
        return model(x)
    except Exception as error:  # the model's own code, which can raise anything
        raise ValueError(
            f"{type(model).__name__} fails on input_shape={input_shape}, which is the shape of one example without the "
            f"batch: {error}"
        ) from error


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the two agree to a share of the largest entry."""
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().amax().item())


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

    def value(self, x: Tensor) -> Tensor:
        """The output for ``x``; afterwards ``factors`` and ``result`` are there."""
        try:
            return self.run(x)
        except ValueError:
            raise
        except Exception as error:  # an operation that eager mode ran in another way
            raise ValueError(f"the graph that torch.fx traced fails where the model does not: {error}") from error

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        before = {node: versions(self.env[node]) for node in n.all_input_nodes}
        output = super().run_node(n)
        changed = [node for node, version in before.items() if versions(self.env[node]) != version]
        if n.op == "placeholder":
            self.bounds[n] = 1.0
        elif n.op == "output":
            self.finish(n)
        elif self.is_constant(n, output):
            self.bounds[n] = 0.0
        else:
            module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
            self.bounds[n] = self.bound(n, Call(module, args, kwargs, output, self.grid, runner(n, module)), changed)
        return output

    def is_constant(self, n: fx.Node, output: Any) -> bool:
        """Whether the value does not depend on the input, or only on its shape: the same for all that are compared."""
        depend = [node for node in n.all_input_nodes if self.bounds[node]]
        if not depend or (isinstance(output, Tensor) and output.numel() == 0):
            return True
        if n.op == "call_module":
            return False
        read: list[fx.Node] = []
        fx.node.map_arg((n.args, n.kwargs), read.append)
        filled = n.target in FILLED and depend == [*n.args[:1]] and read.count(depend[0]) == 1
        return filled or (n.target in SHAPES and not list(tensors_of(output)))

    def finish(self, n: fx.Node) -> None:
        if not isinstance(n.args[0], fx.Node) or not isinstance(self.env[n.args[0]], Tensor):
            raise ValueError(f"the model returns {n.args[0]}: a bound needs a single tensor.")
        self.result = self.bounds[n.args[0]]

    def bound(self, n: fx.Node, call: Call, changed: list[fx.Node]) -> float:
        """The bound of the value of ``n``, which changed some values in place; notes what the operation contributes."""
        operation = type(call.module).__name__ if call.module is not None else getattr(n.target, "__name__", n.target)
        before = max(self.bounds[node] for node in n.all_input_nodes)
        try:
            bound = self.bound_of(n, call, before)
            if isinstance(call.output, Tensor) and not call.output.is_floating_point():
                raise UnknownConstantError(f"its result is of {call.output.dtype}: it jumps, or is not real")
            if not bound < float("inf"):
                raise UnknownConstantError(f"its constant is {bound}")
            if any(bound > self.bounds[node] and self.read_later(node, n) for node in changed):
                raise UnknownConstantError("it changes in place a value that is used elsewhere too")
        except UnknownConstantError as reason:
            raise ValueError(
                f"{name_of(n)!r} ({operation}): {reason}. If you know its Lipschitz constant L, give "
                f"lipschitz_bound(…, constants={{{operation}: L}}), or a function of the call in place of L."
            ) from None
        self.factors.append(Factor(name_of(n), str(operation), bound / before, bound))
        return bound

    def bound_of(self, n: fx.Node, call: Call, before: float) -> float:
        if n in self.fused:
            return before
        key = n.target if call.module is None else type(call.module)
        if key in self.given:
            return self.given_bound(n, call, self.given[key], before)
        kind, rule = (None, FUNCTIONS.get(key)) if call.module is None else rule_of(call.module)
        if rule is None:
            raise UnknownConstantError("no constant is known")
        following = self.batch_norm_after(n, call) if kind in FUSABLE else None
        if following is not None:
            self.fused.add(following)
            return fused(call, Operand(call.input, before), self.fetch_attr(str(following.target)))
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self.operand)
        return bound_by(rule, call, tuple(args), kwargs)

    def given_bound(self, n: fx.Node, call: Call, constant: Any, before: float) -> float:
        if sum(self.bounds[node] > 0 for node in n.all_input_nodes) > 1:
            raise UnknownConstantError("no constant is known for more than one input")
        if call.module is not None and hooks(call.module):
            raise UnknownConstantError("it has hooks, which may change its input or output")
        L = constant(call) if callable(constant) else float(constant)
        if L < 0:
            raise ValueError(f"constants: the Lipschitz constant of {name_of(n)!r} is {L}, and must not be negative.")
        return before * L

    def operand(self, node: fx.Node) -> Any:
        """The value of a node; with its bound, if it depends on the input."""
        value = self.env[node]
        return Operand(value, self.bounds[node]) if self.bounds[node] else value

    def batch_norm_after(self, n: fx.Node, call: Call) -> fx.Node | None:
        """The batch normalization that alone reads what ``n`` gives, if it can be fused into it."""
        (user, *others) = n.users or [None]
        if others or user is None or user.op != "call_module":
            return None
        norm = self.fetch_attr(str(user.target))
        known = type(norm) not in self.given and isinstance(norm, _BatchNorm) and norm.running_var is not None
        by_channel = call.output.ndim == call.module.weight.ndim  # the second dimension: examples come first
        return user if known and by_channel else None

    def read_later(self, changed: fx.Node, n: fx.Node) -> bool:
        """Whether a value that ``n`` changed in place, or one that shares its memory, is read after ``n``."""
        if changed.op == "get_attr":
            return True
        memory = {t.untyped_storage().data_ptr() for t in tensors_of(self.env[changed])}
        alive = self.env.keys() - self.user_to_last_uses.get(n, [])
        return any(t.untyped_storage().data_ptr() in memory for node in alive for t in tensors_of(self.env[node]))


def versions(value: Any) -> list[int]:
    """How often each tensor of a value was changed in place."""
    return [t._version for t in tensors_of(value)]


def runner(n: fx.Node, module: nn.Module | None) -> Any:
    """What runs the operation of ``n`` on arguments: the module, a method of the first argument, a function."""
    if n.op == "call_method":
        return lambda self, *args, **kwargs: getattr(self, str(n.target))(*args, **kwargs)
    return n.target if module is None else module


def name_of(n: fx.Node) -> str:
    """The name of a module in the model, or of a node."""
    return str(n.target).removeprefix("0").removeprefix(".") or str(n.target) if n.op == "call_module" else n.name
