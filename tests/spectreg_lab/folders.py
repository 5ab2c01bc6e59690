"""Hand-written study folders with numbers that are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectreg_lab import store
from spectreg_lab.config import VGG, Adversarial, Config, Data, Decay, Spectral, Vanilla

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
    finish: bool = True,
) -> Path:
    """Write a study of one run a method, regime and seed, whose accuracies are ``curve(regime, method, seed)``."""
    regimes = dict(zip(("small", "large"), batch_sizes, strict=True))
    study = {
        "name": "by-hand",
        "title": "A study by hand",
        "epochs": len(curve("small", methods[0], seeds[0])),
        "seeds": list(seeds),
        "regimes": {name: {"batch_size": size} for name, size in regimes.items()},
        "settings": settings or {"vgg": {"model": {"name": "vgg"}, "data": {"name": data.name}}},
        "methods": {method: {} for method in methods},
    }
    points = []
    for setting in study["settings"]:
        for regime, size in regimes.items():
            for method in methods:
                for seed in seeds:
                    epochs = curve(regime, method, seed)
                    config = Config(
                        model=VGG(),
                        data=data,
                        method=METHODS.get(method, Spectral()),
                        batch_size=size,
                        learning_rate=0.1,
                        epochs=len(epochs),
                        seed=seed,
                    )
                    name = f"{setting}-{regime}-{method}-{seed}"
                    points.append({"setting": setting, "regime": regime, "method": method, "seed": seed, "run": name})
                    run = store.RunFolder(folder / "runs" / name)
                    run.path.mkdir(parents=True)
                    run.begin(config, VERSIONS)
                    for epoch, (train, test) in enumerate(epochs, start=1):
                        accuracies = {"epoch": epoch, "train_accuracy": train, "test_accuracy": test, "seconds": 1.0}
                        run.append(accuracies | line(regime, method, seed, epoch))
                    if finish:
                        run.end("finished")
                    if measures is not None:
                        store.write_json(run.path / store.MEASURES, measures(regime, method, seed))
    store.begin_study(folder, study, points, "spectreg reproduce by-hand.toml")
    return folder


def lose(folder: Path, run: str) -> None:
    """Take a run away, as though it had never begun."""
    for file in (folder / "runs" / run).iterdir():
        file.unlink()


def fail(folder: Path, run: str, cause: str) -> None:
    """Record a run as failed."""
    store.write_json(folder / "runs" / run / store.OUTCOME, {"status": "failed", "error": cause})


def age(folder: Path, run: str) -> None:
    """Mark a run as written by another format version."""
    path = folder / "runs" / run / store.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
