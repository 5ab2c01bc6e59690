import os
import signal
from pathlib import Path

import forked
import pytest
from small_study import STUDY

from spectreg_lab.settings.studies import Selection, Study, StudyError, read_study
from spectreg_lab.storage import archive, errors, run_folder, store
from spectreg_lab.studies import execution
from spectreg_lab.studies.execution import UnwritableError, begin, check, execute
from spectreg_lab.studies.local import LocalEngine
from spectreg_lab.studies.plan import plan
from spectreg_lab.studies.worker import Outcome
from spectreg_lab.training.runs import run
from spectreg_lab.training.train import Training

RESULTS = Path(__file__).parents[3] / "results"


class Record:
    """A display that remembers."""

    def __init__(self):
        self.notes, self.todo, self.done, self.ends, self.left = [], None, None, [], []

    def note(self, text):
        self.notes.append(text)

    def begin(self, points, done):
        self.todo, self.done = len(points), done

    def watch(self, folder, points):
        pass

    def tick(self):
        pass

    def end(self, point, status, error):
        self.ends.append((str(point), status, error))

    def leave(self, point, owner):
        self.left.append((str(point), str(owner)))


class Script:
    """An engine that says of every job what it is told to say."""

    def __init__(self, *outcomes):
        self.outcomes, self.jobs = outcomes, []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, jobs):
        for job in jobs:
            self.jobs.append(job)
            job.folder.mkdir(parents=True, exist_ok=True)
            for status, error in self.outcomes:
                yield Outcome(job, status, error)


@pytest.fixture
def study(tmp_path):
    def make(*changes):
        text = STUDY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "study.toml").write_text(text)
        return read_study(tmp_path / "study.toml")

    return make


def carry_out(study, folder, processes=2, engine=None, record=None):
    record = record or Record()
    with forked.local_engine():
        execute(begin(study, folder, "spectreg reproduce", record), engine or LocalEngine(processes, 1), record)
    return record


@pytest.mark.slow
def test_a_study_is_done_once_and_finished_runs_are_skipped_on_a_second_call(study, tmp_path):
    content = study(("seeds = [0, 1]", "seeds = [0]"))
    first = carry_out(content, tmp_path / "out")
    assert (first.todo, first.done) == (6, 0)
    assert sorted(status for _, status, _ in first.ends) == ["finished"] * 6
    again = carry_out(content, tmp_path / "out")
    assert (again.todo, again.done, again.ends) == (0, 6, [])
    assert [run.status for run in store.read_study(tmp_path / "out").runs] == ["finished"] * 6


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_the_study_goes_on(study, tmp_path):
    content = study(("large = 0.1", "large = 1e30"), ("seeds = [0, 1]", "seeds = [0]"))
    record = carry_out(content, tmp_path / "out", processes=1)
    failed = [error for _, status, error in record.ends if status == "failed"]
    assert len(failed) == 3
    assert all("NonFiniteLossError: epoch 1" in error for error in failed)
    runs = store.read_study(tmp_path / "out").runs
    assert {run.regime: run.status for run in runs} == {"small": "finished", "large": "failed"}


class Killer(Record):
    """Kills the process of an engine's only place whenever a run of it has stored so many epochs."""

    def __init__(self, engine, folder, epochs):
        super().__init__()
        self.engine, self.folder, self.epochs = engine, folder, list(epochs)

    def tick(self):
        stored = [int(path.stem.rpartition("-")[2]) for path in self.folder.rglob("checkpoint-*.safetensors")]
        if self.epochs and max(stored, default=0) >= self.epochs[0] and self.engine.places[0].process:
            self.epochs.pop(0)
            os.kill(self.engine.places[0].process.pid, signal.SIGKILL)


