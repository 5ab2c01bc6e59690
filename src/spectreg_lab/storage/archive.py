"""A whole study in one compressed file: setting, versions, numbers and outcome of every run, without weights.

The file is gzipped JSON lines: the study first, then one line a run. Numbers are kept to seven significant digits,
which is what float32 holds. A report can be written from it, and `unpack` makes a study folder of it that
`spectreg reproduce` goes on with.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spectreg_lab.storage import checkpoints, numbers, records, run_folder, store
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.files import write
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.storage.store import RunRecord, StudyRecord

NAME = "runs.jsonl.gz"
DIGITS = 7


def export(folder: Path, file: Path) -> int:
    """Write the study in ``folder`` to ``file``; returns how many of its runs are finished.

    Raises:
        RunError: ``folder`` is not a study folder, or ``file`` would replace what is no export.
    """
    study = store.read_study(folder)
    _check_target(folder, file)
    head = {"format": checkpoints.FORMAT, "study": study.study, "search": study.search}
    lines = [head, *(_line(run, folder) for run in study.runs)]
    text = "".join(numbers.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    write(file, gzip.compress(text.encode(), mtime=0))
    return sum(run.status == "finished" for run in study.runs)


def read(path: Path) -> StudyRecord:
    """Read a study from its folder, or from a file that `export` wrote.

    Raises:
        RunError: there is no study in ``path``, or one of another format version.
    """
    if not path.is_file():  # a pipe or device might never end
        return store.read_study(path)
    packed = path.read_bytes()
    try:
        head, *runs = (json.loads(line) for line in gzip.decompress(packed).splitlines())
        if isinstance(head, dict) and head.get("format", checkpoints.FORMAT) != checkpoints.FORMAT:
            raise RunError(f"{path} has format {head['format']!r}; this version reads format {checkpoints.FORMAT}")
        records.Archive.model_validate(head)
        return StudyRecord(path.parent, head["study"], [_run(run) for run in runs], head["search"])
    except (EOFError, zlib.error, ValidationError, ValueError, RecursionError, gzip.BadGzipFile) as error:
        cause = records.first(error) if isinstance(error, ValidationError) else error
        raise RunError(f"{path} is not a study that `spectreg export` wrote ({cause})") from None


def unpack(file: Path, folder: Path) -> int:
    """Make a study folder of ``file``, with its finished runs; returns how many.

    Raises:
        RunError: ``file`` holds no study, or ``folder`` is there already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty: unpack into a new folder")
    study = read(file)
    finished = [run for run in study.runs if run.status == "finished"]
    for run in finished:
        _unpack_run(run, store.find_run(folder, run.folder.name))
    described = {key: value for key, value in study.study.items() if key != "command"}
    points = [
        {name: getattr(run, name) for name in ("setting", "regime", "method", "seed")} | {"run": run.folder.name}
        for run in study.runs
    ]
    store.begin_study(folder, described, points, study.study["command"])
    if study.search is not None:
        write(folder / store.SEARCH, study.search.encode())
    return len(finished)


def _check_target(folder: Path, file: Path) -> None:
    """An output never replaces an input."""
    study, place = folder.resolve(), file.parent.resolve() / file.name
    if place.is_relative_to(study) and place != study / NAME:
        raise RunError(
            f"{file} lies in the study folder, where an export is named {NAME}: leave it out, or use another"
        )
    if file.is_file() and file.stat().st_size and not _is_export(file):
        raise RunError(f"{file} is there already and is no earlier export, so it stays: give another name")


def _is_export(file: Path) -> bool:
    try:
        with gzip.open(file) as lines:
            records.Archive.model_validate_json(lines.readline())
    except (EOFError, zlib.error, ValidationError, gzip.BadGzipFile):
        return False
    return True


def _run(line: Any) -> RunRecord:
    if isinstance(line, dict):
        line |= {key: numbers.restored(line.get(key)) for key in ("metrics", "measures")}
    if fault := records.fault(records.ArchivedRun, line):
        name = line.get("folder") if isinstance(line, dict) else None
        raise ValueError(f"its run {name} {fault}" if name else f"a run in it {fault}")
    return RunRecord(**line | {"folder": Path(line["folder"])})


def _line(run: RunRecord, study: Path) -> dict[str, Any]:
    label = {"setting": run.setting, "regime": run.regime, "method": run.method, "seed": run.seed}
    cause = run.error and run.error.replace(f"{study}/", "")
    place = {"folder": run.folder.name, "status": run.status, "error": cause}
    numbers = {"metrics": _rounded(run.metrics), "measures": _rounded(run.measures)}
    return label | place | {"config": run.config, "versions": run.versions} | numbers


def _rounded(value: Any) -> Any:
    """``value`` with every number in it to seven significant digits.

    >>> _rounded({"sigma": [1.23456789, 2], "epoch": 3})
    {'sigma': [1.234568, 2], 'epoch': 3}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _unpack_run(run: RunRecord, path: Path) -> None:
    path.mkdir(parents=True)
    run_folder.write_json(path / run_folder.CONFIG, {"format": checkpoints.FORMAT, "config": run.config})
    run_folder.write_json(path / run_folder.VERSIONS, run.versions)
    if run.measures:
        run_folder.write_json(path / run_folder.MEASURES, run.measures)
    place = RunFolder(path)
    write(path / run_folder.METRICS, "".join(numbers.dumps(line) + "\n" for line in run.metrics).encode())
    place.end("finished")
