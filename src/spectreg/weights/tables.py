"""Whether a module looks its parameter up, a row a place, or multiplies by it: found by running the module."""

from typing import Any

import torch
from torch import Tensor, nn

from spectreg.maps.behaviour import is_sharded, undisturbed
from spectreg.weights.roles import FEATURES


def is_looked_up(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    """Whether ``module`` gives for one index, or adds to one place, a single row of the parameter ``attribute``.

    Known for modules that run on an index, or on an input of the width of a row, and hold all their parameters
    themselves; without their hooks, and not of sharded weights or those without values. The module is left as found.

    >>> class Table(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(5, 3))
    ...
    ...     def forward(self, ids):
    ...         return self.weight[ids]
    >>> is_looked_up(Table(), "weight", Table().weight)
    True
    """
    if weight.is_meta or is_sharded(weight) or attribute not in module._parameters or _is_linear(module):
        return False
    if len(list(module.parameters())) > len(module._parameters):
        return False
    width = weight.shape[-1]
    place = torch.zeros(1, dtype=torch.long, device=weight.device)
    content = torch.linspace(1, 2, width, dtype=weight.dtype, device=weight.device).expand(1, 1, -1)
    with torch.inference_mode(False), torch.enable_grad():
        for one, other in ((place, place + 1), (place[None], place[None] + 1), (content, 2 - content)):
            first, second = (_slope(module, attribute, weight, x) for x in (one, other))
            if first is None or second is None:
                continue
            rows = [slope.flatten(0, -2) for slope in (first, second)]
            is_one_row = all(int(slope.any(1).sum()) == 1 for slope in rows)
            # what is added has the same slope whatever it is added to; a factor has not
            return is_one_row and (not one.is_floating_point() or torch.equal(rows[0].sum(0), rows[1].sum(0)))
    return False


def _is_linear(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in FEATURES)


def _slope(module: nn.Module, attribute: str, weight: Tensor, x: Tensor) -> Tensor | None:
    """The gradient by the parameter of what the module gives for ``x``; None where it gives no such thing."""
    try:
        with undisturbed(module):
            leaf = nn.Parameter(weight.detach())
            module._parameters[attribute] = leaf
            y: Any = module.forward(x)
            if not isinstance(y, Tensor) or not y.requires_grad:
                return None
            (slope,) = torch.autograd.grad(y.sum(), leaf, allow_unused=True)
            return slope
    except Exception:  # the module's own code, which can raise anything on an input that it is not made for
        return None
