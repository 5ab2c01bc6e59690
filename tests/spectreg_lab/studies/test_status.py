"""What a study's folder alone tells of its runs."""

import json
import os
import time
from contextlib import ExitStack

import pytest
from folders import fail, foreign, lose, write_study
from rich.console import Console
from test_cli import in_process

from spectreg_lab.storage import claims
from spectreg_lab.storage.claims import claim
from spectreg_lab.storage.errors import RunError
from spectreg_lab.studies import display, status
from spectreg_lab.studies.status import Overview

METHODS = ("vanilla", "spectral")
VANILLA, SPECTRAL = "vgg-small-vanilla-0", "vgg-small-spectral-0"


@pytest.fixture
def folder(tmp_path):
    """Four finished runs of two epochs."""
    return write_study(tmp_path / "study", seeds=(0,), methods=METHODS)


def begin(folder, run, epochs=(), every=10.0):
    """Make a run one that has stored these epochs, so many seconds apart."""
    place = folder / "runs" / run
    (place / "outcome.json").unlink()
    for epoch in epochs:
        path = place / f"checkpoint-{epoch}.safetensors"
        path.touch()
        os.utime(path, (1e9 + every * epoch,) * 2)
    return place


def overview(folder):
    found = Overview(folder)
    found.refresh()
    return found


def shown(found):
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(display.picture(found))
    return console.export_text()


def test_each_run_is_in_the_state_that_its_folder_tells(folder):
    fail(folder, VANILLA, "NonFiniteLossError: epoch 3")
    lose(folder, SPECTRAL)
    running = begin(folder, "vgg-large-vanilla-0", [1])
    with claim(running):
        found = overview(folder)
        states = {run: row.state for run, row in found.rows.items()}
        assert states == {
            VANILLA: "failed",
            SPECTRAL: "waiting",
            "vgg-large-vanilla-0": "running",
            "vgg-large-spectral-0": "finished",
        }
        text = shown(found)
    assert "4 runs, 1 finished, 1 running, 1 waiting, 1 failed" in text
    assert "vgg small vanilla seed 0" in text
    assert "NonFiniteLossError: epoch 3" in text
    line = next(line for line in text.splitlines() if "vgg large vanilla seed 0" in line)
    assert "1/2" in line
    assert f"process {os.getpid()} on " in line


def test_the_time_left_is_that_of_the_epochs_left_shared_out_among_the_runs_that_are_running(folder):
    study = json.loads((folder / "study.json").read_text())
    study["study"]["epochs"] = 100
    (folder / "study.json").write_text(json.dumps(study))
    lose(folder, "vgg-large-spectral-0")
    lose(folder, "vgg-large-vanilla-0")
    with (
        claim(begin(folder, VANILLA, [19, 20], every=2.0)),
        claim(begin(folder, SPECTRAL, [8, 10], every=4.0)),
    ):
        found = overview(folder)
    rows = found.rows
    assert found.left_of(rows[VANILLA]) == pytest.approx(80 * 2.0)
    assert found.left_of(rows[SPECTRAL]) == pytest.approx(90 * 4.0)
    waiting = 2 * 100 * 3.0  # at the median of what is known of the other groups
    assert found.left() == pytest.approx((80 * 2.0 + 90 * 4.0 + waiting) / 2)


def test_a_run_that_nobody_has_seen_alive_for_long_is_waiting_and_not_running(folder, monkeypatch):
    monkeypatch.setattr(claims, "STALE", 0.1)
    place = begin(folder, VANILLA, [1])
    foreign(place)
    found = overview(folder)
    assert found.rows[VANILLA].state == "running"
    time.sleep(0.15)
    found.refresh()
    assert found.rows[VANILLA].state == "waiting"


def test_runs_beyond_what_a_screen_shows_are_counted(folder, monkeypatch):
    monkeypatch.setattr(display, "SHOWN", {"running": 1, "failed": 1})
    for run in (VANILLA, SPECTRAL):
        fail(folder, run, "NonFiniteLossError: epoch 3")
    with ExitStack() as claims_held:
        for run in ("vgg-large-vanilla-0", "vgg-large-spectral-0"):
            claims_held.enter_context(claim(begin(folder, run, [1])))
        text = shown(overview(folder))
    assert text.count("and 1 more") == 2
    assert text.count("NonFiniteLossError") == text.count("process ") == 1


def test_finished_runs_are_read_once(folder, monkeypatch):
    read = []
    real = status.progress
    monkeypatch.setattr(status, "progress", lambda place: read.append(place.name) or real(place))
    begin(folder, VANILLA)
    found = Overview(folder)
    found.refresh()
    assert len(read) == 4
    found.refresh()
    assert read[4:] == [VANILLA]


def test_reading_a_study_writes_and_deletes_nothing(folder):
    foreign(begin(folder, VANILLA, [1]))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    shown(overview(folder))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")} == before


def test_a_broken_outcome_counts_as_unfinished(folder):
    (folder / "runs" / VANILLA / "outcome.json").write_text("{")
    assert overview(folder).rows[VANILLA].state == "waiting"


def test_the_command_shows_the_study_and_refuses_what_is_none(folder):
    code, out, _ = in_process("status", folder)
    assert (code, "by-hand: 4 runs, 4 finished" in out) == (0, True)
    code, out, _ = in_process("status", folder, "--follow")  # all is done: there is nothing to wait for
    assert (code, "4 finished" in out) == (0, True)
    code, _, err = in_process("status", folder.parent)
    assert code == 2
    assert "is not a study folder" in err


def test_a_record_that_is_no_study_is_refused_by_name(folder):
    (folder / "study.json").write_text('{"study": 3}')
    with pytest.raises(RunError, match=r"study.json "):
        Overview(folder)


@pytest.mark.parametrize("epochs", [0, -1, None])
def test_a_record_without_its_epochs_is_shown_without_a_pace(folder, epochs):
    record = json.loads((folder / "study.json").read_text())
    if epochs is None:
        del record["study"]["epochs"]
    else:
        record["study"]["epochs"] = epochs
    (folder / "study.json").write_text(json.dumps(record))
    found = overview(folder)
    assert len(found.of("finished")) == 4
    assert "by-hand" in shown(found)
