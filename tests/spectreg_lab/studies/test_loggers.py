"""The numbers of an epoch in other people's tools."""

import sys
from types import ModuleType

import pytest

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


def test_tensorboard_shows_what_the_metrics_have_and_sigma_of_each_layer_once_an_epoch_also_after_a_stop(
    tmp_path, tiny, monkeypatch
):
    config, folder = tiny(Spectral()), tmp_path / "study" / "runs" / "run"

    class Stop(BaseException):
        pass

    real = RunFolder.save

    def stop(place, checkpoint):
        real(place, checkpoint)
        if checkpoint.epoch == 2:
            raise Stop

    monkeypatch.setattr(RunFolder, "save", stop)
    with pytest.raises(Stop):
        carry_out(Job(config, folder, log=("tensorboard",)))
    monkeypatch.setattr(RunFolder, "save", real)
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


def test_wandb_itself_writes_a_run_offline(tmp_path, tiny, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "study" / "runs" / "run"
    assert carry_out(Job(tiny(epochs=2), folder, log=("wandb",))).status == "finished"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


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
