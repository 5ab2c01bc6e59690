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

from benchmarks import NAMES, page
from benchmarks.harness import RESULTS, THREADS, failed, record

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
        record(failed(module.NAME, "all that follows", "spectreg", error))
        raise


def forget(benchmark: str) -> None:
    """Drop the lines that are about to be measured again."""
    lines = RESULTS.read_text().splitlines(keepends=True)
    RESULTS.write_text("".join(line for line in lines if json.loads(line)["benchmark"] != benchmark))


def main(names: list[str]) -> int:
    if names[:1] == ["--here"]:
        run(names[1])
        return 0
    begin, worst = time.time(), 0
    for name in names or NAMES:
        print(f"--- {name}, after {(time.time() - begin) / 60:.1f} minutes", flush=True)
        forget(importlib.import_module(f"benchmarks.{name}").NAME)
        command = [sys.executable, "-m", "benchmarks", "--here", name]
        worst = max(worst, abs(subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode))
    print(f"--- {(time.time() - begin) / 60:.1f} minutes", flush=True)
    page.write()
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
