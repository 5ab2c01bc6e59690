"""Where a number comes from: versions, machine, commit and command."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("spectreg", "torch", "numpy", "lightning-fabric", "datasets")


def command() -> str:
    """The command line of this process, with the program's name instead of its place."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def describe(device: str, threads: int) -> dict[str, str]:
    """What a run's folder says of the process that made it."""
    return {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        "device": device,
        "threads": str(threads),
        "command": command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of the source this runs from, marked where it was changed since; ``unknown`` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" (changed)" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
