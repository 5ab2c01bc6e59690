"""Which parameters count as weights, and the linear map of each."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectreg.linear_maps import MatrixMap

Select = Callable[[str, Tensor], bool]


@dataclass(frozen=True)
class Weight:
    """One weight of a model: its name, where it lives, and the linear map it is.

    ``tensor`` is looked up in the module each time, so that a weight replaced by ``.to()`` or ``fully_shard`` is
    followed.
    """

    name: str
    module: nn.Module
    attribute: str
    map: MatrixMap

    @property
    def tensor(self) -> Tensor:
        """The weight as it is now; it lives in the module and is not copied."""
        return getattr(self.module, self.attribute)


def named_weights(model: nn.Module, select: Select | None = None) -> list[Weight]:
    """The weights of ``model`` that have a spectral norm, in the order of ``model.named_modules()``.

    A weight tied between modules appears once, under its first name. Names carry no ``_orig_mod.`` of
    ``torch.compile``.

    >>> [(w.name, w.map.blocks, w.map.outputs, w.map.inputs) for w in named_weights(nn.Conv2d(4, 6, 3, groups=2))]
    [('weight', 2, 3, 18)]
    """
    weights: list[Weight] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{attribute}".lstrip(".").replace("_orig_mod.", "")
            if not isinstance(module, nn.Linear | _ConvNd) or attribute != "weight":
                continue
            if select is not None and not select(name, parameter):
                continue
            weights.append(Weight(name, module, attribute, matrix_map(module, parameter)))
    return weights


def matrix_map(module: nn.Module, weight: Tensor) -> MatrixMap:
    """The map of ``weight``, which belongs to ``module``."""
    return MatrixMap(tuple(weight.shape), blocks=getattr(module, "groups", 1))
