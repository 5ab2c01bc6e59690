"""docs/benchmarks.md, what users ask, and results/benchmarks.md, every row: both from results/benchmarks*.jsonl.

python -m benchmarks.page       writes both anew from the lines that are there
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import NAMES, core
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

{core}
"""
OLDER = """
## Beside others

Measured **before the power step was rewritten**, each column at the commit it names, on one thread. Every row, with
quartiles, goals, and the reason for each goal that is missed, is in `results/benchmarks.md`; `make benchmarks` measures
them anew in about 25 minutes.
"""
ASKED = {
    "How much longer is a step with it?": [
        ("VGG-16, B = 64, `every=8`", "VGG: by itself", "every=8"),
        ("the floor", "VGG: by itself", "floor"),
        ("the same penalty by autograd", "VGG: whole steps of B=2", "autograd penalty"),
        ("torch's `spectral_norm`", "VGG: whole steps of B=2", "torch's spectral_norm"),
        ("an exact SVD of each weight", "VGG: by itself", "SVD penalty"),
    ],
    "What does it cost to watch, and to log?": [
        ("follow the norms of the VGG, `strength=0`", "VGG: by itself", "strength=0"),
        ("log σ, residual and stable rank of all weights, once", "VGG: by itself", "log()"),
    ],
}
FULL = """# Every row of the benchmarks

How to read a row: both sides are timed in turn, A B A B …, n rounds after warm-up. The value is the median of the
paired ratios or differences, followed by its quartiles. In **×** it is ours over the other's: below 1 ours is faster;
where the goal is a least value, it is theirs over ours. Times are of the processor, on one thread, unless a row says
wall time; the allocator keeps the memory that is freed. Rows marked ◄ are those where the other side is ahead or a goal
is missed, with the reason.
"""


def read(path: Path = RESULTS) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def limit(line: Line) -> str:
    bounds = (("≤", "at_most"), ("≥", "at_least"))
    return " ".join(f"{sign} {number(line[key])}" for sign, key in bounds if line[key] is not None)


def value(line: Line) -> str:
    return "did not run" if line["value"] is None else f"{number(line['value'])} {line['unit']}"


def strain(line: Line) -> float:
    """How near a row is to its limit, or how far beyond: above 1 it is missed."""
    if line["value"] is None:
        return float("inf")
    if line["at_most"] is not None:
        return line["value"] / line["at_most"] if line["at_most"] else float(line["value"] > 0)
    return line["at_least"] / line["value"] if line["value"] else float("inf")


def title(text: str) -> str:
    return text[:1].upper() + text[1:]


def goals(lines: Sequence[Line]) -> str:
    """One row a goal: how many of its rows meet it, and the one that is the nearest to its limit or farthest beyond."""
    with_goal = [line for line in lines if line["met"] is not None]
    rows = ["| goal | | rows that meet it | hardest row |", "|---|---|---|---|"]
    names = dict.fromkeys(line["goal"] for line in with_goal)
    kept = 0
    for name in names:
        own = [line for line in with_goal if line["goal"] == name]
        met, hardest = sum(line["met"] for line in own), max(own, key=strain)
        kept += met == len(own)
        verdict = "met" if met == len(own) else "**missed**"
        case = f"{hardest['case']}: {value(hardest)} (limit {limit(hardest)})"
        rows.append(f"| {title(name)} | {verdict} | {met} of {len(own)} | {case} |")
    return f"{kept} of {len(names)} goals are met.\n\n" + "\n".join(rows)


def remark(line: Line) -> str:
    mark = ", ".join(["**goal missed**"] * (line["met"] is False) + ["peer ahead"] * line["behind"])
    why = f"◄ {mark}: {line['why'] or 'for a reason not known'}" if mark else ""
    error = "" if line["error"] is None else f"error {line['error']:+.1e}"
    return "; ".join(part.replace("|", "¦") for part in (error, line["note"], why) if part)


def table(lines: Sequence[Line]) -> Iterator[str]:
    """The rows of a benchmark; a case is named where it begins."""
    yield "| what | beside | median | quartiles | n | goal | remark |"
    yield "|---|---|---|---|---|---|---|"
    before = None
    for line in lines:
        if line["case"] != before:
            yield f"| **{line['case']}** | | | | | | |"
        before = line["case"]
        spread = "" if line["low"] is None else f"{number(line['low'])} to {number(line['high'])}"
        goal = "" if line["met"] is None else f"{limit(line)}: {'met' if line['met'] else '**missed**'}"
        cells = line["subject"], line["against"], value(line), spread, str(line["rounds"]), goal, remark(line)
        yield f"| {' | '.join(cells)} |"


def origin(lines: Sequence[Line]) -> str:
    """Where the lines of a benchmark come from."""
    seen = {(line["commit"], line["machine"], line["threads"], line["torch"]) for line in lines}
    said = [
        f"torch {torch}, {threads} thread(s), {machine}, commit {commit}" for commit, machine, threads, torch in seen
    ]
    load = max(line["load"] for line in lines)
    return f"{'; '.join(sorted(said))}; from {lines[0]['started']}; load of the machine up to {load:.1f}."


def about(benchmark: str) -> str:
    """What a benchmark says of itself."""
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        if benchmark == module.NAME:
            return f"{(module.__doc__ or '').strip()}\n"
    return ""


