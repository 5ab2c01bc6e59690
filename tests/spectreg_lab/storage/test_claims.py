"""Claims: one worker a run among processes and machines that share nothing but a folder."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from folders import foreign

from spectreg_lab.storage import claims
from spectreg_lab.storage.checkpoints import Checkpoint
from spectreg_lab.storage.claims import ClaimedError, ClaimLostError, Watch, claim, holder
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.training.runs import run

HOLD = """
import sys, time
from pathlib import Path
from spectreg_lab.storage.claims import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.02)
    monkeypatch.setattr(claims, "STALE", 0.4)


def hold(folder):
    """Another process of this machine that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def watch_until_known(folder, patience=10.0):
    watch, deadline = Watch(), time.monotonic() + patience
    while (seen := watch.observe(folder)) and seen.alive is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return seen


def test_a_run_is_claimed_by_one_and_free_again_afterwards(tmp_path):
    with claim(tmp_path) as mine:
        assert holder(tmp_path).process == os.getpid()
        with pytest.raises(ClaimedError, match=rf"another process is working on .*\(process {os.getpid()} on "):
            claim(tmp_path).__enter__()
        mine.check()
    assert holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_of_many_who_take_one_stale_claim_over_at_the_same_moment_exactly_one_has_it(tmp_path):
    for round_ in range(20):
        folder = tmp_path / str(round_)
        foreign(folder)
        start, taken, refused = threading.Barrier(8), [], []

        def contend(folder=folder, start=start, taken=taken, refused=refused):
            start.wait()
            try:
                held = claim(folder, dead=["theirs"])
                mine = held.__enter__()
                taken.append((held, mine))
            except ClaimedError:
                refused.append(1)

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(taken), len(refused)) == (1, 7)
        taken[0][1].check()
        taken[0][0].__exit__(None, None, None)
        assert list(folder.iterdir()) == []


def test_the_claim_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path):
    process = hold(tmp_path)
    with pytest.raises(ClaimedError, match=f"process {process.pid}"):
        claim(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Watch().observe(tmp_path).alive is False
    with claim(tmp_path):
        assert holder(tmp_path).process == os.getpid()


def test_a_claim_of_another_machine_is_stale_when_it_has_not_been_seen_to_change(tmp_path, fast):
    foreign(tmp_path)
    with pytest.raises(ClaimedError, match="process 7 on node-b"):
        claim(tmp_path).__enter__()
    seen = watch_until_known(tmp_path)
    assert (seen.owner.token, seen.alive) == ("theirs", False)
    with claim(tmp_path, dead=[seen.owner.token]):
        assert [path.name for path in tmp_path.iterdir()] == ["claim-2.json"]


def test_a_run_left_behind_by_a_machine_that_went_down_is_gone_on_with_and_a_living_one_is_not(tmp_path, fast, tiny):
    path = foreign(tmp_path)
    assert run(tiny(epochs=1), tmp_path)["status"] == "finished"
    assert not list(tmp_path.glob("claim-*"))
    path, stop = foreign(tmp_path), threading.Event()

    def beat():
        while not stop.wait(claims.BEAT):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(ClaimedError, match="process 7 on node-b"):
        run(tiny(epochs=1), tmp_path)
    stop.set()
    beating.join()


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_a_living_claim_is_never_stale_and_a_dead_one_always_whatever_the_owners_clock_says(tmp_path, fast, hours):
    shift, stop = hours * 3600, threading.Event()
    path = foreign(tmp_path, started="2001-01-01T00:00:00+00:00")

    def beat():
        while not stop.wait(claims.BEAT):
            os.utime(path, (time.time() + shift,) * 2)

    beating = threading.Thread(target=beat)
    beating.start()
    watch, end = Watch(), time.monotonic() + 3 * claims.STALE
    verdicts = set()
    while time.monotonic() < end:
        verdicts.add(watch.observe(tmp_path).alive)
        time.sleep(0.01)
    stop.set()
    beating.join()
    assert False not in verdicts
    assert True in verdicts
    os.utime(path, (time.time() + shift,) * 2)
    assert watch_until_known(tmp_path).alive is False


def test_the_owner_gives_signs_of_life_and_a_clock_put_back_by_an_hour_does_not_matter(tmp_path, fast, monkeypatch):
    with claim(tmp_path):
        assert watch_until_known(tmp_path).alive is True
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        time.sleep(2 * claims.STALE)
        assert watch_until_known(tmp_path).alive is True


def test_an_owner_that_was_taken_over_writes_nothing_more(tmp_path, tiny, monkeypatch):
    place = RunFolder(tmp_path)
    with place.claimed(token="mine"):
        place.begin(tiny(), {"torch": "2"})
        place.append({"epoch": 1})
        with claim(tmp_path, dead=["mine"]):
            before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            for write in (
                lambda: place.append({"epoch": 2}),
                lambda: place.save(Checkpoint(2, {})),
                lambda: place.begin(tiny(), {"torch": "3"}),
                lambda: place.end("finished"),
                lambda: place.save_measures({}),
                place.resume,
            ):
                with pytest.raises(ClaimLostError, match=rf"was taken over by process {os.getpid()} on "):
                    write()
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert holder(tmp_path) is None


def test_a_run_taken_over_in_the_middle_stops_and_the_other_one_ends_with_the_same_bits(tmp_path, tiny):
    config, mine = tiny(), RunFolder(tmp_path / "run")

    def take_over(metrics):
        if metrics["epoch"] == 2:
            with claim(mine.path, dead=[holder(mine.path).token]):
                pass
            run(config, mine.path)

    with pytest.raises(ClaimLostError, match="was taken over"):
        run(config, mine.path, on_epoch=take_over)
    run(config, tmp_path / "alone")
    kept, alone = ([{**m, "seconds": 0} for m in RunFolder(p).metrics()] for p in (mine.path, tmp_path / "alone"))
    assert kept == alone
    assert mine.finished()


def test_a_claim_cut_short_by_a_kill_is_taken_over_like_any_other(tmp_path, fast):
    (tmp_path / "claim-1.json").touch()
    with pytest.raises(ClaimedError, match="another machine"):
        claim(tmp_path).__enter__()
    seen = watch_until_known(tmp_path)
    assert seen.alive is False
    with claim(tmp_path, dead=[seen.owner.token]) as mine:
        mine.check()


def test_a_claim_whose_folder_was_deleted_is_lost(tmp_path):
    with claim(tmp_path / "run") as mine:
        mine.path.unlink()
        with pytest.raises(ClaimLostError, match="its claim was deleted"):
            mine.check()


def test_no_claim_outlives_an_error_and_a_full_disk_leaves_none(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(claims.json, "dumps", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        claim(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
