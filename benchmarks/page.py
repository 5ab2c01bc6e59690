"""docs/benchmarks.md, what users ask, and results/benchmarks.md, every row: both from results/benchmarks*.jsonl.

python -m benchmarks.page       writes both anew from the lines that are there
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import core
from benchmarks.harness import RESULTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
EVERY_ROW = ROOT / "results" / "benchmarks.md"
PLOT = "benchmarks.svg"
Line = dict[str, Any]

SHORT = """# Benchmarks

What the regularizer costs, beside the floor of any gradient penalty (one read of each weight, one read and write of
its gradient), and beside other ways to the same end. Everything is timed in turn, A B A B …, in one process; a number
is the median.

## A power step

Multiples of the floor, and per cent of a step of 64 examples; **bold**: the limit is missed.
`python -m benchmarks.core`, torch {torch}, {machine}, commit {commit:.7};
every row in `results/core.md`.

{core}
Of sharded weights: the time beside that of gathering each, and the collectives of a step. Beside busy processes threads
wait for each other, so a whole step multiplies on one thread, as bfloat16 is converted. A step makes 3 calls of torch a
weight, and 28 for all together; 15 were the aim.

## Beside others

Measured **before the power step was rewritten**, each column at its commit, on one thread. Every row, with quartiles
and the reason for each missed limit: `results/benchmarks.md`; `make benchmarks` takes about 25 minutes.

{asked}

![Time against error](benchmarks.svg)

*The norm of a convolution itself, by every way to it.*
"""
ASKED = {  # what a step of the VGG at B = 64 takes longer: the beginning of the case, and the subject
    "VGG-16, B = 64, `every=8`": ("VGG: by itself", "every=8"),
    "follow the norms, `strength=0`": ("VGG: by itself", "strength=0"),
    "log σ, residual and stable rank of all weights, once": ("VGG: by itself", "log()"),
    "the floor": ("VGG: by itself", "floor"),
    "the same penalty by autograd": ("VGG: whole steps of B=2", "autograd penalty"),
    "torch's `spectral_norm`": ("VGG: whole steps of B=2", "torch's spectral_norm"),
    "an exact SVD of each weight": ("VGG: by itself", "SVD penalty"),
}
FULL = """# Every row of the benchmarks