@pytest.fixture
def one_run(study, monkeypatch):
    monkeypatch.setattr("spectreg_lab.studies.local.POLL", 0.02)
    return study(
        ("seeds = [0, 1]", "seeds = [0]"), ("epochs = 2", "epochs = 30"), ("[methods.decay]\n", ""),
        ('[methods.strong-decay]\nname = "decay"\nstrength = 0.1\n', ""), ("[regimes.small]\nbatch_size = 16\n", ""),
        ("small = 0.05, ", ""),
    )  # fmt: skip


def numbers(place):
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in place.metrics()]
    return lines, {name: tensor.tolist() for name, tensor in place.resume().tensors.items()}


@pytest.mark.slow
def test_a_run_whose_process_is_killed_goes_on_in_a_new_one_to_the_same_bits(one_run, tmp_path):
    engine = LocalEngine(1, 1)
    record = carry_out(one_run, tmp_path / "out", engine=engine, record=Killer(engine, tmp_path / "out", [2]))
    assert [note for note in record.notes if "its process ended with SIGKILL (out of memory?); trying once" in note]
    assert [status for _, status, _ in record.ends] == ["finished"]
    (killed,) = [run_folder.RunFolder(path.parent) for path in (tmp_path / "out").rglob(run_folder.OUTCOME)]
    run(killed.config(), tmp_path / "alone")
    assert numbers(killed) == numbers(run_folder.RunFolder(tmp_path / "alone"))
    assert len(killed.metrics()) == 30
    assert not list(killed.path.glob("claim*"))


@pytest.mark.slow
def test_a_run_whose_process_is_killed_twice_is_recorded_as_failed_and_tried_by_the_next_command(one_run, tmp_path):
    engine = LocalEngine(1, 1)
    record = carry_out(one_run, tmp_path / "out", engine=engine, record=Killer(engine, tmp_path / "out", [2, 4]))
    cause = "its process ended with SIGKILL (out of memory?), 2 times"
    assert [(status, error) for _, status, error in record.ends] == [("failed", cause)]
    (run,) = store.read_study(tmp_path / "out").runs
    assert (run.status, run.error) == ("failed", cause)
    assert [status for _, status, _ in carry_out(one_run, tmp_path / "out").ends] == ["finished"]


def test_a_training_that_stops_for_whatever_cause_has_an_outcome(study, tmp_path, monkeypatch):
    content, only = study(), Selection(regime=["small"], method=["vanilla"], seed=[0])
    ((place, point),) = begin(content, tmp_path / "out", "", Record(), only).items()
    monkeypatch.setattr(Training, "epoch", lambda *_: (_ for _ in ()).throw(RuntimeError("the device is gone")))
    assert run(point.config, place) == {"status": "failed", "error": "RuntimeError: the device is gone"}
    assert "the device is gone" in run_folder.RunFolder(place).outcome()["error"]
    monkeypatch.undo()
    assert run(point.config, place) == {"status": "finished"}


def test_a_kept_study_that_was_named_before_some_settings_existed_is_not_run_again(tmp_path):
    archive.unpack(RESULTS / "digits" / archive.NAME, tmp_path / "out")
    kept = store.read_study(tmp_path / "out")
    content = Study.model_validate({key: value for key, value in kept.study.items() if key != "command"})
    assert begin(content, tmp_path / "out", "spectreg reproduce", Record()) == {}
    again = store.read_study(tmp_path / "out")
    assert [run.status for run in again.runs] == ["finished"] * len(kept.runs)


