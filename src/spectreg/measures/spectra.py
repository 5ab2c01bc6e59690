"""Measure: the singular values of every weight (Figure 4 of arXiv:1705.10941)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.checkpoints.acting import acting_weights
from spectreg.checkpoints.files import Stored
from spectreg.linalg.directions import gaussian_like, length, own_generator
from spectreg.linalg.lanczos import Eigenvalues, Goal, lanczos
from spectreg.measures._model import without_autocast
from spectreg.weights.kinds import map_of_a_tensor
from spectreg.weights.patterns import Patterns
from spectreg.weights.selection import Select, named_weights

Source = nn.Module | Mapping[str, Tensor] | str | Path
Wanted = str | int | Mapping[str, str | int]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one weight, in its units.

    ``shape`` counts blocks, outputs, inputs. ``values``: one row a block (group, head), descending, float64, on the
    CPU. ``complete`` is False where only the largest were asked for; then ``residual`` bounds the distance of each to
    a singular value, ``products`` counts those with WWᵀ, ``converged``: every residual met the tolerance.
    """

    name: str
    shape: tuple[int, int, int]
    values: Float[Tensor, "blocks count"] = field(repr=False)
    frobenius: float
    complete: bool = True
    residual: float = 0.0
    products: int = 0
    converged: bool = True

    @property
    def sigma(self) -> float:
        """σ₁, of the largest block."""
        return self.values[:, 0].max().item()

    @property
    def stable_rank(self) -> float:
        """‖W‖_F²/σ₁², between 1 and the rank; NaN for a zero weight."""
        return (self.frobenius / self.sigma) ** 2 if self.sigma else math.nan

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the σᵢ/Σσ (Roy & Vetterli 2007); NaN where not all values are known or all are 0."""
        total = self.values.sum()
        if not self.complete or not total:
            return math.nan
        return torch.special.entr(self.values / total).sum().exp().item()


def singular_values(
    source: Source,
    *,
    top: int | None = None,
    select: Select | None = None,
    map: Wanted = "matrix",
    base: Mapping[str, Tensor] | str | Path | None = None,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> dict[str, Spectrum]:
    """The singular values of every weight of a model, a state dict, or a checkpoint file.

    A model's weights are those the regularizer acts on, cut into the blocks of ``named_weights``; of a state dict or a
    file, every floating point tensor of two or more dimensions, its first dimension against all others, or each matrix
    of a stack of experts by itself. Weights in FP8 or int8 are taken times their scales, adapters (LoRA) as products.

    σ₁ is exact to rounding. Weights up to float32 go through WWᵀ in float64: the others are good to 1e-7·σ₁. float64
    weights take a full SVD. One weight is in memory at a time; nothing in the source changes.

    Args:
        source: For files see ``spectreg.checkpoints.files.Stored``.
        top: Only so many of the largest values, for matrices too large for an SVD: by Lanczos where fewer than an
            eighth of all. A value that occurs more than once may then be found once.
        select: ``(name, tensor) -> bool``: which weights to measure.
        map: What each weight is taken for, as in ``named_weights``; of a state dict or a file ``"matrix"``,
            ``"each"`` (a stack of matrices, such as experts) or a number of parts, for all or by name patterns.
        base: Of an adapter: the state dict or file that it adapts. Its layers are then measured as W + (α/r)BA, and
            without it as (α/r)BA, called ``layer.lora``; several of one layer have their names at the end.
        tolerance: With ``top``: residual of each eigenvalue σ² of WWᵀ relative to it.
        generator: With ``top``: draws the first vectors; by default a private one with seed 0.

    Raises:
        ValueError: No weight found, a non-finite one (named), ``top`` below 1, a file that is no checkpoint.

    >>> spectra = singular_values({"bias": torch.zeros(3), "weight": torch.diag(torch.tensor([3.0, 4.0, 0.0]))})
    >>> spectra["weight"]
    Spectrum(name='weight', shape=(1, 3, 3), frobenius=5.0, complete=True, residual=0.0, products=0, converged=True)
    >>> spectra["weight"].values
    tensor([[4., 3., 0.]], dtype=torch.float64)
    """
    if isinstance(source, str | Path):
        source = Stored(source)
    spectra = each_spectrum(
        source, top=top, select=select, map=map, base=base, tolerance=tolerance, generator=generator
    )
    with without_autocast():
        return {spectrum.name: spectrum for spectrum in spectra}


def each_spectrum(
    source: Source,
    *,
    top: int | None = None,
    select: Select | None = None,
    map: Wanted = "matrix",
    base: Mapping[str, Tensor] | str | Path | None = None,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    skipped: dict[str, str] | None = None,
) -> Iterator[Spectrum]:
    """The spectra of ``singular_values``, each as soon as it is known.

    Args:
        skipped: Gets every tensor of a state dict or file that is left out, with the reason.
    """
    if top is not None and top < 1:
        raise ValueError(f"top is {top}: ask for at least one singular value, or leave it out for all.")
    generator = own_generator(generator)
    skipped = {} if skipped is None else skipped
    if isinstance(source, nn.Module):
        if base is not None:
            raise ValueError("base is for the state dict or file of an adapter: a model has its base in itself.")
        weights = matrices_of_a_model(source, select, map)
    else:
        weights = matrices_of_tensors(opened(source), select, map, base if base is None else opened(base), skipped)
    empty = True
    for name, blocks in weights:
        empty = False
        yield spectrum_of(name, blocks, top, tolerance, generator)
        del blocks
    if empty:
        what = repr(str(source.files[0])) if isinstance(source, Stored) else type(source).__name__
        why = "".join(f"; {name!r}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"{what} has no weight to measure: no selected tensor with two dimensions{why}.")


def opened(source: Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    return source if isinstance(source, Mapping) else Stored(source)


@torch.no_grad()
def matrices_of_a_model(
    model: nn.Module, select: Select | None, map: Wanted
) -> Iterator[tuple[str, Float[Tensor, "blocks outputs inputs"]]]:
    for weight in named_weights(model, select, map):
        tensor = weight.tensor.detach()
        if tensor.is_meta:
            raise ValueError(
                f"weight {weight.name!r} is on the meta device and has no values: offloaded, or never loaded. Load the "
                "whole model, or give its checkpoint file."
            )
        yield weight.name, weight.map.matrices(tensor)


@torch.no_grad()
def matrices_of_tensors(
    tensors: Mapping[str, Tensor],
    select: Select | None,
    map: Wanted,
    base: Mapping[str, Tensor] | None,
    skipped: dict[str, str],
) -> Iterator[tuple[str, Float[Tensor, "blocks outputs inputs"]]]:
    wanted, names = Patterns("map", map), []
    for name, tensor in acting_weights(tensors, skipped, base):
        if select is not None and not select(name, tensor):
            skipped[name] = "not selected"
        else:
            names.append(name)
            yield name, map_of_a_tensor(name, tuple(tensor.shape), wanted).matrices(tensor.detach())
        del tensor
    wanted.check_all_used(names)


@torch.no_grad()
def spectrum_of(
    name: str,
    blocks: Float[Tensor, "blocks outputs inputs"],
    top: int | None,
    tolerance: float,
    generator: torch.Generator,
) -> Spectrum:
    frobenius = frobenius_norm(blocks)
    if not math.isfinite(frobenius) and (wrong := int((~blocks.isfinite()).sum())):
        raise ValueError(f"weight {name!r} has {wrong} entries that are NaN or infinite.")
    shape = (blocks.shape[0], blocks.shape[1], blocks.shape[2])
    count = min(shape[1:])
    if top is None or 8 * top >= count:
        values = torch.stack([all_values(W) for W in blocks])[:, :top].cpu()
        return Spectrum(name, shape, values, frobenius, complete=top is None or top >= count)
    unit = 2.0 ** math.frexp(frobenius)[1]  # W/unit has squares that neither overflow nor vanish
    scaled = blocks.to(torch.promote_types(blocks.dtype, torch.float32)) / unit
    tops = [top_eigenvalues_of_gram(W, top, tolerance, generator) for W in scaled]
    squares = torch.tensor([e.values for e in tops], dtype=torch.float64, device="cpu").clamp_min(0)
    residuals = torch.tensor([e.residuals for e in tops], dtype=torch.float64, device="cpu") / squares.sqrt().clamp_min(
        1e-300
    )
    return Spectrum(
        name,
        shape,
        unit * squares.sqrt(),
        frobenius,
        complete=False,
        residual=unit * residuals.max().item(),
        products=sum(e.products for e in tops),
        converged=all(e.converged for e in tops),
    )


def frobenius_norm(blocks: Float[Tensor, "blocks outputs inputs"], chunk: int = 2**16) -> float:
    """In float64, to which the entries are converted a cacheful at a time."""
    rows = blocks.flatten(0, 1).split(max(1, chunk // blocks.shape[2]))
    norm = torch.stack([torch.linalg.vector_norm(some, dtype=torch.float64) for some in rows]).norm().item()
    if 1e-140 < norm < math.inf:
        return norm
    return math.hypot(*(length(some.double()).item() for some in rows))


def top_eigenvalues_of_gram(
    W: Float[Tensor, "outputs inputs"], top: int, tolerance: float, generator: torch.Generator
) -> Eigenvalues:
    W = W if W.shape[0] <= W.shape[1] else W.T
    start, basis = gaussian_like(W[:, 0], generator), max(48, 4 * top)
    return lanczos(lambda v: W @ (W.T @ v), start, Goal(top, tolerance, 100 * top), generator, basis, every=4)


def all_values(W: Float[Tensor, "outputs inputs"]) -> Float[Tensor, " count"]:
    """All singular values of one matrix, descending, in float64."""
    if W.dtype == torch.float64:
        return torch.linalg.svdvals(W)
    W = (W.cpu() if W.device.type == "mps" else W).double()  # mps has no float64
    return gram_eigenvalues(W if W.shape[0] <= W.shape[1] else W.T).clamp_min(0).sqrt().flip(0)


def gram_eigenvalues(W: Float[Tensor, "short long"], rows: int = 96) -> Float[Tensor, " short"]:
    """Eigenvalues of WWᵀ, ascending; only its lower triangle is formed, by blocks of rows."""
    G = W.new_zeros(len(W), len(W))
    for start in range(0, len(W), rows):
        stop = min(start + rows, len(W))
        torch.mm(W[start:stop], W[:stop].T, out=G[start:stop, :stop])
    return torch.linalg.eigvalsh(G)
