"""Studies in bad weather: several processes on one folder, killed ones, folders that cannot be written."""

import errno
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest
from small_study import STUDY
from test_cli import in_process, start
from test_engines import claimed, equal_to_uninterrupted, wait_for
from test_execution import Record, numbers

from spectreg_lab.settings.studies import read_study
from spectreg_lab.storage import claims, run_folder
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.studies import execution
from spectreg_lab.studies.execution import UnwritableError, begin, execute
from spectreg_lab.studies.worker import carry_out
from spectreg_lab.training import runs
from spectreg_lab.training.runs import run


class Here:
    """An engine that does one job after the other in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, jobs):
        for job in jobs:
            yield carry_out(job)


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace("seeds = [0, 1]", "seeds = [0]"))
    return path


@pytest.fixture
def long_study(study):
    study.write_text(study.read_text().replace("epochs = 2", "epochs = 40").replace("[methods.decay]\n", ""))
    return study


@pytest.fixture
def trained(monkeypatch):
    """How often each epoch of each run has been trained in this process."""
    count, real = Counter(), runs.train

    def train(config, *rest):
        for epoch in real(config, *rest):
            count[config.name, epoch.number] += 1
            yield epoch

    monkeypatch.setattr(runs, "train", train)
    return count


def take_part(study, folder):
    record = Record()
    execute(begin(study, folder, "spectreg reproduce", record), Here(), record)
    return record


def outcomes(folder):
    return [RunFolder(path.parent) for path in folder.rglob(run_folder.OUTCOME)]


def test_three_who_work_on_one_folder_train_each_epoch_of_each_run_once(study, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(execution, "LOOK", 0.02)
    monkeypatch.setattr(claims, "BEAT", 0.05)
    content, records = read_study(study), []
    take = [threading.Thread(target=lambda: records.append(take_part(content, tmp_path / "out"))) for _ in range(3)]
    for thread in take:
        thread.start()
    for thread in take:
        thread.join()
    assert len(trained) == 6 * 2
    assert set(trained.values()) == {1}
    assert [place.finished() for place in outcomes(tmp_path / "out")] == [True] * 6
    told = [len(record.ends) + len(record.left) for record in records]
    assert told == [6] * 3  # each is told of every run: that it has ended, or who has it


def test_a_run_that_failed_by_itself_is_not_tried_by_the_others_but_by_the_next_command(study, tmp_path, trained):
    study.write_text(study.read_text().replace("large = 0.1", "large = 1e30"))
    content, first, second = read_study(study), Record(), Record()
    waiting = begin(content, tmp_path / "out", "", first)
    later = begin(content, tmp_path / "out", "", second)
    execute(waiting, Here(), first)
    trained.clear()
    execute(later, Here(), second)
    assert sorted(second.ends) == sorted(first.ends)
    assert not trained
    assert len([end for end in take_part(content, tmp_path / "out").ends if end[1] == "failed"]) == 3


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("claim", errno.EACCES),
        ("claim", errno.EROFS),
        ("checkpoint", errno.ENOSPC),
        ("checkpoint", errno.EDQUOT),
        ("metrics", errno.ENOSPC),
    ],
    ids=lambda value: errno.errorcode.get(value, value),
)
def test_a_folder_that_cannot_be_written_stops_the_study_in_one_line_and_the_same_command_goes_on(
    study, tmp_path, monkeypatch, code, where
):
    content, count = read_study(study), [0]
    owner, name = {
        "claim": (claims, "_create"), "checkpoint": (RunFolder, "save"), "metrics": (RunFolder, "append"),
    }[where]  # fmt: skip
    real = getattr(owner, name)

    def full(*args):
        count[0] += 1
        if count[0] == 2:
            raise OSError(code, os.strerror(code))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(UnwritableError) as stopped:
            take_part(content, tmp_path / "out")
    assert os.strerror(code) in str(stopped.value)
    assert "give the same command again; what is finished is kept" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not [place for place in outcomes(tmp_path / "out") if not place.finished()]  # nothing counts as failed
    assert not list((tmp_path / "out").rglob("claim-*"))
    take_part(content, tmp_path / "out")
    places = outcomes(tmp_path / "out")
    assert [place.finished() for place in places] == [True] * 6
    for number, place in enumerate(places[:2]):
        run(place.config(), tmp_path / str(number))
        assert numbers(place) == numbers(RunFolder(tmp_path / str(number)))


def test_what_another_machine_left_behind_is_taken_over_and_what_it_is_doing_is_left_to_it(
    study, tmp_path, monkeypatch, trained
):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "STALE", 0.5)
    monkeypatch.setattr(execution, "LOOK", 0.02)
    content, record = read_study(study), Record()
    waiting = begin(content, tmp_path / "out", "", record)
    dead, alive = list(waiting)[:2]
    stop, held = threading.Event(), threading.Event()

    def elsewhere():
        with claims.claim(alive):
            held.set()
            stop.wait()

    other = threading.Thread(target=elsewhere)
    other.start()
    held.wait()
    with claims.claim(dead) as lost:
        claim_of_the_dead = lost.path.read_text()
    foreign = dead / "claim-1.json"
    foreign.write_text(claim_of_the_dead.replace(claims._machine() or "", "a machine that burnt down"))
    execute(waiting, Here(), record)
    stop.set()
    other.join()
    assert [name for name, _ in record.left] == [str(waiting[alive])]
    assert f"process {os.getpid()} on " in record.left[0][1]
    assert len(record.ends) == 5
    assert set(trained.values()) == {1}
    assert RunFolder(dead).finished()


@pytest.mark.slow
def test_a_command_that_is_killed_takes_its_workers_along_and_the_next_one_goes_on_at_once(long_study, tmp_path):
    words = ("reproduce", long_study, "--out", tmp_path / "out", "--regime", "small", "--processes", "1")
    process = start(*words)
    begun, owner = wait_for(claimed(tmp_path / "out"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not psutil.pid_exists(owner.process), 30)
    before = time.monotonic()
    code, _, err = in_process(*words)
    assert code == 0, err
    assert "left to" not in err
    assert time.monotonic() - before < 300
    assert equal_to_uninterrupted(begun, tmp_path / "alone")
    assert len(outcomes(tmp_path / "out")) == 2


@pytest.mark.slow
def test_slurm_tasks_and_ranks_that_ask_for_no_devices_share_a_study_run_by_run(study, tmp_path, monkeypatch):
    study.write_text(study.read_text().replace("[methods.decay]\n", ""))
    processes = []
    for rank in ("0", "1"):
        for name in ("WORLD_SIZE", "SLURM_NTASKS"):
            monkeypatch.setenv(name, "2")
        for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
            monkeypatch.setenv(name, rank)
        processes.append(start("reproduce", study, "--out", tmp_path / "out", "--processes", "1"))
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert all("report: " in out for out, _ in ends)
    assert [place.finished() for place in outcomes(tmp_path / "out")] == [True] * 4


def test_a_job_taken_up_again_marks_its_dead_claim_and_counts_the_attempt(tiny, tmp_path):
    from spectreg_lab.studies.worker import Job

    job = Job(tiny(), tmp_path)
    again = job.again("node-a")
    assert (again.dead, again.shunned, again.attempt) == ((job.token,), ("node-a",), 2)
    assert again.token != job.token
    assert job.again(counts=False).attempt == 1
    assert replace(again, token=job.token, dead=(), shunned=(), attempt=1) == job
