"""The tie between a regularizer or a cap and the optimizers with whose steps it acts."""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from spectreg.maps.factors import tensors_of
from spectreg.weights.selection import Weight

BeforeStep = Callable[[int, Mapping[int, Any], Tensor | float, Tensor | float, Any], Any]


class Attachment:
    """Hooks on the optimizers that move the weights; ``optimizers_of`` says which of them hold each weight.

    Args:
        optimizers: May be wrapped; `acting` finds the one that moves the weights.
        weights: Those to follow.
        refuse: Raises for an optimizer with which one cannot act.
        hook: Registers what happens at each step of an optimizer, of which it gets the number too.
        acted_on: Those of the weights that the optimizers have to hold; all of them by default.
        wrappers: Which optimizers around those that move the weights are hooked, too; none by default.

    Raises:
        ValueError: A weight that is acted on and trained is held by none of them.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        weights: Sequence[Weight],
        refuse: Callable[[Optimizer], None],
        hook: Callable[[Optimizer, int], Any],
        acted_on: Sequence[Weight] | None = None,
        wrappers: Callable[[Optimizer, Optimizer], bool] = lambda outer, inner: False,
    ) -> None:
        inner = list({id(x): x for x in map(acting, optimizers)}.values())
        nested = [layers(x) for x in optimizers]
        outer = [(x, inner.index(each[-1])) for each in nested for x, y in pairwise(each) if wrappers(x, y)]
        for optimizer in inner:
            refuse(optimizer)
        held = [_parameters(optimizer) for optimizer in inner]
        self.optimizers_of = _optimizers_of(weights, held, weights if acted_on is None else acted_on)
        self._handles = [hook(x, number) for number, x in enumerate(inner)] + [hook(*each) for each in outer]
        self._seen: dict[str, tuple[int, list[float]]] = {}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def check_acting(self, numbers: Mapping[str, Sequence[float]], calls: Mapping[str, int]) -> None:
        """Warn of weights that have moved without a step that runs the hooks since this was last asked.

        Args:
            numbers: Of each weight σ as of the last step, and residual and stable rank as the weight is now: where no
                step was taken σ is the same, and the others change with the weight.
            calls: How often a step was asked for of each weight.
        """
        moved = []
        for name, now in numbers.items():
            count, before = self._seen.setdefault(name, (calls[name], list(now)))
            if count != calls[name] or before[0] != now[0]:
                self._seen[name] = calls[name], list(now)
            elif abs(now[1] - before[1]) > 1e-5 * now[0] or abs(now[2] - before[2]) > 1e-5 * now[2]:
                moved.append(name)
        if moved:
            self._seen |= {name: (calls[name], list(numbers[name])) for name in moved}
            warnings.warn(
                f"weight {moved[0]!r} has moved since the last log, but the attached optimizer has taken no step() in "
                "which its hooks run: another optimizer or a method of its own moves it. Attach the optimizer whose "
                "step() moves it, or detach() and add penalty() to the loss.",
                stacklevel=3,
            )


def before_steps(
    optimizers: Sequence[Any],
    weights: Sequence[Weight],
    act: BeforeStep,
    decoupled: bool | str = False,
    acted_on: Sequence[Weight] | None = None,
) -> Attachment:
    """Act before each step.

    Args:
        act: Called with the number of the optimizer, the learning rate of each of its parameters by id, the factor by
            which its gradients are scaled, 0 where the step is to be skipped, and what it returned if the loss was
            evaluated before within this step, else None.
        decoupled: Whether the weights are moved; with their learning rates if True.
    """
    return Attachment(
        optimizers,
        weights,
        lambda optimizer: _refuse_unfit(optimizer, decoupled),
        lambda optimizer, number: optimizer.register_step_pre_hook(_hook(number, act)),
        acted_on,
    )


def after_steps(
    optimizers: Sequence[Any], weights: Sequence[Weight], act: Callable[[int, set[int]], None]
) -> Attachment:
    """Act after each step, with the number of the optimizer and what it holds (by id).

    Also after that of a wrapper which may move the weights once more.
    """
    return Attachment(
        optimizers,
        weights,
        _refuse_averages,
        lambda optimizer, number: optimizer.register_step_post_hook(_after(number, act)),
        wrappers=_may_move_weights,
    )


def _may_move_weights(wrapper: Optimizer, inside: Optimizer) -> bool:
    """Whether ``wrapper`` keeps tensors of its own, as Lookahead its slow weights, and not only a state inside."""
    shared = {"param_groups", *(name for name, x in vars(wrapper).items() if getattr(inside, name, None) is x)}
    own = {name: x for name, x in vars(wrapper).items() if name not in shared}
    moves = getattr(wrapper, "state", inside.state) is not inside.state or _holds_tensors(own, _parameters(inside))
    if moves and not _runs_hooks(wrapper):
        raise ValueError(
            f"{type(wrapper).__name__} keeps weights of its own and runs no hooks in its step(), after which the "
            "weights may be above the cap: call apply() after each step()."
        )
    return moves


def _holds_tensors(x: Any, but: set[int]) -> bool:
    """Whether there are tensors in ``x`` other than single numbers and the parameters themselves."""
    if isinstance(x, Mapping | list | tuple):
        return any(_holds_tensors(y, but) for y in (x.values() if isinstance(x, Mapping) else x))
    return isinstance(x, Tensor) and x.ndim > 0 and id(x) not in but


def _refuse_averages(optimizer: Optimizer) -> None:
    if _keeps_averages(optimizer):
        raise ValueError(
            f"the weights under {type(optimizer).__name__} are between two averages that it keeps, which would "
            "not be capped: call apply() on the averaged model after training."
        )


def _after(number: int, after_step: Callable[[int, set[int]], None]) -> Callable[..., None]:
    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (_is_within_a_step(optimizer) or _fills_state()):
            after_step(number, _parameters(optimizer))

    return hook


def _keeps_averages(optimizer: Optimizer) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def acting(optimizer: Any) -> Optimizer:
    """``optimizer``, or the one inside of it that moves the same parameters: the one whose step is sure to be called.

    SAM in two calls, Lookahead, Opacus, Fabric and Accelerate step an optimizer inside.

    Raises: as `layers` does.
    """
    return layers(optimizer)[-1]


def layers(optimizer: Any) -> list[Optimizer]:
    """``optimizer`` and those inside of one another that move the same parameters, the outermost first.

    Raises:
        TypeError: It is no optimizer.
        ValueError: Its step runs no hooks, or several optimizers inside hold its parameters.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach() takes optimizers of torch.optim, not {type(optimizer).__name__}. What has a step() of its own "
            "gets the penalty from add_gradient() before it."
        )
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(
            f"attach() cannot act through this {type(optimizer).__name__}, which has no param_groups. Attach the "
            "optimizers that move the weights, or call add_gradient() before each step()."
        )
    inside = {
        name: x
        for name, x in vars(optimizer).items()
        if isinstance(x, Optimizer)
        and x is not optimizer
        and hasattr(x, "param_groups")
        and _parameters(x) == _parameters(optimizer)
    }
    different = list({id(x): x for x in inside.values()}.values())
    if len(different) == 1:
        return [optimizer, *layers(different[0])]
    if different or not _runs_hooks(optimizer):
        holds = f"holds several optimizers ({', '.join(inside)})" if different else "runs no hooks in its step()"
        raise ValueError(
            f"attach() cannot act through this {type(optimizer).__name__}, which {holds}. Attach the optimizers that "
            "move the weights, or call add_gradient() before each step()."
        )
    return [optimizer]


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Whether step hooks are kept and run: not where ``Optimizer.__init__`` was not called, or ``step`` was replaced.

    Nor where there is no ``step`` but torch's own, which raises: such an optimizer moves weights by other calls.

    torch marks a step that it has wrapped, and `functools.wraps` hands the mark on, as learning rate schedulers do.
    """
    is_own = getattr(inspect.unwrap(optimizer.step), "__code__", None) is not Optimizer.step.__code__
    return is_own and hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(optimizer.step, "hooked", False)


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _hook(number: int, before_step: BeforeStep) -> Callable[..., Any]:
    def act(optimizer: Optimizer, before: Any = None) -> Any:
        rates = {id(p): group.get("lr") for group in optimizer.param_groups for p in group["params"]}
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        keep = 1.0 if overflow is None else (overflow == 0).float()
        return before_step(number, rates, 1.0 if scale is None else scale, keep, before)

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_within_a_step(optimizer) or _fills_state():
            return None
        if kwargs.get("grad_scaler") is not None:
            raise RuntimeError(
                f"the GradScaler hands itself to {type(optimizer).__name__}, which unscales the gradients or skips the "
                "step within its step(), where it cannot be seen: detach(), and add penalty() to the loss."
            )
        given: dict[int | str, Any] = dict(enumerate(args)) | kwargs
        place = _closure_place(optimizer, given) if len(given) > 1 else None
        if place is None:
            act(optimizer)
            return None
        closure, before = given[place], None

        def closure_and_act(*passed: Any, **named: Any) -> Any:
            nonlocal before
            loss = closure(*passed, **named)
            with torch.no_grad():
                before = act(optimizer, before)
            return loss

        given[place] = closure_and_act
        return tuple(given[i] for i in range(len(args))), {name: given[name] for name in kwargs}

    return hook


def _closure_place(optimizer: Optimizer, given: Mapping[int | str, Any]) -> int | str | None:
    """Which argument of this step, by place (0 is the optimizer) or name, is the closure.

    It is the one of that name; where the step has none of that name, a function.

    Raises:
        ValueError: There are several functions, none of them named closure.
    """
    names = list(inspect.signature(type(optimizer).step).parameters)
    named: int | str = names.index("closure") if "closure" in names else "closure"
    for place in ("closure", named):
        if place in given:
            return place if given[place] is not None else None
    if "closure" in names:
        return None
    others = (Tensor, torch.nn.Module, type)
    functions = [place for place, x in given.items() if place != 0 and callable(x) and not isinstance(x, others)]
    if len(functions) > 1:
        raise ValueError(
            f"step() of {type(optimizer).__name__} got several functions, and which of them evaluates the loss is not "
            "known: detach(), and call add_gradient() after the backward pass."
        )
    return functions[0] if functions else None


def _is_within_a_step(optimizer: Optimizer) -> bool:
    """Whether this is the step of a base class, called by that of its subclass: torch runs the hooks of both."""
    if sum("step" in vars(kind) for kind in type(optimizer).__mro__) < 3:
        return False  # its own, and that of torch.optim.Optimizer
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"the step of {type(optimizer).__name__} may call that of its base class, and compiled it cannot be told "
            "which of the two runs the hooks: leave optimizer.step() out of what is compiled."
        )
    hooked, steps, frame = getattr(type(optimizer).step, "__code__", None), 0, sys._getframe()
    while frame.f_back is not None and steps < 2:
        frame = frame.f_back
        steps += frame.f_code is hooked and frame.f_locals.get("self") is optimizer
    return steps == 2


def _fills_state() -> bool:
    """Whether this step, without gradients and learning rates, only makes an optimizer's state for a checkpoint.

    ``get_state_dict`` and ``set_state_dict`` of torch.distributed.checkpoint take one where the state is empty, as it
    always is of plain SGD.
    """
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    fills = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    frame = sys._getframe() if fills is not None else None
    while frame is not None and frame.f_code is not fills:
        frame = frame.f_back
    return frame is not None


def _refuse_unfit(optimizer: Optimizer, decoupled: bool | str) -> None:
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS evaluates loss and gradient several times a step and compares the losses, so the penalty has to be "
            "part of the loss: add penalty() to it inside the closure."
        )
    if any(group.get("maximize", False) for group in optimizer.param_groups):
        raise ValueError(
            "this optimizer maximizes, so that a gradient added before its step would raise σ: subtract penalty() from "
            "what it maximizes."
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps inside the backward pass, before a gradient could be "
            "added: leave overlap_with_ddp out, or add penalty() to the loss."
        )
    if decoupled:
        _refuse_decoupled(optimizer, decoupled)


def _refuse_decoupled(optimizer: Optimizer, decoupled: bool | str) -> None:
    if decoupled is True and any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"decoupled=True acts with the learning rate, and {type(optimizer).__name__} has parameter groups without "
            "'lr', or with None: use decoupled='independent', or leave it out."
        )
    if _keeps_averages(optimizer):
        raise ValueError(
            f"decoupled={decoupled} moves the weights, and those under {type(optimizer).__name__} are between two "
            "averages that it keeps: leave decoupled out, and the penalty goes through its gradients."
        )


def _optimizers_of(
    weights: Sequence[Weight], held: Sequence[set[int]], acted_on: Sequence[Weight]
) -> dict[str, frozenset[int]]:
    """Which optimizers hold each weight, of a product its trained factors; each that is ``acted_on`` has to be held."""
    optimizers_of: dict[str, frozenset[int]] = {}
    left, required = [], {w.name for w in acted_on}
    for w in weights:
        where = [(T.requires_grad, frozenset(i for i, ids in enumerate(held) if id(T) in ids))
                 for T in tensors_of(w.tensor)]  # fmt: skip
        trained = {numbers for is_trained, numbers in where if is_trained} or {numbers for _, numbers in where}
        common = frozenset.intersection(*trained)
        if not common and all(trained) and w.name in required:
            raise ValueError(
                f"the factors of {w.name!r} are held by several optimizers, of which none steps both: give them to one."
            )
        if common:
            optimizers_of[w.name] = common
        elif w.tensor.requires_grad and w.name in required:
            left.append(w.name)
    if left:
        raise ValueError(
            f"the optimizer does not hold {', '.join(left[:8])}{' …' if len(left) > 8 else ''}. Attach the optimizer "
            "of this model (all of them if there are several), or leave these weights out with select."
        )
    return optimizers_of