def test_a_folder_that_cannot_be_written_ends_the_study_with_its_cause(study, tmp_path):
    full = Script(("unwritable", "OSError: [Errno 28] No space left on device"))
    with pytest.raises(UnwritableError, match=r"No space left on device: mend that and give the same command again"):
        carry_out(study(), tmp_path / "out", engine=full)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages = [1, 1]", "stages = [1, 1, 1, 1]", r"settings.vgg: an image of 8×8 is too small for the 4 poolings"),
        ('"digits"', '"digitz"', r"settings.vgg: data 'digitz': .* did you mean 'digits'"),
        ("train_size = 96", "train_size = 9600", r"settings.vgg: train_size = 9600, but there are 1400"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_run(study, old, new, message):
    with pytest.raises(StudyError, match=message):
        check(study((old, new)), Record())


def test_a_broken_outcome_counts_as_unfinished(tmp_path):
    (tmp_path / run_folder.OUTCOME).write_text("{")
    assert not execution._finished(Path(tmp_path))


def test_a_selection_does_only_its_runs_and_the_folder_still_knows_all(study, tmp_path):
    record = Record()
    only = Selection(regime=["large"], method=["vanilla", "decay"], seed=[1])
    waiting = begin(study(), tmp_path / "out", "spectreg reproduce", record, only)
    assert {str(point) for point in waiting.values()} == {"vgg large vanilla seed 1", "vgg large decay seed 1"}
    assert len(store.read_study(tmp_path / "out").runs) == 12


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (Selection(setting=["vg"]), "the study 'small' has no setting 'vg', did you mean 'vgg'. known: vgg"),
        (Selection(method=["spectral"]), "has no method 'spectral'; known: vanilla, decay, strong-decay"),
        (Selection(regime=["large"], seed=[1, 9]), "has no seed '9'; known: 0, 1"),
    ],
    ids=str,
)
def test_a_selection_of_what_the_study_does_not_have_is_refused_with_what_it_has(study, tmp_path, only, message):
    with pytest.raises(StudyError, match=message):
        begin(study(), tmp_path / "out", "", Record(), only)
    with pytest.raises(StudyError, match=message):
        plan(study(), only, print)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_study_is_left_as_it_is_and_a_changed_study_of_the_same_name_goes_on(study, tmp_path):
    begin(study(('name = "small"', 'name = "first"')), tmp_path / "out", "", Record())
    before = (tmp_path / "out" / store.STUDY).read_bytes()
    with pytest.raises(StudyError, match=r"out holds the study 'first': give 'small' another folder with --out"):
        begin(study(), tmp_path / "out", "", Record())
    assert (tmp_path / "out" / store.STUDY).read_bytes() == before
    begin(
        study(('name = "small"', 'name = "first"'), ("seeds = [0, 1]", "seeds = [5]")), tmp_path / "out", "", Record()
    )
    assert {run.seed for run in store.read_study(tmp_path / "out").runs} == {5}


def test_a_start_that_fails_writes_nothing(study, tmp_path):
    with pytest.raises(StudyError, match="digitz"):
        begin(study(('"digits"', '"digitz"')), tmp_path / "out", "", Record())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", [b"{", b"", b"[]", b'{"study": 3}'])
def test_a_broken_record_of_a_study_says_that_the_same_command_rewrites_it_and_it_does(study, tmp_path, broken):
    begin(study(), tmp_path / "out", "", Record())
    (tmp_path / "out" / store.STUDY).write_bytes(broken)
    with pytest.raises(
        errors.RunError, match=r"study.json .*the command that made it again, which rewrites it and keeps"
    ):
        store.read_study(tmp_path / "out")
    begin(study(), tmp_path / "out", "", Record())
    assert len(store.read_study(tmp_path / "out").runs) == 12


def test_a_finished_run_without_its_metrics_is_run_again(study, tmp_path):
    content = study(("seeds = [0, 1]", "seeds = [0]"))
    only = Selection(regime=["large"], method=["vanilla"])
    ((place, point),) = begin(content, tmp_path / "out", "", Record(), only).items()
    run(point.config, place)
    assert not begin(content, tmp_path / "out", "", Record(), only)
    (place / run_folder.METRICS).unlink()
    assert [r.error for r in store.read_study(tmp_path / "out").runs if r.folder == place] == [
        "2 of its epochs are not in metrics.jsonl: `spectreg reproduce` runs it again"
    ]
    assert list(begin(content, tmp_path / "out", "", Record(), only)) == [place]
    assert run(point.config, place) == {"status": "finished"}
    assert len(run_folder.RunFolder(place).metrics()) == 2
