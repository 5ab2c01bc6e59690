"""Everything that only a GPU can tell, in ten minutes: is it right, what does it cost, the paper's VGG, the measures.

python -m benchmarks.gpu [--data FOLDER]            on the first CUDA device
python -m benchmarks.gpu --device cpu --quick       whether the command itself works, in minutes

Needs torch and spectreg's own dependencies; no network. FOLDER holds the JPEG CIFAR-10 as train*.parquet and
test*.parquet, which pyarrow and pillow read; without it a synthetic stand-in is used, and said. Each line of
results/gpu.jsonl is written as it is known, so that a cut loses only what was to come; docs/gpu.md is made of them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from benchmarks import gpu_checks, gpu_cost, gpu_training
from benchmarks.gpu_networks import Pictures, pictures

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "gpu.jsonl", ROOT / "docs" / "gpu.md"
BUDGETS = {"right": 60, "cost": 150, "slice": 300, "measures": 60}  # seconds
QUICK = {"right": 60, "cost": 60, "slice": 20, "measures": 20}
INTRODUCTION = """# On a GPU

Made by `make gpu` (`python -m benchmarks.gpu`) on one CUDA device: ten minutes, no network. Its parts, in order of
worth: whether every form of the penalty computes what the CPU does in float64; what it adds to a training step; the
paper's VGG on 50,000 images, for as many epochs as the time allows; the measures beside the CPU's values.
`make gpu DATA=FOLDER` names the folder with the parquet files of the JPEG CIFAR-10; without it the images are a
synthetic stand-in, and the lines say so.
"""


def right(device: torch.device, end: float) -> Iterator[dict[str, Any]]:
    """Each check, passed or not."""
    checks = gpu_checks.checks() | (gpu_checks.CUDA_ONLY if device.type == "cuda" else {})
    for name, check in checks.items():
        label = {"what": "right", "case": name}
        if time.monotonic() > end:
            yield label | {"skipped": "the part's time was up"}
            continue
        try:
            check(device)
        except Exception as error:
            yield label | {"failed": f"{type(error).__name__}: {error}"[:300]}
        else:
            yield label | {"passed": True}


def cost(device: torch.device, end: float, quick: bool) -> Iterator[dict[str, Any]]:
    """What each way adds to a step of each network."""
    for case in gpu_cost.cases(quick):
        if time.monotonic() > end:
            yield {"what": "cost", "case": f"{case.name}, B={case.batch}", "skipped": "the part's time was up"}
            continue
        try:
            yield from gpu_cost.compare(case, device, quick, end)
        except Exception as error:
            yield {"what": "cost", "case": f"{case.name}, B={case.batch}", "failed": f"{type(error).__name__}: {error}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def parts(device: torch.device, data: Pictures, quick: bool, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of the parts that are wanted, each within its time."""
    for part in wanted:
        end = time.monotonic() + (QUICK if quick else BUDGETS)[part]
        if part == "right":
            yield from right(device, end)
        elif part == "cost":
            yield from cost(device, end, quick)
        elif part == "slice":
            yield from gpu_training.a_slice(data, end, quick)
        else:
            yield from gpu_training.measures(data, quick)


def origin(device: torch.device) -> dict[str, Any]:
    """Device, driver, torch and commit."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    name, driver = "the CPU", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    commit = said("git", "rev-parse", "--short=12", "HEAD")
    return {"device": name, "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__, "commit": commit}


def page(lines: list[dict[str, Any]]) -> str:
    """The page of these lines; that nothing has run yet, where there are none from a GPU."""
    lines = [line for line in lines if line["cuda"] and line["device"] != "the CPU"]
    if not lines:
        return f"{INTRODUCTION}\n**Not run yet**: no GPU has run any of it. The command itself is tested on a CPU.\n"
    where = sorted({"{device}, driver {driver}, torch {torch}, commit {commit}".format(**line) for line in lines})
    text = [INTRODUCTION, *(f"- {place}" for place in where)]
    for what in dict.fromkeys(line["what"] for line in lines):
        text += ["", f"## {what.capitalize()}", "", "| case | |", "|---|---|"]
        text += [f"| {_case(line)} | {_numbers(line)} |" for line in lines if line["what"] == what]
    return "\n".join(text) + "\n"


def _case(line: dict[str, Any]) -> str:
    return f"{line['case']}, {line['way']}" if "way" in line else str(line["case"])


def _numbers(line: dict[str, Any]) -> str:
    left = {"what", "case", "way", "device", "driver", "cuda", "torch", "commit", "when", "quick"}
    shown = []
    for key, value in line.items():
        if key in left:
            continue
        if key == "sigma":
            key, value = "largest σ", max(value.values())
        number = f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
        shown.append(f"{key.replace('_', ' ')} {number}")
    return "; ".join(shown)


def read(results: Path) -> list[dict[str, Any]]:
    """The lines on record; one that was cut short ends them."""
    found: list[dict[str, Any]] = []
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def main(words: list[str] | None = None) -> int:
    """Run the parts; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks: whether the command works")
    parser.add_argument("--data", type=Path, help="folder of the JPEG CIFAR-10's parquet files")
    parser.add_argument("--parts", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--out", type=Path, help="file of lines [results/gpu.jsonl; none with --quick]")
    given = parser.parse_args(words)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device is here: `--device cpu --quick` tries the command without one\n")
    device, start, failed = torch.device(given.device), time.monotonic(), 0
    results = given.out or (None if given.quick else RESULTS)
    sizes = (512, 256) if given.quick else (50_000, 10_000)
    data = pictures(given.data, sizes, device)
    about = origin(device) | {"quick": given.quick}
    for line in parts(device, data, given.quick, given.parts):
        failed += "failed" in line
        print(f"{time.monotonic() - start:5.0f} s  {line['what']}: {_case(line)}: {_numbers(line)}", flush=True)
        if results is not None:
            results.parent.mkdir(exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(line | about | {"when": time.time()}, ensure_ascii=False) + "\n")
    if not given.quick:
        PAGE.write_text(page(read(RESULTS)))
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
