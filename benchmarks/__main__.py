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

from benchmarks import page
from benchmarks.harness import RESULTS, THREADS, failed, record

NAMES = ("step", "alone", "small_weights", "convolution_norm", "measures", "loop", "sharded")


def title(name: str) -> str:
    return importlib.import_module(f"benchmarks.{name}").NAME


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
    """Drop the lines that are about to be measured again."""
    if RESULTS.exists():
        lines = RESULTS.read_text().splitlines(keepends=True)
        RESULTS.write_text("".join(line for line in lines if json.loads(line)["benchmark"] not in titles))


def main(names: list[str]) -> int:
    if names[:1] == ["--here"]:
        run(names[1])
        return 0
    names = names or list(NAMES)
    environment = os.environ | {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "MKL", "OPENBLAS")}
    print(f"torch {torch.__version__}, {THREADS} thread(s), load {os.getloadavg()}", flush=True)
    forget({title(name) for name in names})
    worst = 0
    for name in names:
        start = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks", "--here", name]
        worst = max(worst, abs(subprocess.run(command, env=environment, check=False).returncode))
        print(f"--- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    page.write()
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
