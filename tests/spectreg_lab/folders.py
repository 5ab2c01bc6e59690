"""Hand-written study folders with numbers that are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from spectreg_lab.settings.config import VGG, Adversarial, Config, Data, Decay, Spectral, Vanilla
from spectreg_lab.storage import run_folder, store

METHODS = {"vanilla": Vanilla(), "decay": Decay(), "adversarial": Adversarial(), "spectral": Spectral()}
DIGITS = Data()
VERSIONS = {"spectreg": "0.1.0", "torch": "2.13.0", "commit": "0123abc", "machine": "x86_64, 2 cores"}

Curve = Callable[[str, str, int], list[tuple[float, float]]]
Measures = Callable[[str, str, int], dict[str, Any]]


def flat(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
    """Two epochs that every run shares: (training accuracy, test accuracy)."""
    return [(0.9, 0.8), (0.99, 0.85)]


def write_study(
    folder: Path,
    curve: Curve = flat,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[str, ...] = tuple(METHODS),
    settings: dict[str, dict[str, Any]] | None = None,
    line: Callable[[str, str, int, int], dict[str, Any]] = lambda *_: {},
    measures: Measures | None = None,
    data: Data = DIGITS,
    batch_sizes: tuple[int, int] = (64, 512),
    rates: tuple[float, float] = (0.1, 0.1),
    finish: bool = True,
) -> Path:
    """Write a study of one run a method, regime and seed, whose accuracies are ``curve(regime, method, seed)``."""
    regimes = dict(zip(("small", "large"), batch_sizes, strict=True))
    rate = dict(zip(regimes, rates, strict=True))
    study = {
        "name": "by-hand",
        "title": "A study by hand",
        "epochs": len(curve("small", methods[0], seeds[0])),
        "seeds": list(seeds),
        "regimes": {name: {"batch_size": size} for name, size in regimes.items()},
        "settings": settings or {"vgg": {"model": {"name": "vgg"}, "data": {"name": data.name}}},
        "methods": {method: {} for method in methods},
    }
    points = [
        {"setting": setting, "regime": regime, "method": method, "seed": seed}
        for setting in study["settings"]
        for regime in regimes
        for method in methods
        for seed in seeds
    ]
    with mock.patch("os.fsync"):  # thousands of small files, none of which need survive a power cut
        for point in points:
            of_run = point["regime"], point["method"], point["seed"]
            point["run"] = "-".join(str(value) for value in point.values())
            epochs = [
                {"epoch": n, "train_accuracy": train, "test_accuracy": test, "seconds": 1.0} | line(*of_run, n)
                for n, (train, test) in enumerate(curve(*of_run), start=1)
            ]
            sizes = regimes[point["regime"]], rate[point["regime"]]
            run = write_run(folder / "runs" / point["run"], data, *of_run, *sizes, epochs)
            if finish:
                run.end("finished")
            if measures is not None:
                run_folder.write_json(run.path / run_folder.MEASURES, measures(*of_run))
        store.begin_study(folder, study, points, "spectreg reproduce by-hand.toml")
    return folder


def write_run(
    path: Path,
    data: Data,
    regime: str,
    method: str,
    seed: int,
    batch_size: int,
    learning_rate: float,
    epochs: list[dict[str, Any]],
) -> run_folder.RunFolder:
    """Write a run that has these epochs and no outcome."""
    run = run_folder.RunFolder(path)
    path.mkdir(parents=True)
    config = Config(
        model=VGG(),
        data=data,
        method=METHODS[method],
        batch_size=batch_size,
        learning_rate=learning_rate,
        epochs=len(epochs),
        seed=seed,
    )
    run.begin(config, VERSIONS)
    for epoch in epochs:
        run.append(epoch)
    return run


def lose(folder: Path, run: str) -> None:
    """Take a run away, as though it had never begun."""
    for file in (folder / "runs" / run).iterdir():
        file.unlink()


def fail(folder: Path, run: str, cause: str) -> None:
    """Record a run as failed."""
    run_folder.write_json(folder / "runs" / run / run_folder.OUTCOME, {"status": "failed", "error": cause})


def age(folder: Path, run: str) -> None:
    """Mark a run as written by another format version."""
    path = folder / "runs" / run / run_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def foreign(folder: Path, number: int = 1, token: str = "theirs", **owner: Any) -> Path:
    """A claim of another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"claim-{number}.json"
    path.write_text(json.dumps({"host": "node-b", "process": 7, "token": token, "machine": "node-b", **owner}))
    return path