How to read a row: both sides are timed in turn, A B A B …, n rounds after warm-up. The value is the median of the
paired ratios or differences, followed by its quartiles. In **×** it is ours over the other's: below 1 ours is faster;
where the limit is a least value, it is theirs over ours. Times are of the processor, on one thread, unless a row says
wall time; the allocator keeps the memory that is freed. Rows marked ◄ are those where the other side is ahead or a
limit is missed, with the reason. What each benchmark does stands at the top of its file in `benchmarks/`. Rows of older
commits that are no longer measured stay as they were.
"""


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def value(line: Line) -> str:
    return "did not run" if line["value"] is None else f"{number(line['value'])} {line['unit']}"


def limit(line: Line) -> str:
    if line["met"] is None:
        return ""
    bound = f"≤ {number(line['at_most'])}" if line["at_least"] is None else f"≥ {number(line['at_least'])}"
    return f"{bound}: {'met' if line['met'] else '**missed**'}"


def limits(lines: Sequence[Line]) -> str:
    """How many rows meet their limits, and those that do not."""
    limited = [line for line in lines if line["met"] is not None]
    missed = [line for line in limited if not line["met"]]
    rows = [f"- {x['case']}, {x['subject']} beside {x['against']}: {value(x)}, {limit(x)}\n" for x in missed]
    return f"{len(limited) - len(missed)} of {len(limited)} limits are met.\n\n{''.join(rows)}"


def table(lines: Sequence[Line]) -> str:
    """Every row; a case is named where it begins."""
    rows = ["| what | beside | median | quartiles | n | limit | remark | commit |", "|---|---|---|---|---|---|---|---|"]
    for before, line in zip([None, *lines], lines, strict=False):
        if before is None or line["case"] != before["case"]:
            rows.append(f"| **{line['benchmark']}: {line['case']}** | | | | | | | |")
        spread = "" if line["low"] is None else f"{number(line['low'])} to {number(line['high'])}"
        error = "" if line["error"] is None else f"error {line['error']:+.1e}"
        why = f"◄ {line['why']}" if line["behind"] or line["met"] is False else ""
        remark = "; ".join(filter(None, (error, line["note"], why)))
        cells = [line["subject"], line["against"], value(line), spread, str(line["rounds"]), limit(line), remark]
        rows.append(f"| {' | '.join(cells)} | {line['commit'][:7]} |")
    return "\n".join(rows) + "\n"


def origin(lines: Sequence[Line]) -> str:
    """The commits, machines and peers of a record."""
    commits: dict[str, list[str]] = {}
    for line in lines:
        peers = ", ".join(f"{name} {version}" for name, version in line["peers"].items())
        place = f"torch {line['torch']}, {line['threads']} thread(s), {line['machine']}; {peers}"
        commits.setdefault(place, []).append(line["commit"][:7])
    return "".join(f"- {', '.join(dict.fromkeys(found))}: {place}\n" for place, found in commits.items())


def every_row(records: dict[str, list[Line]]) -> str:
    parts = [FULL]
    for name, lines in records.items():
        parts += [f"## `results/{name}`\n", origin(lines), limits(lines), table(lines)]
    return "\n".join(parts)


def answer(lines: Sequence[Line], case: str, subject: str) -> str:
    """What the first row of that case and subject adds to a step; a dash where a record has none."""
    own = (x for x in lines if x["case"].startswith(case) and x["subject"] == subject and x["unit"] == "% of a step")
    row = next(own, None)
    return "–" if row is None else f"{row['value']:+.{1 if row['value'] >= 1 else 2}f} %"


def asked(records: Sequence[Sequence[Line]]) -> str:
    """What users ask and a record answers, a column for each record."""
    steps = [[line for line in lines if line["case"].startswith("VGG:")] or lines for lines in records]
    heads = [f"{x[-1]['machine'].removeprefix('Linux x86_64, ')} ({x[-1]['commit'][:7]})" for x in steps]
    rows = [[words, *(answer(lines, *of) for lines in records)] for words, of in ASKED.items()]
    table = [["How much longer is a step with it?", *heads], ["---"] * (1 + len(heads)), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table if set(row[1:]) != {"–"})


FAMILIES = {"spectreg, warm": "C0", "spectreg, cold": "C1", "spectreg, certified": "C2", "FFT and SVD": "C3",
            "power iteration": "C7", "Gram iteration": "C8"}  # fmt: skip


def plot(lines: Sequence[Line], path: Path) -> None:
    """Norms of convolutions: time against error, a panel for each number of channels."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spectreg"
    from matplotlib import pyplot as plt

    points = [line for line in lines if line["against"] == "truth" and line["unit"] == "ms" and line["value"]]
    cases = list(dict.fromkeys(line["case"] for line in points)) or ["nothing measured"]
    figure, axes = plt.subplots(1, len(cases), figsize=(3.0 * len(cases), 3.4), squeeze=False, sharex=True, sharey=True)
    for ax, case in zip(axes[0], cases, strict=True):
        for line in (line for line in points if line["case"] == case):
            color = next(color for family, color in FAMILIES.items() if line["subject"].startswith(family))
            error, marker = max(abs(line["error"]), 1e-6), "^" if line["error"] > 1e-6 else "v"
            ax.loglog([error], [line["value"]], marker, color=color, alpha=0.85)
        ax.set_title(case, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    figure.supxlabel("relative error (10⁻⁶ or less at the left edge); ▼ estimate from below, ▲ upper bound", fontsize=9)
    handles = [plt.Line2D([], [], linestyle="", marker="o", color=c, label=f) for f, c in FAMILIES.items()]
    figure.legend(handles=handles, ncols=len(FAMILIES), fontsize=8, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(results: Path = RESULTS, target: Path = PAGE, full: Path = EVERY_ROW) -> None:
    """Both pages and the plot, from the lines."""
    older = sorted(results.parent.glob("benchmarks-*.jsonl"))
    records = {path.name: read(path) for path in (results, *older)}
    measured = json.loads(RESULTS.with_name("core.json").read_text())
    rows = core.table(measured["rows"], every=False)
    plot(records[results.name], target.with_name(PLOT))
    target.write_text(SHORT.format(**measured, core=rows, asked=asked(list(records.values()))))
    full.write_text(every_row(records))


if __name__ == "__main__":
    write()
