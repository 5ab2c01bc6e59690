"""The spectra of checkpoints: tables for the terminal, a CSV file, a plot."""

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from torch import Tensor

from spectreg.checkpoints.acting import NO_ADAPTER, Acting
from spectreg.checkpoints.adapters import adapters_in
from spectreg.checkpoints.files import ADAPTER, Stored
from spectreg.measures.spectra import Spectrum, Wanted, each_spectrum
from spectreg.weights.patterns import Patterns
from spectreg_lab.storage.files import csv, write

BESIDE = ("momentum/", "method/")
FEW = 10
COLUMNS = ("weight", "shape", "sigma", "frobenius", "stable rank", "effective rank")


@dataclass(frozen=True)
class Checkpoint:
    """The spectra of one checkpoint, what each weight was taken for, and what was left out with the reasons."""

    path: Path
    stored: Stored
    acting: Acting
    map: Wanted
    spectra: list[Spectrum]
    skipped: dict[str, str]


def measure(stored: Stored, base: Stored | None, top: int | None, map: Wanted, console: Console) -> Checkpoint:
    """Measure every weight of a checkpoint, telling ``console`` which one is at hand.

    Of a run's own checkpoint only the network counts, not the momentum or the vectors beside it.
    """
    base = base if adapters_in(stored) else None
    spectra: list[Spectrum] = []
    skipped: dict[str, str] = dict(stored.passed_over)
    path = stored.files[0]

    def select(name: str, _: Tensor) -> bool:
        return not name.startswith(BESIDE)

    with console.status(f"reading {path}") as status:
        for spectrum in each_spectrum(stored, top=top, select=select, map=map, base=base, skipped=skipped):
            spectra.append(spectrum)
            status.update(f"{len(spectra)} weights measured, the last one {spectrum.name}")
    return Checkpoint(path, stored, Acting(stored, base), map, spectra, skipped)


def report(checkpoint: Checkpoint, heading: bool) -> Iterator[str]:
    """What the terminal shows of one checkpoint, section by section."""
    if heading:
        yield str(checkpoint.path)
    yield table(checkpoint.spectra)
    if len(checkpoint.spectra) > FEW:
        yield extremes(checkpoint.spectra)
    if checkpoint.skipped:
        yield left_out(checkpoint.skipped)


def patterns(given: list[str] | None) -> Wanted:
    """``map`` as the library takes it: from one value for all, or from ``PATTERN=VALUE`` any number of times."""
    if not given:
        return "matrix"
    parts = [(pattern, _map(value)) for pattern, _, value in (text.rpartition("=") for text in given)]
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    if not all(pattern for pattern, _ in parts):
        raise ValueError("--map: give one value for all weights, or PATTERN=VALUE each time.")
    if twice := [pattern for pattern, times in Counter(pattern for pattern, _ in parts).items() if times > 1]:
        raise ValueError(f"--map: {twice[0]} is given more than once: leave one out.")
    return dict(parts)


def _map(value: str) -> str | int:
    return int(value) if value.isascii() and value.isdigit() else value


def check_base(base: Stored | None, checkpoints: Iterable[Stored]) -> None:
    """Raise ValueError if a base is given that none of the checkpoints has adapters for."""
    if base is not None and not any(adapters_in(stored) for stored in checkpoints):
        raise ValueError(f"--{NO_ADAPTER}")


def check_outputs(csv: Path | None, plot: Path | None, inputs: Iterable[Stored]) -> None:
    """Raise ValueError before anything is measured if an output cannot be written, or would replace an input."""
    files = [file for stored in inputs for file in (*stored.files, stored.files[0].parent / ADAPTER) if file.exists()]
    for option, path in (("--csv", csv), ("--plot", plot)):
        if path is None:
            continue
        if path.exists() and any(path.samefile(file) for file in files):
            raise ValueError(f"{option} {path} is a file that is read: an output never replaces an input.")
        if path.is_dir() or not path.parent.is_dir():
            why = "that is a folder" if path.is_dir() else "its folder does not exist"
            raise ValueError(f"{option} {path}: {why}.")
    if csv and plot and os.path.abspath(csv) == os.path.abspath(plot):
        raise ValueError(f"--csv and --plot are both {csv}: give each a file of its own.")
    if plot and (known := _formats()) and _format(plot) not in known:
        raise ValueError(f"--plot {plot}: its name must end in one of {', '.join(sorted(known))}.")


def _formats() -> set[str]:
    from matplotlib.backend_bases import FigureCanvasBase

    return set(FigureCanvasBase.get_supported_filetypes())


def _format(path: Path) -> str:
    return path.suffix.lstrip(".").lower() or "png"


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
    return _text(frame)


