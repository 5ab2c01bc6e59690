"""docs/benchmarks.md from results/benchmarks.jsonl: a table for each benchmark and one plot.

python -m benchmarks.page       writes the page anew from the lines that are there
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = "benchmarks.svg"
Line = dict[str, Any]

INTRODUCTION = """# Benchmarks

What spectreg costs beside its peers and beside the hardware's floor, made by `make benchmarks` from
`results/benchmarks.jsonl`. Each row is timed A B A B …; shown are the median of the paired ratios and its quartiles.
Times are of the processor, one thread, unless a row says wall time. The floor of a gradient penalty is one read of
each weight and one read-modify-write of its gradient. Both sides compute the same quantity, up to the error shown.
"""

REASONS = """## Where a goal is missed or a peer is ahead, and why

- **MLP, what is added.** Beyond the floor's one read, a whole power step reads each weight a second time, from cache:
  in bare torch calls, without a check of any kind, that is 1.2 to 1.4 × the floor. The rest is about a millisecond
  for all weights together, whatever their number: normalising, slopes, the look whether a weight has moved, with caches
  swept. Half steps (`steps=0.5`) read once; from 100 M parameters on the millisecond no longer counts.
- **VGG in whole steps.** What is timed from within a step overstates torch's `spectral_norm` (two and a half times on
  the MLP, twice on the VGG), for a reason not found; for it the whole steps count. There the quartiles of VGG's
  steps are as wide as the effect, so that they neither confirm nor refute what is timed from within.
- **Peak memory.** Resident memory of the process: what torch frees and takes again does not show, so 0 is a lower
  bound. In weights of 160² the vectors and their work space are an eighth of the weights: no goal holds there.
- **bf16.** The vectors are float32 and the weight is converted piece by piece; the floor stays in bf16 throughout.
- **Transformer, beside the autograd penalty.** That takes the packed query, key and value weight for one matrix; ours
  keeps a vector for each of the three, so it forms more and smaller products.
- **Norm of a convolution, cold.** The kernels are Gaussian: their largest singular values lie close together, and
  Lanczos needs 25 to 60 products of two convolutions each, while FFT and SVD do not care. On top of them comes the
  certificate `upper`, in float64: for 512 channels more than half of the time. Warm, as in training, one step does.
- **All singular values.** Ours are in float64 and good to 1e-14 of σ₁, NumPy's in float32.
- **The 4 largest beside svds.** Both do Lanczos; ours runs to a smaller error.
- **Jacobian norm by power iteration** loses to the formed Jacobian wherever outputs are few, which is why the default
  forms it there.
- **torch's weight decay** needs no vectors: it is one pass over the weights, inside the optimizer's own.
- **Many small weights beside torch calls by hand.** The hand-written calls check nothing and keep no float64 sums.
"""


def read(path: Path = RESULTS) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def goal(line: Line) -> str:
    bounds = [
        f"{sign} {number(line[key])}" for sign, key in (("≤", "at_most"), ("≥", "at_least")) if line[key] is not None
    ]
    return f"{' '.join(bounds)}: {'met' if line['met'] else '**missed**'}" if bounds else ""


def table(lines: Sequence[Line]) -> str:
    rows = [
        "| case | what | beside | median | quartiles | n | goal | error, remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        spread = "" if line["low"] is None else f"{number(line['low'])} to {number(line['high'])}"
        value = "did not run" if line["value"] is None else f"{number(line['value'])} {line['unit']}"
        error = "" if line["error"] is None else f"{line['error']:+.1e}"
        remark = "; ".join(part.replace("|", "¦") for part in (error, line["note"]) if part)
        cells = (line["case"], line["subject"], line["against"], value, spread, str(line["rounds"]), goal(line), remark)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def origin(lines: Sequence[Line]) -> str:
    """What the lines of a benchmark have in common."""
    first = lines[0]
    said = [f"torch {first['torch']}", f"{first['threads']} thread(s)", first["machine"], f"commit {first['commit']}"]
    load = max(line["load"] for line in lines)
    return f"{', '.join(said)}, from {first['started']}; load of the machine up to {load:.1f}."


def page(lines: Sequence[Line]) -> str:
    """The whole page."""
    with_goal = [line for line in lines if line["met"] is not None]
    missed = [line for line in with_goal if not line["met"]]
    parts = [INTRODUCTION, f"![time against error]({PLOT})\n", "## Goals missed\n"]
    parts.append(f"{len(with_goal) - len(missed)} of {len(with_goal)} rows with a goal meet it. Those that do not:\n")
    parts.append(table(missed) + "\n" if missed else "None.\n")
    parts.append(REASONS)
    for title in dict.fromkeys(line["benchmark"] for line in lines):
        own = [line for line in lines if line["benchmark"] == title]
        parts += [f"## {title[0].upper()}{title[1:]}\n", origin(own) + "\n", table(own) + "\n"]
    return "\n".join(parts)


def plot(lines: Sequence[Line], path: Path) -> None:
    """Norms of convolutions: time against error, a panel for each number of channels."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spectreg"
    from matplotlib import pyplot as plt

    points = [line for line in lines if line["unit"] == "ms" and line["error"] is not None]
    cases = list(dict.fromkeys(line["case"] for line in points))
    figure, axes = plt.subplots(
        1, max(len(cases), 1), figsize=(4 * max(len(cases), 1), 3.6), squeeze=False, sharey=True
    )
    for ax, case in zip(axes[0], cases, strict=False):
        own = [line for line in points if line["case"] == case]
        for family in dict.fromkeys(line["subject"].split(", ")[0] for line in own):
            these = [line for line in own if line["subject"].split(", ")[0] == family]
            x, y = [max(abs(line["error"]), 1e-7) for line in these], [line["value"] for line in these]
            ax.loglog(x, y, "o", label=family)
        ax.set(title=case, xlabel="relative error")
    axes[0][0].set_ylabel("milliseconds")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(results: Path = RESULTS, target: Path = PAGE) -> None:
    """The page and its plot, from the lines."""
    lines = read(results)
    plot(lines, target.with_name(PLOT))
    target.write_text(page(lines))


if __name__ == "__main__":
    write()
