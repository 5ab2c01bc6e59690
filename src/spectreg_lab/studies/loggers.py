"""Where the numbers of an epoch go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio.

Each gets every number of an epoch under its name in ``metrics.jsonl``, nested ones as ``sigma/features.0.weight``, at
the epoch's number, once. A run that goes on after a stop is the same run there.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spectreg_lab.settings.config import Config
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.files import write

Log = Callable[[dict[str, Any]], None]


class LogError(RunError):
    """A logger that cannot be had or does not work; the message says which and what would do."""


def check(names: Collection[str]) -> None:
    """Make sure that the loggers are there.

    Raises:
        LogError: one is unknown, or its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise LogError(f"--log {name}: no such logger; known: {', '.join(LOGGERS)}")
        if find_spec(name) is None:
            raise LogError(f"--log {name}: the package {name} is not installed: pip install {name}")


@contextmanager
def loggers(names: Collection[str], config: Config, folder: Path) -> Iterator[Log]:
    """What is to be called with the metrics of each epoch of the run in ``folder``, those of old epochs included.

    Raises:
        LogError: a logger failed.
    """
    with ExitStack() as closing:
        logs = []
        for name in names:
            with _named(name):
                log, close = LOGGERS[name](name, config, folder)
            closing.callback(_named(name)(close))
            logs.append((name, log))

        def tell(metrics: dict[str, Any]) -> None:
            for name, log in logs:
                with _named(name):
                    log(metrics)

        yield tell


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise LogError(f"--log {name}: {type(error).__name__}: {error}") from error


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in ``metrics``, nested dictionaries joined by slashes.

    >>> flat({"epoch": 3, "sigma": {"a.weight": 0.5}, "curves": {"test": [1, 2]}})
    {'epoch': 3.0, 'sigma/a.weight': 0.5}
    """
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers


def _tensorboard(name: str, config: Config, folder: Path) -> tuple[Log, Callable[[], None]]:
    """Into ``tensorboard/`` in the run's folder; what an earlier process wrote there is superseded, step by step."""
    from lightning_fabric.loggers import TensorBoardLogger

    logger = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=0)

    def log(metrics: dict[str, Any]) -> None:
        logger.log_metrics(flat(metrics), metrics["epoch"])
        logger.save()

    return log, lambda: logger.finalize("success")


def _like_wandb(name: str, config: Config, folder: Path) -> tuple[Log, Callable[[], None]]:
    """As a run of the project that has the name of the study's folder; where it is kept and sent is the package's.

    Neither package drops an epoch that it is told again, so the last one told stands in ``wandb-told`` or
    ``trackio-told`` in the run's folder, and older ones are passed over.
    """
    module = import_module(name)
    settings: dict[str, Any] = {"project": folder.resolve().parents[1].name, "name": config.name, "resume": "allow"}
    if name == "wandb":
        settings |= {"id": config.name, "dir": str(folder)}
    run, told = module.init(**settings, config=config.model_dump(mode="json")), folder / f"{name}-told"
    last = int(told.read_text()) if told.exists() else 0

    def log(metrics: dict[str, Any]) -> None:
        if metrics["epoch"] > last:
            run.log(flat(metrics), step=metrics["epoch"])
            write(told, f"{metrics['epoch']}\n".encode())

    return log, run.finish


LOGGERS = {"tensorboard": _tensorboard, "wandb": _like_wandb, "trackio": _like_wandb}
