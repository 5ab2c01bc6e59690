"""The spectra of a checkpoint: a table for the terminal, a CSV file, a plot."""

import io
from pathlib import Path

import pandas as pd
from rich.console import Console

from spectreg.measures.spectra import Spectrum, each_spectrum
from spectreg_lab.storage.files import csv, write

BESIDE = ("momentum/", "method/")
COLUMNS = ("weight", "shape", "sigma", "frobenius", "stable rank", "effective rank")


def show(checkpoint: Path, top: int | None, console: Console) -> list[Spectrum]:
    """Measure every weight of ``checkpoint``, telling ``console`` which one is at hand.

    Of a run's own checkpoint only the network counts, not the momentum or the vectors beside it.
    """
    found: list[Spectrum] = []
    with console.status(f"reading {checkpoint}") as status:
        for spectrum in each_spectrum(checkpoint, top=top, select=lambda name, _: not name.startswith(BESIDE)):
            found.append(spectrum)
            status.update(f"{len(found)} weights measured, the last one {spectrum.name}")
    return found


def table(spectra: list[Spectrum]) -> str:
    """One line a weight: shape (blocks × outputs × inputs), σ₁, Frobenius norm, stable and effective rank.

    Where only the largest values were asked for, also how far off they may be and whether the iteration converged.
    """
    rows = [
        (s.name, "×".join(map(str, s.shape)), s.sigma, s.frobenius, s.stable_rank, s.effective_rank) for s in spectra
    ]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    if not all(s.complete for s in spectra):
        frame["residual"] = [s.residual for s in spectra]
        frame["converged"] = ["yes" if s.converged else "no" for s in spectra]
    return frame.to_string(index=False, float_format=lambda x: f"{x:.4g}")


def write_csv(spectra: list[Spectrum], path: Path) -> None:
    """One line a singular value: weight, block, index (from 1, largest first), value."""
    rows = [
        (s.name, block, index, value)
        for s in spectra
        for block, values in enumerate(s.values.tolist())
        for index, value in enumerate(values, start=1)
    ]
    frame = pd.DataFrame(rows, columns=["weight", "block", "index", "value"])
    write(path, csv(frame, digits=9))


def write_plot(spectra: list[Spectrum], path: Path) -> None:
    """The singular values of every weight against their index, in a grid of panels on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.2 * rows), squeeze=False, layout="constrained")
    for axis, spectrum in zip(axes.flat, spectra, strict=False):
        for values in spectrum.values.tolist():
            axis.plot(range(1, len(values) + 1), values, linewidth=1.2)
        axis.set_title(spectrum.name, fontsize=8)
        axis.set_ylim(bottom=0)
    for axis in axes.flat[len(spectra) :]:
        axis.set_visible(False)
    figure.supxlabel("index of the singular value, largest first")
    figure.supylabel("singular value")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png")
    plt.close(figure)
    write(path, buffer.getvalue())
