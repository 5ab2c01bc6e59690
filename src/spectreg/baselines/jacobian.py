"""The Jacobian penalties, of the whole network and layer by layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from spectreg.baselines.buffers import without_updates
from spectreg.measures._inputs import differentiable_input
from spectreg.measures._model import check_there
from spectreg.measures.jacobian import flat_output, jacobian_rows


def jacobian_penalty(
    model: nn.Module,
    x: Shaped[Tensor, "batch ..."],
    *,
    projections: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """The mean over examples of ``‖∂y/∂x‖_F²``, the Jacobian regularization of Section 3.3 of arXiv:1705.10941.

    Exactly, with one backward an output; or without bias by random directions of the output, one backward each
    (Hoffman et al., arXiv:1908.02729). Runs in the model's own mode, on copies of its buffers: running statistics do
    not move. In training mode batch normalization mixes the examples, and the rows are those of summed outputs.

    Args:
        x: A batch of inputs. Not modified.
        projections: Random directions to use in place of all outputs; 1 is customary.
        generator: Draws the directions; needed with ``projections``, lest every step penalize the same ones.

    Returns:
        The penalty, in (units of the output per unit of the input)², to be scaled and added to the loss.

    >>> model = nn.Linear(3, 2, bias=False)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> jacobian_penalty(model, torch.zeros(5, 3)).item()  # ‖W‖_F² = 6·2²
    24.0
    """
    check_there(model)
    x = differentiable_input(x)
    with torch.enable_grad():
        return mean_square(flat_output(without_updates(model, x), x), x, projections, generator)


def mean_square(y: Tensor, x: Tensor, projections: int | None, generator: torch.Generator | None) -> Tensor:
    """The mean over examples of ‖∂y/∂x‖_F², or of its estimate, with a graph."""
    if projections is not None and generator is None:
        raise ValueError(
            f"projections is {projections} but no generator is given: pass one that lives as long as the run."
        )
    rows = list(jacobian_rows(y, x, projections, generator, create_graph=True))
    total = torch.stack([row.square().sum() for row in rows]).sum()
    return total / len(x) if projections is None else total / (len(x) * projections)


def layerwise_jacobian_penalty(
    layers: nn.Sequential | Sequence[nn.Module],
    x: Shaped[Tensor, "batch ..."],
    *,
    projections: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """The mean over examples of ``Σ_ℓ ‖∂xˡ/∂xˡ⁻¹‖_F²`` (Gu & Rigazio, arXiv:1412.5068).

    Args:
        layers: The maps xˡ⁻¹ ↦ xˡ in order. Of an ``nn.Sequential`` each child with parameters begins one, and
            the children without (activations, pooling, flatten) belong to the one before.
        x: A batch of inputs. Not modified.
        projections: As for ``jacobian_penalty``.
        generator: As for ``jacobian_penalty``.

    >>> model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    >>> for p in model.parameters():
    ...     _ = nn.init.ones_(p)
    >>> layerwise_jacobian_penalty(model, torch.zeros(2, 3)).item()  # without activations: Σ ‖W‖_F² = 9 + 3
    12.0
    """
    for layer in [layers] if isinstance(layers, nn.Sequential) else layers:
        check_there(layer)
    h = differentiable_input(x)
    penalties = []
    with torch.enable_grad():
        for layer in weighted_layers(layers) if isinstance(layers, nn.Sequential) else layers:
            following = without_updates(layer, h)
            penalties.append(mean_square(flat_output(following, h), h, projections, generator))
            h = following
    if not penalties:
        raise ValueError("layers is empty: there is no Jacobian to penalize.")
    return torch.stack(penalties).sum()


def weighted_layers(model: nn.Sequential) -> list[nn.Sequential]:
    """The children of ``model`` in groups, each beginning with a child that has parameters."""
    groups: list[list[nn.Module]] = [[]]
    weighted = False
    for child in model:
        has_parameters = any(True for _ in child.parameters())
        if has_parameters and weighted:
            groups.append([])
        weighted = weighted or has_parameters
        groups[-1].append(child)
    return [nn.Sequential(*group) for group in groups if group]
