"""Run benchmarks, each in a process of its own, and write the page.

python -m benchmarks [NAME …]       all of them by default; lines of those that run are replaced
"""

import importlib
import json
import os
import subprocess
import sys
import time

import torch

from benchmarks import LIMIT, NAMES, page
from benchmarks.harness import RESULTS, THREADS, Row, failed, record

NAME = "the benchmarks themselves"
# One thread; and glibc keeps what is freed, as the allocator of a GPU does. Otherwise each step of a network gives its
# memory back and takes it again, and the page faults, tens of thousands a step, vary by more than a penalty costs.
ENVIRONMENT = {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "MKL", "OPENBLAS")} | {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "KINETO_LOG_LEVEL": "99",
}


def run(name: str) -> None:
    """One benchmark in this process; if it fails, a row that says so."""
    torch.set_num_threads(THREADS)
    module = importlib.import_module(f"benchmarks.{name}")
    try:
        module.main()
    except Exception as error:
        record(failed(module.NAME, "all that follows", "spectreg", "peers", error))
        raise


def forget(titles: set[str]) -> None:
    """Drop the lines that are about to be measured again, and how long these took."""
    if RESULTS.exists():
        lines = [(line, json.loads(line)) for line in RESULTS.read_text().splitlines(keepends=True)]
        old = {line for line, row in lines if (row["case"] if row["benchmark"] == NAME else row["benchmark"]) in titles}
        RESULTS.write_text("".join(line for line, _ in lines if line not in old))


def main(names: list[str]) -> int:
    if names[:1] == ["--here"]:
        run(names[1])
        return 0
    names = names or list(NAMES)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    forget({module.NAME for module in modules.values()} | ({"all"} if len(names) == len(NAMES) else set()))
    print(f"torch {torch.__version__}, {THREADS} thread(s), load {os.getloadavg()}", flush=True)
    worst, begin, left = 0, time.time(), sum(module.SECONDS for module in modules.values())
    for name, module in modules.items():
        print(f"--- {name}: some {module.SECONDS} s; with what follows {left / 60:.1f} min", flush=True)
        start = time.time()
        environment = os.environ | ENVIRONMENT | {"SPECTREG_BENCHMARKS_END": str(start + left)}
        command = [sys.executable, "-m", "benchmarks", "--here", name]
        worst = max(worst, abs(subprocess.run(command, env=environment, check=False).returncode))
        left -= module.SECONDS
        record(Row(NAME, module.NAME, "took", "", "s", time.time() - start, note=f"budget {module.SECONDS} s"))
    if len(names) == len(NAMES):
        goal = f"`make benchmarks` within {LIMIT // 60} minutes"
        record(Row(NAME, "all", "took", "", "s", time.time() - begin, goal=goal, at_most=LIMIT))
    page.write()
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
