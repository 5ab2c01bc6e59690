"""The limits of a power step, in one run: 1 thread, 2 threads, and 2 threads beside a busy process on each core.

python -m benchmarks.core [FOLDER]      writes core.json and core.md there, by default into results/

The floor is one read of each weight (Wv) and one read and write of its gradient. All calls take turns; a row is the
median of the ratios of each round. Of networks, it is what a step takes longer with the penalty, in steps of few
examples, where it stands out, in per cent of a step of 64 examples. Sharded weights are two processes on one machine.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import penalties as by
from benchmarks import sharded, step
from benchmarks.harness import RESULTS, Call, differences, in_turn, origin

ROUNDS = 9
WHERE = {"1 thread": (1, 0), "2 threads": (2, 0), "2 threads, 2 busy processes": (2, 2)}
SETTINGS: dict[str, dict[str, Any]] = {
    "whole steps": {}, "half steps": {"steps": 0.5}, "k=4": {"k": 4}, "tracked=4": {"tracked": 4},
    "tracked=8, half steps": {"tracked": 8, "steps": 0.5},
}  # fmt: skip
MODELS = {
    "100 M in 6 × 4096²": (6, 4096, torch.float32), "1 G in 60 × 4096²": (60, 4096, torch.float32),
    "100 M of bf16": (6, 4096, torch.bfloat16), "10 × 1024²": (10, 1024, torch.float32),
    "40 × 160²": (40, 160, torch.float32),
}  # fmt: skip
LARGE = {"whole steps": 1.45, "half steps": 1.08, "k=4": 3.5, "tracked=4": 2.5}
LIMITS = {
    "100 M in 6 × 4096²": LARGE, "1 G in 60 × 4096²": LARGE, "100 M of bf16": {"whole steps": 1.45},
    "40 × 160²": {"ms more than bare calls": 1.0}, "VGG": {"whole steps, %": 1.2, "half steps, %": 1.0},
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


def beside_floor(case: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Wall seconds of the floor, and of each setting the median ratio to it."""
    count, size, dtype = MODELS[case]
    model = by.linears(count, size, dtype)
    settings = SETTINGS if count < 60 else {name: SETTINGS[name] for name in LARGE}
    calls: dict[str, Call] = {name: by.ready(model, warmup=1, **kw).add_gradient for name, kw in settings.items()}
    weights = by.matrices(model)
    calls["floor"] = by.floor(weights)
    if dtype == torch.float32:
        calls["bare torch calls"] = by.bare(weights, [torch.randn(size) / size**0.5 for _ in weights])
    times = in_turn(calls, rounds if count < 60 else 3, 1, clock=time.perf_counter)
    middle = {n: statistics.median(t) for n, t in times.items()}
    ratios = {n: statistics.median(a / b for a, b in zip(t, times["floor"], strict=True)) for n, t in times.items()}
    more = {"ms more than bare calls": 1e3 * (middle["whole steps"] - middle.get("bare torch calls", 0.0))}
    return ratios | {"floor": middle["floor"]} | (more if case == "40 × 160²" else {})


def of_a_step(name: str, rounds: int = 2 * ROUNDS) -> dict[str, float]:
    """What whole and half steps add, in per cent of a step of 64 examples, and the wall seconds of such a step."""
    torch.manual_seed(0)
    network = step.NETWORKS[name]
    model = by.with_gradients(network.make()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y, few = torch.randn(64, *network.shape), torch.randint(10, (64,)), network.decides
    whole = step.whole_steps(model, x, y, (), 3, warmup=1, clock=time.perf_counter)["vanilla"]
    ways = (step.OURS, "half steps")
    extra = differences(step.whole_steps(model, x[:few], y[:few], ways, rounds, clock=time.perf_counter))
    seconds = statistics.median(whole)
    percent = {n: 100 * statistics.median(t) / seconds for n, t in extra.items()}
    return {"whole steps, %": percent[step.OURS], "half steps, %": percent["half steps"], "step": seconds}


def beside_gathering() -> dict[str, float]:
    """Of eight weights of 1024² that two processes share: the ratio to gathering each, and the collectives."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(sharded.on_rank, (2, folder), nprocs=2)
        found = json.loads(Path(folder, "found.json").read_text())
    ours, theirs = found["times"]["add_gradient"], found["times"][sharded.GATHER]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {"beside gathering": ratio, "collectives": found["counts"]["add_gradient"]["collectives"]}


def table(rows: list[dict[str, Any]], every: bool = True) -> str:
    """What was measured beside each limit, a column for each of the circumstances; what is missed is bold.

    Unless ``every``, floors' multiples and half steps without a limit are left out.
    """
    lines = [["", "limit", *WHERE], ["---"] * (2 + len(WHERE))]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = {row["where"]: row for row in rows if row["case"] == case}
        for name in dict.fromkeys(key for row in own.values() for key in row if key not in ("where", "case", "step")):
            limit = LIMITS.get(case, {}).get(name)
            if not (every or limit) and (case in MODELS or name.startswith("half")):
                continue
            cells = [shown(own.get(where, {}).get(name), name, limit) for where in WHERE]
            lines.append([f"{case}, {name}", f"≤ {limit}" if limit else "", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(number: float | None, name: str, limit: float | None) -> str:
    if number is None:
        return ""
    text = f"{1e3 * number:.2f} ms" if name == "floor" else f"{number:.2f}"
    return f"**{text}**" if limit and number > limit else text


def main(folder: Path = RESULTS.parent, rounds: int = ROUNDS) -> None:
    rows: list[dict[str, Any]] = []

    def note(where: str, case: str, numbers: dict[str, float]) -> None:
        rows.append({"where": where, "case": case, **numbers})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        (folder / "core.json").write_text(json.dumps({"rows": rows, **origin()}, indent=1, ensure_ascii=False) + "\n")
        (folder / "core.md").write_text(table(rows))

    for where, (threads, others) in WHERE.items():
        torch.set_num_threads(threads)
        with company(others):
            for case in MODELS:
                note(where, case, beside_floor(case, rounds))
            note(where, "VGG", of_a_step("VGG", (5 if others else 2) * rounds))
    torch.set_num_threads(1)
    for network in ("transformer 4 × 256", "NIN", "DenseNet", "MLP 5 × 1024"):
        note("1 thread", network, of_a_step(network))
    note("1 thread", "sharded", beside_gathering())


if __name__ == "__main__":
    main(*(Path(folder) for folder in sys.argv[1:2]))
