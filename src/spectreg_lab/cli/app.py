"""The command itself: its name, its help, and how it ends."""

import sys
from collections.abc import Callable

import typer

from spectreg_lab.cli import checkpoint, single, stored, study
from spectreg_lab.cli.errors import explanation, is_users

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Spectral norm regularization (Yoshida & Miyato 2017): rerun the paper's comparison, or yours.",
)

COMMANDS: list[tuple[Callable[..., None], str]] = [
    (study.reproduce, "`spectreg reproduce studies/digits.toml --out runs/digits`"),
    (study.search, "`spectreg search studies/digits-search.toml`"),
    (study.status, "`spectreg status runs/paper --follow`"),
    (stored.report, "`spectreg report runs/paper --against paper`"),
    (stored.export, "`spectreg export runs/paper paper.jsonl.gz`"),
    (stored.unpack, "`spectreg unpack paper.jsonl.gz runs/paper`, then `spectreg reproduce` goes on there"),
    (stored.measure, "`spectreg measure runs/digits`, or `spectreg measure all` for every run under runs/"),
    (checkpoint.spectra, "`spectreg spectra model.safetensors --csv spectra.csv --plot spectra.svg`"),
    (single.train, "`spectreg train --model vgg --data digits --method spectral --stages 2,2 --epochs 5`"),
]
for command, example in COMMANDS:
    app.command(epilog=f"Example: {example}")(command)


def main() -> None:
    """Run the command; an error that its user can mend is one line, and the exit code says that there was one."""
    try:
        app()
    except Exception as error:
        if not is_users(error):
            raise
        typer.echo(f"spectreg: {explanation(error)}", err=True)
        sys.exit(2)