def extremes(spectra: list[Spectrum]) -> str:
    """The ten largest weights by σ₁, and the ten flattest: stable rank nearest to the number of singular values."""
    rows = [(s.name, s.sigma, s.stable_rank, s.stable_rank / (s.shape[0] * min(s.shape[1:]))) for s in spectra]
    frame = pd.DataFrame(rows, columns=["weight", "sigma", "stable rank", "share of full rank"])
    largest, flattest = (frame.nlargest(FEW, by) for by in ("sigma", "share of full rank"))
    return f"the {FEW} largest\n{_text(largest)}\n\nthe {FEW} flattest\n{_text(flattest)}"


def left_out(skipped: Mapping[str, str]) -> str:
    """What was not measured, by reason: the names, or how many where they have one dimension as all biases have."""
    lines = []
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        listed = f"{len(names)} in number" if reason == "1 dimension" else ", ".join(names)
        lines.append(f"left out, {reason}: {listed}")
    return "\n".join(lines)


def comparison(before: Checkpoint, after: Checkpoint) -> str:
    """One line a weight of both: σ₁ before and after, their ratio, stable ranks, and σ₁ of the difference."""
    pairs = [(a, b) for a in before.spectra for b in after.spectra if a.name == b.name and a.shape == b.shape]
    changes = {s.name: s.sigma for s in _changes(before, after, [a.name for a, _ in pairs])}
    rows = [
        (a.name, a.sigma, b.sigma, b.sigma / a.sigma if a.sigma else float("nan"), a.stable_rank, b.stable_rank,
         changes[a.name])
        for a, b in pairs
    ]  # fmt: skip
    columns = ["weight", "sigma A", "sigma B", "B/A", "stable rank A", "stable rank B", "sigma of B − A"]
    lines = [_text(pd.DataFrame(rows, columns=columns))] if rows else ["no weight is in both with the same shape"]
    common = {a.name for a, _ in pairs}
    for letter, checkpoint in (("A", before), ("B", after)):
        alone = [s.name for s in checkpoint.spectra if s.name not in common]
        if alone:
            lines.append(f"only in {letter}: {', '.join(alone)}")
    return "\n".join(lines)


def _changes(before: Checkpoint, after: Checkpoint, names: Iterable[str]) -> Iterator[Spectrum]:
    """The largest singular value of B − A, weight by weight, each taken for what it was in A and B."""
    kept = [(c.acting, {c.acting.name(stored): stored for stored in c.stored}) for c in (before, after)]
    wanted = Patterns("map", after.map)
    for name in names:
        a, b = (acting.weight(stored[name]).double() for acting, stored in kept)
        yield from each_spectrum({name: b - a}, top=1, map=wanted.get(name, "matrix"))


def _text(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False, float_format=lambda x: f"{x:.4g}")


def write_csv(checkpoints: list[Checkpoint], path: Path) -> None:
    """One line a singular value: weight, block, index (from 1, largest first), value; of several, also the file."""
    rows = [
        (str(checkpoint.path), s.name, block, index, value)
        for checkpoint in checkpoints
        for s in checkpoint.spectra
        for block, values in enumerate(s.values.tolist())
        for index, value in enumerate(values, start=1)
    ]
    frame = pd.DataFrame(rows, columns=["checkpoint", "weight", "block", "index", "value"])
    write(path, csv(frame if len(checkpoints) > 1 else frame.drop(columns="checkpoint"), digits=9))


def write_plot(checkpoints: list[Checkpoint], path: Path) -> None:
    """The spectra of all weights in one picture, coloured by their order; one beside the other for two checkpoints."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    size = (5.5 * len(checkpoints) + 1, 4)
    figure, axes = plt.subplots(1, len(checkpoints), figsize=size, squeeze=False, sharey=True, layout="constrained")
    colours = ScalarMappable(Normalize(1, max(2, *(len(c.spectra) for c in checkpoints))), "viridis")
    for axis, checkpoint in zip(axes.flat, checkpoints, strict=True):
        _draw(axis, checkpoint.spectra, colours)
        axis.set_title(checkpoint.path.name, fontsize=9)
        axis.set_xlabel("share of the singular values, largest first")
    axes.flat[0].set_ylabel("singular value")
    figure.colorbar(colours, ax=axes, label="weight, in the order of the file")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=_format(path))
    plt.close(figure)
    write(path, buffer.getvalue())


def _draw(axis: Any, spectra: list[Spectrum], colours: Any) -> None:
    for order, spectrum in enumerate(spectra, start=1):
        for values in spectrum.values.tolist():
            x = [(i + 0.5) / min(spectrum.shape[1:]) for i in range(len(values))]
            y = [value if value > 0 else float("nan") for value in values]
            axis.plot(x, y, color=colours.to_rgba(order), linewidth=1, marker="." if len(y) < 3 else "")
    axis.set_yscale("log")
