"""Whether a module looks its parameter up, a row a place, or multiplies by it: found by running the module."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectreg.maps.behaviour import is_sharded, undisturbed

FEATURES = ("in_features", "out_features", "in_channels", "out_channels")


def says_its_features(module: nn.Module) -> bool:
    """Whether ``module`` has the attributes of a layer that multiplies."""
    return any(hasattr(module, name) for name in FEATURES)


def use_of(module: nn.Module, attribute: str, weight: Tensor) -> Literal["looked up", "multiplied"] | None:
    """What ``module`` does with the parameter ``attribute``, or None where that is not known.

    It is looked up where the module gives for one index, or adds to one place, a single row of it; and multiplied where
    the module makes of a row's width as many numbers as there are rows, through a slope that depends on the input.

    Known of modules that run on an index, or on an input of the width of a row, and hold all their parameters
    themselves; without their hooks, and not of sharded weights or those without values. The module is left as found.

    >>> class Table(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(5, 3))
    ...
    ...     def forward(self, ids):
    ...         return self.weight[ids]
    >>> use_of(Table(), "weight", Table().weight)
    'looked up'
    """
    if weight.is_meta or is_sharded(weight) or attribute not in module._parameters:
        return None
    if len(list(module.parameters())) > len(module._parameters):
        return None
    try:
        return _use_of(module, attribute, weight)
    except Exception:  # of weights that give no numbers: fake ones, and those of eight bits
        return None


def _use_of(module: nn.Module, attribute: str, weight: Tensor) -> Literal["looked up", "multiplied"] | None:
    width = weight.shape[-1]
    place = torch.zeros(1, dtype=torch.long, device=weight.device)
    content = torch.linspace(1, 2, width, dtype=weight.dtype, device=weight.device).expand(1, 1, -1)
    with torch.inference_mode(False), torch.enable_grad():
        for one, other in ((place, place + 1), (place[None], place[None] + 1), (content, 2 - content)):
            found = [_slope(module, attribute, weight, x) for x in (one, other)]
            if found[0] is None or found[1] is None:
                continue
            (count, first), (_, second) = found[0], found[1]
            rows = [slope.flatten(0, -2) for slope in (first, second)]
            is_one_row = all(int(slope.any(1).sum()) == 1 for slope in rows)
            # what is added has the same slope whatever it is added to; a factor has not
            if is_one_row and (not one.is_floating_point() or torch.equal(rows[0].sum(0), rows[1].sum(0))):
                return "looked up"
            makes_rows = one.is_floating_point() and count == len(rows[0]) and not torch.equal(first, second)
            return "multiplied" if makes_rows else None
    return None


def _slope(module: nn.Module, attribute: str, weight: Tensor, x: Tensor) -> tuple[int, Tensor] | None:
    """How many numbers the module gives for ``x``, and their sum's gradient by the parameter; None if it gives none."""
    try:
        with undisturbed(module):
            leaf = nn.Parameter(weight.detach())
            module._parameters[attribute] = leaf
            y: Any = module.forward(x)
            if not isinstance(y, Tensor) or not y.requires_grad:
                return None
            (slope,) = torch.autograd.grad(y.sum(), leaf, allow_unused=True)
            return None if slope is None else (y.numel(), slope)
    except Exception:  # the module's own code, which can raise anything on an input that it is not made for
        return None
