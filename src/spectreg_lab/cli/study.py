"""Commands that carry a study out: reproduce, search, status."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectreg_lab.cli.errors import CommandError
from spectreg_lab.cli.stored import Against, console, folder, write_report

if TYPE_CHECKING:
    from spectreg_lab.settings.studies import Selection
    from spectreg_lab.studies.means import Means

DEFAULT = Path("studies/digits.toml")
Out = Annotated[Path | None, typer.Option(parser=folder, help="study folder [default: runs/NAME]")]
Processes = Annotated[int | None, typer.Option(min=1, help="runs at a time [default: one a core]")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads a run [default: 1]")]
EngineOption = Annotated[str, typer.Option(metavar="local|ray", help="processes of this machine, or a Ray cluster")]
Address = Annotated[str | None, typer.Option(help="of the Ray cluster, or auto [default: one on this machine]")]
PerGPU = Annotated[int | None, typer.Option(min=1, help="runs at a time on each GPU [default: 1]")]
CPUsPerRun = Annotated[int | None, typer.Option(min=1, help="cores and threads of a run, with Ray [default: 1]")]
Log = Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio; may be given again")]


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
        engine,
        address=address,
        processes=processes,
        threads=threads,
        per_gpu=per_gpu,
        cpus_per_run=cpus_per_run,
        accelerator=accelerator,
        devices=devices,
        nodes=nodes,
        log=tuple(log or ()),
    )
    folder, failed, first = _execute(study, out, means, only, precision, compiled)
    if first:
        write_report(folder, against)
    if failed:
        raise typer.Exit(1)


def _list() -> None:
    from spectreg_lab.settings.shipped import studies
    from spectreg_lab.settings.studies import read_study

    for name, path in studies().items():
        study = read_study(path)
        typer.echo(f"{name:16} {len(study.points()):5} runs  {study.title}")


def _plan(study: Path, only: "Selection", precision: str | None, compiled: bool, elsewhere: dict[str, Any]) -> None:
    from spectreg_lab.settings.studies import naming, read_study
    from spectreg_lab.studies.plan import plan
    from spectreg_lab.studies.search import gather

    if given := [option for option, value in elsewhere.items() if value]:
        raise CommandError(
            f"--dry-run counts what is to be done, wherever that is: {', '.join(given)} would change nothing, so leave "
            "that out"
        )
    content = read_study(study, precision, compiled)
    with naming(study):
        gather([study.parent / table for table in content.searched])  # refuses what the runs would be refused for
        planned = plan(content, only, lambda text: typer.echo(text, err=True))
    typer.echo(planned)


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
    from spectreg_lab.settings.studies import naming, read_study
    from spectreg_lab.storage.store import SEARCH
    from spectreg_lab.studies.search import check, choose

    study = find(study)
    content = read_study(study)
    with naming(study):
        check(content)
    means = _means(
        engine,
        address=address,
        processes=processes,
        threads=threads,
        per_gpu=per_gpu,
        cpus_per_run=cpus_per_run,
    )
    folder, failed, _ = _execute(study, out, means, searches=True)

    choice = choose(folder)
    typer.echo(f"learning rates\n{choice.rates.to_string(index=False)}\n")
    typer.echo(f"strengths\n{choice.strengths.to_string(index=False)}\n")
    typer.echo(f"all {len(choice.tried)} combinations: {folder / SEARCH}")
    if failed:
        raise CommandError(f"{len(failed)} runs failed and count as having learned nothing; the first: {failed[0]}")


def _means(engine: str, **options: Any) -> "Means":
    from spectreg_lab.studies.means import EngineName, Means

    if engine not in list(EngineName):
        raise CommandError(f"--engine {engine}: no such engine; known: {', '.join(EngineName)}")
    return Means(EngineName(engine), **options)


def _execute(
    study: Path,
    out: Path | None,
    means: "Means",
    only: "Selection | None" = None,
    precision: str | None = None,
    compiled: bool = False,
    searches: bool = False,
) -> tuple[Path, list[str], bool]:
    """Carry a study out; returns its folder, the runs that failed, and whether this process is the one that speaks."""
    from spectreg_lab.settings.studies import Selection, naming, read_study
    from spectreg_lab.storage.provenance import command
    from spectreg_lab.studies.display import StudyDisplay
    from spectreg_lab.studies.execution import begin, execute, execute_together
    from spectreg_lab.studies.search import gather
    from spectreg_lab.training.devices import first_decides, several_devices

    content = read_study(study, precision, compiled)
    if content.search is not None and not searches:
        raise CommandError(
            f"the study {content.name!r} has a [search] table: carry it out with `spectreg search {study}`"
        )
    folder = out or Path("runs") / content.name
    with naming(study):
        searched = gather([study.parent / table for table in content.searched])
    local, machines = means.shape()
    engine = means.start() if local * machines == 1 else None
    with several_devices(means.accelerator, local, machines, content.training.precision) as fabric:
        first = fabric is None or fabric.global_rank == 0
        with StudyDisplay(console(quiet=not first)) as display:
            start = naming(study)(partial(begin, content, folder, command(), display, only or Selection(), searched))
            try:
                if engine is not None:
                    execute(start(), engine, display, means.log)
                elif fabric is not None:
                    execute_together(first_decides(fabric, start), fabric, display)
            except KeyboardInterrupt:
                display.note(f"stopped; what is finished is kept in {folder}. The same command goes on from there.")
                raise typer.Exit(130) from None
    return folder, display.failed, first


def status(
    folder: Annotated[Path, typer.Argument(help="study folder")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on showing it until all is done")] = False,
) -> None:
    """Show how far a study is, from its folder alone: what is running and where, what has failed and why."""
    from rich.console import Console

    from spectreg_lab.studies import display
    from spectreg_lab.studies.status import Overview

    overview, screen = Overview(folder), Console()
    if not follow:
        overview.refresh()
        screen.print(display.picture(overview))
        return
    try:
        display.follow(overview, screen)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
