"""The command that shows what a checkpoint holds: spectra."""

from pathlib import Path
from typing import Annotated

import typer

from spectreg_lab.cli.errors import CommandError
from spectreg_lab.cli.stored import console


def spectra(
    checkpoint: Annotated[
        Path, typer.Argument(help=".safetensors, a Hugging Face *.index.json, or .pt (weights only)")
    ],
    other: Annotated[Path | None, typer.Argument(help="a second one to compare with: after fine-tuning, say")] = None,
    base: Annotated[Path | None, typer.Option(help="what a LoRA file adapts")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="only so many of the largest values")] = None,
    map: Annotated[
        list[str] | None, typer.Option(help="each, joint or a number of parts; or PATTERN=VALUE, more than once")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="write every singular value here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the spectra here: .svg, .pdf or .png")] = None,
) -> None:
    """Singular values of every weight of a checkpoint, one weight in memory at a time; nothing in it is executed.

    Weights count as they act: FP8 and int8 times their scales, LoRA files as products, experts one by one.
    """
    from spectreg.checkpoints.files import Stored
    from spectreg_lab import spectra as show

    try:
        stored = [Stored(path) for path in (checkpoint, other) if path]
        under = Stored(base) if base else None
        show.check_outputs(csv, plot, [*stored, *([under] if under else [])])
        show.check_base(under, stored)
        wanted = show.patterns(map)
        checkpoints = [show.measure(one, under, top, wanted, console()) for one in stored]
        for one in checkpoints:
            typer.echo("\n\n".join(show.report(one, heading=len(checkpoints) > 1)))
        if len(checkpoints) > 1:
            typer.echo("\n" + show.comparison(*checkpoints))
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    if csv:
        show.write_csv(checkpoints, csv)
    if plot:
        show.write_plot(checkpoints, plot)
