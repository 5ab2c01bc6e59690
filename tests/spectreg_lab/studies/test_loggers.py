"""The numbers of an epoch in other people's tools."""

import json
import sqlite3
import sys
from contextlib import closing
from types import ModuleType

import pytest
from test_engines import wait_for

from spectreg_lab.settings.config import Spectral
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.studies.loggers import LogError, check, flat, loggers
from spectreg_lab.studies.worker import Job, carry_out


def events(folder):
    """Every number that TensorBoard would show, as {(name, step): value}; a name and step only once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    points = [((tag, event.step), event.value) for tag in found.Tags()["scalars"] for event in found.Scalars(tag)]
    assert len(points) == len(dict(points))
    return dict(points)


def expected(folder):
    return {
        (name, line["epoch"]): pytest.approx(value, rel=1e-6)
        for line in RunFolder(folder).metrics()
        for name, value in flat(line).items()
    }


class Stop(BaseException):
    pass


def stop_after(epoch, monkeypatch, config, folder, logger):
    """Train the run in ``folder`` until that epoch is stored, as though it were killed then."""
    real = RunFolder.save

    def save(place, checkpoint):
        real(place, checkpoint)
        if checkpoint.epoch == epoch:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save)
        with pytest.raises(Stop):
            carry_out(Job(config, folder, log=(logger,)))


def test_tensorboard_shows_what_the_metrics_have_and_sigma_of_each_layer_once_an_epoch_also_after_a_stop(
    tmp_path, tiny, monkeypatch
):
    config, folder = tiny(Spectral()), tmp_path / "study" / "runs" / "run"
    stop_after(2, monkeypatch, config, folder, "tensorboard")
    assert carry_out(Job(config, folder, log=("tensorboard",))).status == "finished"
    found = events(folder)
    assert found == expected(folder)
    assert {step for name, step in found if name.startswith("sigma/") and name.endswith(".weight")} == {1, 2, 3}


class Package(ModuleType):
    """The part of the interface that wandb and trackio share."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = sys.__spec__
        self.settings, self.lines, self.ended = None, [], 0

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, numbers, step):
        self.lines.append((step, numbers))

    def finish(self):
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_like_wandb_gets_the_same_numbers_under_the_names_of_study_and_run(tmp_path, tiny, monkeypatch, name):
    package = Package(name)
    monkeypatch.setitem(sys.modules, name, package)
    config, folder = tiny(epochs=2), tmp_path / "study" / "runs" / "run"
    check([name])
    assert carry_out(Job(config, folder, log=(name,))).status == "finished"
    assert package.lines == [(line["epoch"], flat(line)) for line in RunFolder(folder).metrics()]
    assert (package.settings["project"], package.settings["name"]) == ("study", config.name)
    assert package.settings["config"] == config.model_dump(mode="json")
    assert package.ended == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_like_wandb_is_told_no_epoch_twice_when_a_run_goes_on(tmp_path, tiny, monkeypatch, name):
    package = Package(name)
    monkeypatch.setitem(sys.modules, name, package)
    config, folder = tiny(), tmp_path / "study" / "runs" / "run"
    stop_after(2, monkeypatch, config, folder, name)
    assert [step for step, _ in package.lines] in ([1], [1, 2])
    assert carry_out(Job(config, folder, log=(name,))).status == "finished"
    assert package.lines == [(line["epoch"], flat(line)) for line in RunFolder(folder).metrics()]


def leveldb_records(content, block=32768):
    """The records of a log of LevelDB's kind, as wandb writes it after seven bytes of its own."""
    found, parts, at = [], [], 7
    while at + 7 <= len(content):
        if (rest := block - at % block) < 7:
            at += rest
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(b"".join(parts))
            parts = []
    return found


def of_wandb(folder):
    """Every number of the offline run in ``folder``, as {(name, step): value}."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for content in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found |= {(name, items["_step"]): value for name, value in items.items() if not name.startswith("_")}
    return found


def test_wandb_itself_has_every_number_of_an_offline_run(tmp_path, tiny, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "study" / "runs" / "run"
    assert carry_out(Job(tiny(Spectral(), epochs=2), folder, log=("wandb",))).status == "finished"
    wait_for(lambda: of_wandb(folder) == expected(folder), 20)  # a process of wandb's own writes the file


def test_trackio_itself_has_every_number_once_an_epoch_also_after_a_stop(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    config, folder = tiny(Spectral()), tmp_path / "study" / "runs" / "run"
    stop_after(2, monkeypatch, config, folder, "trackio")
    assert carry_out(Job(config, folder, log=("trackio",))).status == "finished"
    (file,) = (tmp_path / "trackio").rglob("study.db")
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {run for run, _, _ in rows} == {config.name}
    points = [((name, step), value) for _, step, line in rows for name, value in json.loads(line).items()]
    assert len(points) == len(dict(points))
    assert dict(points) == expected(folder)


def test_a_logger_that_is_not_installed_or_unknown_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("spectreg_lab.studies.loggers.find_spec", lambda name: None)
    with pytest.raises(LogError, match=r"--log wandb: the package wandb is not installed: pip install wandb"):
        check(["wandb"])
    with pytest.raises(LogError, match=r"--log mlflow: no such logger; known: tensorboard, wandb, trackio"):
        check(["mlflow"])


def test_a_logger_that_fails_ends_no_run_as_failed_and_is_named(tmp_path, tiny, monkeypatch):
    package = Package("wandb")
    package.log = lambda *_, **__: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", package)
    outcome = carry_out(Job(tiny(), tmp_path / "study" / "runs" / "run", log=("wandb",)))
    assert (outcome.status, outcome.error) == ("unwritable", "--log wandb: ZeroDivisionError: division by zero")
    assert RunFolder(tmp_path / "study" / "runs" / "run").outcome() is None
    assert package.ended == 1


def test_no_logger_is_told_nothing(tmp_path, tiny):
    with loggers((), tiny(), tmp_path) as log:
        log({"epoch": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_fails_when_it_is_closed_does_not_undo_a_finished_run(tmp_path, tiny, monkeypatch):
    package = Package("wandb")
    package.finish = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", package)
    folder = tmp_path / "study" / "runs" / "run"
    outcome = carry_out(Job(tiny(), folder, log=("wandb",)))
    assert (outcome.status, outcome.error) == ("unwritable", "--log wandb: ZeroDivisionError: division by zero")
    assert RunFolder(folder).outcome()["status"] == "finished"
