"""The limits of a power step, in one run: 1 thread, 2 threads, and 2 threads beside a busy process on each core.

python -m benchmarks.core [FOLDER]      writes core.json and core.md there, by default into results/
"""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import penalties as by
from benchmarks.harness import RESULTS, origin

ROUNDS = 15
SETTINGS = {
    "whole steps": ({}, 1.45), "half steps": ({"steps": 0.5}, 1.08), "k=4": ({"k": 4}, 3.5),
    "tracked=4": ({"tracked": 4}, 2.5), "tracked=8, half steps": ({"tracked": 8, "steps": 0.5}, None),
}  # fmt: skip
MODELS = {
    "6 × 4096²": (6, 4096, torch.float32), "6 × 4096² in bf16": (6, 4096, torch.bfloat16),
    "10 × 1024²": (10, 1024, torch.float32), "40 × 160²": (40, 160, torch.float32),
}  # fmt: skip


def busy(stop: float) -> None:
    while time.time() < stop:
        sum(i * i for i in range(1000))


@contextmanager
def company(processes: int) -> Iterator[None]:
    """So many processes that do nothing but count."""
    others = [multiprocessing.Process(target=busy, args=(time.time() + 3600,)) for _ in range(processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()


def measure(count: int, size: int, dtype: torch.dtype, rounds: int = ROUNDS) -> dict[str, float]:
    """Wall seconds of the floor, and of each setting the median ratio to it, all in turn."""
    torch.manual_seed(0)
    model = by.with_gradients(nn.Sequential(*[nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)]))
    calls = {name: by.ready(model, warmup=1, **settings).add_gradient for name, (settings, _) in SETTINGS.items()}
    weights = by.matrices(model)
    calls["floor"] = by.floor(weights)
    if dtype == torch.float32:
        calls["bare torch calls"] = by.bare(weights, [torch.randn(size) / size**0.5 for _ in weights])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    ratios = {n: statistics.median(a / b for a, b in zip(t, times["floor"], strict=True)) for n, t in times.items()}
    return ratios | {"floor": statistics.median(times["floor"])}


def main(folder: Path = RESULTS.parent, rounds: int = ROUNDS) -> None:
    circumstances = {"1 thread": (1, 0), "2 threads": (2, 0), "2 threads, 2 busy processes": (2, 2)}
    rows: list[dict[str, Any]] = []
    for where, (threads, others) in circumstances.items():
        torch.set_num_threads(threads)
        with company(others):
            for case, model in MODELS.items():
                rows.append({"where": where, "case": case, **measure(*model, rounds=rounds)})
                print(rows[-1], flush=True)
    (folder / "core.json").write_text(json.dumps({"rows": rows, **origin()}, indent=1) + "\n")
    names = [*SETTINGS, "bare torch calls"]
    limits = {name: f"{name} (≤ {limit})" for name, (_, limit) in SETTINGS.items() if limit}
    head = ["circumstances", "weights", "floor, ms", *(limits.get(name, name) for name in names)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        numbers = (f"{row[name]:.2f}" if name in row else "" for name in names)
        lines.append([str(row["where"]), str(row["case"]), f"{1e3 * float(row['floor']):.2f}", *numbers])
    (folder / "core.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main(*(Path(folder) for folder in sys.argv[1:2]))