def elsewhere(folder: Path) -> Iterator[str]:
    """The goals as older records, of other machines, have them."""
    for path in sorted(folder.glob("benchmarks-*.jsonl")):
        lines = read(path)
        yield f"### On another machine, before\n\n`results/{path.name}`: {origin(lines)}\n\n{goals(lines)}\n"


def machine(lines: Sequence[Line], rows: Sequence[tuple[str, str, str]]) -> str:
    """What a record's answers in ``rows`` were measured on, for the head of a column."""
    last = next((x for x in reversed(lines) if any(x["case"].startswith(case) for _, case, _ in rows)), lines[-1])
    return f"{last['machine'].removeprefix('Linux x86_64, ').partition(' Processor')[0]} ({last['commit'][:7]})"


def answer(lines: Sequence[Line], case: str, subject: str) -> str:
    """The first row of that case and subject beside a step or the floor; a dash where a record has none."""
    beside = ("vanilla step", "floor")
    own = (x for x in lines if x["case"].startswith(case) and x["subject"] == subject and x["against"] in beside)
    row = next(own, None)
    if row is None or row["value"] is None:
        return "–"
    value = row["value"]
    return f"{value:.2f} ×" if row["unit"] == "×" else f"{value:+.{0 if value >= 10 else 1 if value >= 1 else 2}f} %"


def core_limits() -> str:
    """What `benchmarks.core` measured beside its limits, and where."""
    path = RESULTS.with_name("core.json")
    if not path.exists():
        return "Not measured."
    found = json.loads(path.read_text())
    where = f"torch {found['torch']}, {found['machine']}, commit {found['commit'][:7]}"
    said = "Multiples of the floor, and per cent of a step of 64 examples; **bold**: the limit is missed.\n"
    command = f"`python -m benchmarks.core`, {where};\nevery row in `results/core.md`."
    return f"{said}{command}\n\n{core.table(found['rows'], every=False)}"


def short(records: Sequence[Sequence[Line]]) -> str:
    """One screen: what users ask and a record answers, a column for each record."""
    parts = [SHORT.format(core=core_limits()), OLDER]
    for question, asked in ASKED.items():
        answers = {words: [answer(lines, *of) for lines in records] for words, *of in asked}
        rows = [f"| {words} | {' | '.join(each)} |" for words, each in answers.items() if set(each) != {"–"}]
        if rows:
            heads = " | ".join(machine(lines, asked) for lines in records)
            parts += [f"| {question} | {heads} |", "|---" * (1 + len(records)) + "|", *rows, ""]
    parts += [f"![Time against error]({PLOT})\n", "*The norm of a convolution itself, by every way to it.*\n"]
    return "\n".join(parts)


def page(lines: Sequence[Line]) -> str:
    """Every row."""
    parts = [FULL, "## Goals\n", goals(lines) + "\n", *elsewhere(RESULTS.parent)]
    for benchmark in dict.fromkeys(line["benchmark"] for line in lines):
        own = [line for line in lines if line["benchmark"] == benchmark]
        parts += [f"## {title(benchmark)}\n", about(benchmark), "\n".join(table(own)) + "\n", origin(own) + "\n"]
    peers = ", ".join(f"{name} {version}" for name, version in lines[-1].get("peers", {}).items())
    return "\n".join([*parts, f"Peers: {peers}.\n"])


FAMILIES = {"spectreg, warm": "C0", "spectreg, cold": "C1", "spectreg, certified": "C2", "FFT and SVD": "C3",
            "power iteration": "C7", "Gram iteration": "C8"}  # fmt: skip


def plot(lines: Sequence[Line], path: Path) -> None:
    """Norms of convolutions: time against error, a panel for each number of channels."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spectreg"
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    points = [line for line in lines if line["against"] == "truth" and line["error"] is not None]
    cases = list(dict.fromkeys(line["case"] for line in points)) or ["nothing measured"]
    columns = min(len(cases), 3)
    shape = -(-len(cases) // columns), columns
    figure, axes = plt.subplots(*shape, figsize=(3.6 * columns, 3.0 * shape[0] + 0.6), squeeze=False, sharex=True,
                                sharey=True)  # fmt: skip
    for ax, case in zip(axes.flat, cases, strict=False):
        for line in (line for line in points if line["case"] == case):
            family = next((f for f in FAMILIES if line["subject"].startswith(f)), None)
            x, marker = max(abs(line["error"]), 1e-6), "v" if line["error"] < 1e-6 else "^"
            ax.loglog([x], [line["value"]], marker, color=FAMILIES.get(family or "", "black"), alpha=0.85)
        ax.set_title(case, fontsize=10)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(cases) :]:
        ax.set_axis_off()
    for ax in axes.flat[max(len(cases) - columns, 0) : len(cases)]:
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds")
    figure.supxlabel("relative error (10⁻⁶ or less at the left edge); ▼ estimate from below, ▲ upper bound", fontsize=9)
    handles = [Line2D([], [], linestyle="", marker="o", color=c, label=f) for f, c in FAMILIES.items()]
    figure.legend(handles=handles, ncols=len(FAMILIES), fontsize=8, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(results: Path = RESULTS, target: Path = PAGE, full: Path = EVERY_ROW) -> None:
    """Both pages and the plot, from the lines."""
    lines = read(results)
    plot(lines, target.with_name(PLOT))
    target.write_text(short([lines, *map(read, sorted(results.parent.glob("benchmarks-*.jsonl")))]))
    full.write_text(page(lines))


if __name__ == "__main__":
    write()
