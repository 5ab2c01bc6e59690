"""The command that trains one run without a study: train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectreg_lab.cli.errors import CommandError

if TYPE_CHECKING:
    from spectreg_lab.settings.config import Config


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
