"""The ``spectreg`` command: a skin over the other modules, which it imports only when a command runs."""

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from spectreg_lab.settings.config import Config
    from spectreg_lab.settings.studies import Selection
    from spectreg_lab.studies.means import Means

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Spectral norm regularization (Yoshida & Miyato 2017): rerun the paper's comparison, or yours.",
)

DEFAULT = Path("studies/digits.toml")


class Source(StrEnum):
    """Whose numbers may stand beside ours."""

    PAPER = "paper"


Out = Annotated[Path | None, typer.Option(help="study folder [default: runs/NAME]")]
Processes = Annotated[int | None, typer.Option(min=1, help="runs at a time [default: one a core]")]
Against = Annotated[Source | None, typer.Option(help="set its numbers beside ours where the setting is the same")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads a run [default: 1]")]
EngineOption = Annotated[str, typer.Option(metavar="local|ray", help="processes of this machine, or a Ray cluster")]
Address = Annotated[str | None, typer.Option(help="of the Ray cluster, or auto [default: one on this machine]")]
PerGPU = Annotated[int | None, typer.Option(min=1, help="runs at a time on each GPU [default: 1]")]
CPUsPerRun = Annotated[int | None, typer.Option(min=1, help="cores and threads of a run, with Ray [default: 1]")]
Log = Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio; may be given again")]


@app.command(epilog="Example: `spectreg reproduce studies/digits.toml --out runs/digits`")
def reproduce(
    study: Annotated[Path, typer.Argument(help="study file, or the name of a study that comes with it")] = DEFAULT,
    out: Out = None,
    setting: Annotated[list[str] | None, typer.Option(help="only this setting; may be given again")] = None,
    regime: Annotated[list[str] | None, typer.Option(help="only this regime")] = None,
    method: Annotated[list[str] | None, typer.Option(help="only this method")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only this seed")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print runs, steps, sizes and arithmetic; train nothing")
    ] = False,
    processes: Processes = None,
    threads: Threads = None,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, mps or auto")] = "auto",
    devices: Annotated[
        int | None, typer.Option(min=1, help="of one run: its batches are shared out among them [default: 1]")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="machines of one run [default: 1]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="32-true, bf16-mixed or 64-true, instead of the study's")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="compile the networks with torch.compile")] = False,
    engine: EngineOption = "local",
    address: Address = None,
    per_gpu: PerGPU = None,
    cpus_per_run: CPUsPerRun = None,
    log: Log = None,
    against: Against = None,
    listed: Annotated[bool, typer.Option("--list", help="name the studies that come with it, and do nothing")] = False,
) -> None:
    """Do every run of a study that is not finished yet, and write its report."""
    from spectreg_lab.settings.shipped import find
    from spectreg_lab.settings.studies import Selection

    if listed:
        _list()
        return
    study = find(study)

    only = Selection(setting, regime, method, seed)
    if dry_run:
        elsewhere: dict[str, Any] = {"--accelerator": accelerator != "auto", "--devices": devices, "--nodes": nodes}
        elsewhere |= {"--engine": engine != "local", "--address": address, "--per-gpu": per_gpu, "--log": log}
        elsewhere |= {"--processes": processes, "--threads": threads, "--cpus-per-run": cpus_per_run}
        _plan(study, only, precision, compiled, elsewhere)
        return
    means = _means(
        engine, address, processes, threads, per_gpu, cpus_per_run, accelerator, devices, nodes, tuple(log or ())
    )
    folder, failed, first = _execute(study, out, means, only, precision, compiled)
    if first:
        _report(folder, against)
    if failed:
        raise typer.Exit(1)


def _list() -> None:
    from spectreg_lab.settings.shipped import studies
    from spectreg_lab.settings.studies import read_study

    for name, path in studies().items():
        study = read_study(path)
        typer.echo(f"{name:16} {len(study.points()):5} runs  {study.title}")


def _plan(study: Path, only: "Selection", precision: str | None, compiled: bool, elsewhere: dict[str, Any]) -> None:
    from spectreg_lab.settings.studies import read_study
    from spectreg_lab.studies.plan import plan

    if given := [option for option, value in elsewhere.items() if value]:
        raise CommandError(
            f"--dry-run counts what is to be done, wherever that is: {', '.join(given)} would change nothing, so leave "
            "that out"
        )
    typer.echo(plan(read_study(study, precision, compiled), only, lambda text: typer.echo(text, err=True)))


@app.command(epilog="Example: `spectreg search studies/digits-search.toml`")
def search(
    study: Annotated[Path, typer.Argument(help="file or name of a study with a [search] table")],
    out: Out = None,
    processes: Processes = None,
    threads: Threads = None,
    engine: EngineOption = "local",
    address: Address = None,
    per_gpu: PerGPU = None,
    cpus_per_run: CPUsPerRun = None,
) -> None:
    """Try a grid of learning rates and strengths on held-out training images, and say which to use."""
    from spectreg_lab.settings.shipped import find
    from spectreg_lab.settings.studies import read_study
    from spectreg_lab.storage.store import SEARCH
    from spectreg_lab.studies.search import check, choose

    study = find(study)
    check(read_study(study))
    means = _means(engine, address, processes, threads, per_gpu, cpus_per_run)
    folder, failed, _ = _execute(study, out, means)

    choice = choose(folder)
    typer.echo(f"learning rates\n{choice.rates.to_string(index=False)}\n")
    typer.echo(f"strengths\n{choice.strengths.to_string(index=False)}\n")
    typer.echo(f"all {len(choice.tried)} combinations: {folder / SEARCH}")
    if failed:
        raise CommandError(f"{len(failed)} runs failed and count as having learned nothing; the first: {failed[0]}")


def _means(engine: str, *options: Any) -> "Means":
    from spectreg_lab.studies.means import EngineName, Means

    if engine not in list(EngineName):
        raise CommandError(f"--engine {engine}: no such engine; known: {', '.join(EngineName)}")
    return Means(EngineName(engine), *options)


def _execute(
    study: Path,
    out: Path | None,
    means: "Means",
    only: "Selection | None" = None,
    precision: str | None = None,
    compiled: bool = False,
) -> tuple[Path, list[str], bool]:
    """Carry a study out; returns its folder, the runs that failed, and whether this process is the one that speaks."""
    from spectreg_lab.settings.studies import Selection, read_study
    from spectreg_lab.storage.provenance import command
    from spectreg_lab.studies.display import StudyDisplay
    from spectreg_lab.studies.execution import begin, execute, execute_together
    from spectreg_lab.studies.search import gather
    from spectreg_lab.training.devices import first_decides, several_devices

    content = read_study(study, precision, compiled)
    folder = out or Path("runs") / content.name
    searched = gather([study.parent / table for table in content.searched])
    local, machines = means.shape()
    engine = means.start() if local * machines == 1 else None
    with several_devices(means.accelerator, local, machines, content.training.precision) as fabric:
        first = fabric is None or fabric.global_rank == 0
        with StudyDisplay(_console(quiet=not first)) as display:
            start = partial(begin, content, folder, command(), display, only or Selection(), searched)
            try:
                if engine is not None:
                    execute(start(), engine, display, means.log)
                elif fabric is not None:
                    execute_together(first_decides(fabric, start), fabric, display)
            except KeyboardInterrupt:
                display.note(f"stopped; what is finished is kept in {folder}. The same command goes on from there.")
                raise typer.Exit(130) from None
    return folder, display.failed, first


@app.command(epilog="Example: `spectreg status runs/paper --follow`")
def status(
    folder: Annotated[Path, typer.Argument(help="study folder")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on showing it until all is done")] = False,
) -> None:
    """Show how far a study is, from its folder alone: what is running and where, what has failed and why."""
    from rich.console import Console

    from spectreg_lab.studies import display
    from spectreg_lab.studies.status import Overview

    overview, console = Overview(folder), Console()
    if not follow:
        overview.refresh()
        console.print(display.picture(overview))
        return
    try:
        display.follow(overview, console)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command(epilog="Example: `spectreg report runs/paper --against paper`")
def report(
    study: Annotated[Path, typer.Argument(help="study folder, finished or not, or a file that export wrote")],
    against: Against = None,
    out: Annotated[Path | None, typer.Option(help="folder of the page [default: report/ beside the runs]")] = None,
) -> None:
    """Write the report of a study anew, from what is stored there alone."""
    _report(study, against, out)


@app.command(epilog="Example: `spectreg export runs/paper paper.jsonl.gz`")
def export(
    folder: Annotated[Path, typer.Argument(help="study folder, finished or not")],
    file: Annotated[Path | None, typer.Argument(help="[default: runs.jsonl.gz in the study folder]")] = None,
) -> None:
    """Pack a study's settings, numbers and outcomes, without weights, into one file to share or to keep."""
    from spectreg_lab.storage import archive

    target = file or folder / archive.NAME
    typer.echo(f"{archive.export(folder, target)} finished runs: {target.resolve()}")


@app.command(epilog="Example: `spectreg unpack paper.jsonl.gz runs/paper`, then `spectreg reproduce` goes on there")
def unpack(
    file: Annotated[Path, typer.Argument(help="a file that export wrote")],
    folder: Annotated[Path, typer.Argument(help="new study folder")],
) -> None:
    """Make a study folder of an exported file; `spectreg reproduce` does not repeat its finished runs."""
    from spectreg_lab.storage import archive

    typer.echo(f"{archive.unpack(file, folder)} finished runs: {folder.resolve()}")


@app.command(epilog="Example: `spectreg measure runs/digits`, or `spectreg measure all` for every run under runs/")
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
    from spectreg_lab.storage import store
    from spectreg_lab.training import runs

    places = store.finished_runs(Path("runs" if folder == "all" else folder))
    if not places:
        raise CommandError(f"{folder}: no finished run here; `spectreg reproduce` or `spectreg train` makes them")
    setting = Measuring(examples=examples) if examples else None
    done, cannot = 0, []
    for place in track(places, "measuring", console=_console()):
        try:
            done += runs.measure(place, setting)
        except (DataError, store.RunError) as error:
            cannot.append(str(error))
    typer.echo(f"{done} runs measured, {len(places) - done - len(cannot)} had been before")
    if cannot:
        raise CommandError("\n".join([f"{len(cannot)} cannot be measured:", *cannot]))


@app.command(epilog="Example: `spectreg spectra model.safetensors --csv spectra.csv --plot spectra.svg`")
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
        wanted = show.patterns(map)
        checkpoints = [show.measure(one, under, top, wanted, _console()) for one in stored]
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


def _console(quiet: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


def _report(study: Path, against: Source | None, out: Path | None = None) -> None:
    from spectreg_lab.page.report import write

    typer.echo(f"report: {write(study, against is Source.PAPER, out).resolve()}")


@app.command(epilog="Example: `spectreg train --model vgg --data digits --method spectral --stages 2,2 --epochs 5`")
def train(
    model: Annotated[str, typer.Option(help="vgg, nin or densenet")] = "vgg",
    data: Annotated[str, typer.Option(help="digits, cifar10, cifar100, stl10, a hub name, a folder")] = "digits",
    method: Annotated[
        str, typer.Option(help="vanilla, decay, adversarial, spectral, jacobian or layerwise-jacobian")
    ] = "spectral",
    batch_size: Annotated[int, typer.Option()] = 64,
    learning_rate: Annotated[float, typer.Option()] = 0.05,
    epochs: Annotated[int, typer.Option()] = 10,
    seed: Annotated[int, typer.Option()] = 0,
    strength: Annotated[float | None, typer.Option(help="λ of decay or spectral")] = None,
    width: Annotated[int | None, typer.Option(help="of a vgg or nin")] = None,
    stages: Annotated[str | None, typer.Option(help="of a vgg: convolutions in each stage, such as 2,2,3")] = None,
    depth: Annotated[int | None, typer.Option(help="of a densenet: 3n + 4")] = None,
    train_size: Annotated[int | None, typer.Option(help="use this many training images")] = None,
    test_size: Annotated[int | None, typer.Option(help="use this many test images")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/single/NAME]")] = None,
) -> None:
    """Train one run, or go on with it; prints a line an epoch."""
    from spectreg_lab.training.runs import run

    given = {"width": width, "stages": stages and _whole_numbers("--stages", stages), "depth": depth}
    config = _config(
        {
            "model": {"name": model, **_present(given)},
            "data": {"name": data, **_present({"train_size": train_size, "test_size": test_size})},
            "method": {"name": method, **_present({"strength": strength})},
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "epochs": epochs,
            "seed": seed,
        }
    )
    folder = out or Path("runs") / "single" / config.name
    try:
        outcome = run(config, folder, on_epoch=_show_epoch)
    except KeyboardInterrupt:
        typer.echo(f"stopped; {folder} goes on with the same command", err=True)
        raise typer.Exit(130) from None
    if outcome["status"] == "failed":
        raise CommandError(outcome["error"])
    typer.echo(f"run: {folder.resolve()}")


def _show_epoch(metrics: dict) -> None:
    shown = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
    largest = max(metrics["sigma"].values())
    numbers = "  ".join(f"{key} {metrics[key]:.4g}" for key in shown if key in metrics)
    typer.echo(f"{numbers}  largest sigma {largest:.3g}")


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(f"{option} {text!r}: give whole numbers with commas, such as 2,2,3") from None


def _present(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def _config(values: dict) -> "Config":
    from pydantic import ValidationError

    from spectreg_lab.settings.config import Config
    from spectreg_lab.settings.faults import explain

    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise CommandError("; ".join(explain(error, Config))) from None


class CommandError(Exception):
    """What the user gave does not work."""


def main() -> None:
    """Run the command; an error that its user can mend is one line, and the exit code says that there was one."""
    try:
        app()
    except Exception as error:
        if not _is_users(error):
            raise
        typer.echo(f"spectreg: {_text(error)}", err=True)
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    from spectreg_lab.data import DataError
    from spectreg_lab.settings.studies import StudyError
    from spectreg_lab.storage.store import RunError
    from spectreg_lab.studies.execution import UnwritableError
    from spectreg_lab.studies.loggers import LogError
    from spectreg_lab.training.devices import DeviceError

    return isinstance(
        error, CommandError | DataError | DeviceError | LogError | OSError | RunError | StudyError | UnwritableError
    )


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}: mend that and give the same command again; what is finished is kept"
    return str(error)


if __name__ == "__main__":
    main()
