"""Commands on what a study has stored: report, export, unpack, measure."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectreg_lab.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console


class Source(StrEnum):
    """Whose numbers may stand beside ours."""

    PAPER = "paper"


def folder(text: str) -> Path:
    """A folder that is named: an empty name, such as that of a variable that is not set, would be the current one."""
    if not str(text).strip():
        raise CommandError("the folder is '', which would be the current one: is a variable not set?")
    return Path(text)


Against = Annotated[Source | None, typer.Option(help="set its numbers beside ours where the setting is the same")]


def report(
    study: Annotated[Path, typer.Argument(help="study folder, finished or not, or a file that export wrote")],
    against: Against = None,
    out: Annotated[
        Path | None, typer.Option(parser=folder, help="folder of the page [default: report/ beside the runs]")
    ] = None,
) -> None:
    """Write the report of a study anew, from what is stored there alone."""
    write_report(study, against, out)


def export(
    folder: Annotated[Path, typer.Argument(help="study folder, finished or not")],
    file: Annotated[Path | None, typer.Argument(help="[default: runs.jsonl.gz in the study folder]")] = None,
) -> None:
    """Pack a study's settings, numbers and outcomes, without weights, into one file to share or to keep."""
    from spectreg_lab.storage import archive

    target = file or folder / archive.NAME
    typer.echo(f"{archive.export(folder, target)} finished runs: {target.resolve()}")


def unpack(
    file: Annotated[Path, typer.Argument(help="a file that export wrote")],
    folder: Annotated[Path, typer.Argument(help="new study folder")],
) -> None:
    """Make a study folder of an exported file; `spectreg reproduce` does not repeat its finished runs."""
    from spectreg_lab.storage import archive

    typer.echo(f"{archive.unpack(file, folder)} finished runs: {folder.resolve()}")


def measure(
    folder: Annotated[str, typer.Argument(help="a run folder, a study folder, or all")],
    examples: Annotated[
        int | None, typer.Option(min=1, help="images of each split [default: the run's setting]")
    ] = None,
) -> None:
    """Measure finished runs: spectra, sensitivity, perturbations, Jacobian, curvature. Skips what has been measured."""
    from rich.progress import track

    from spectreg_lab.data import DataError
    from spectreg_lab.settings.config import Measuring
    from spectreg_lab.storage import errors, store
    from spectreg_lab.training import runs

    places = store.finished_runs(Path("runs" if folder == "all" else folder))
    if not places:
        raise CommandError(f"{folder}: no finished run here; `spectreg reproduce` or `spectreg train` makes them")
    setting = Measuring(examples=examples) if examples else None
    done, cannot = 0, []
    for place in track(places, "measuring", console=console()):
        try:
            done += runs.measure(place, setting)
        except (DataError, errors.RunError) as error:
            cannot.append(str(error))
    typer.echo(f"{done} runs measured, {len(places) - done - len(cannot)} had been before")
    if cannot:
        raise CommandError("\n".join([f"{len(cannot)} cannot be measured:", *cannot]))


def console(quiet: bool = False) -> "Console":
    """Standard error, so that what is printed can be piped."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


def write_report(study: Path, against: Source | None, out: Path | None = None) -> None:
    """Write a report and say where it is."""
    from spectreg_lab.page.report import write

    typer.echo(f"report: {write(study, against is Source.PAPER, out).resolve()}")
