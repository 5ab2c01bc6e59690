from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from spectreg_lab.settings.config import NIN, VGG, Config, Data, DenseNet, Spectral, Vanilla
from spectreg_lab.storage import archive
from spectreg_lab.storage.records import RunName

RESULTS = Path(__file__).parents[3] / "results"

BASE = {"model": {"name": "vgg"}, "method": {"name": "vanilla"}, "batch_size": 64, "learning_rate": 0.1, "epochs": 2}


def test_equal_settings_have_equal_names_and_any_other_setting_another():
    base = Config.model_validate(BASE)
    others = [
        {"model": {"name": "vgg", "width": 32}},
        {"method": {"name": "spectral"}},
        {"batch_size": 65},
        {"learning_rate": 0.2},
        {"epochs": 3},
        {"seed": 1},
        {"momentum": 0.8},
        {"micro_batch": 7},
        {"data": {"name": "digits", "train_size": 5}},
        {"precision": "64-true"},
        {"evaluate_every": 2},
        {"compile": True},
    ]
    names = [Config.model_validate({**BASE, **other}).name for other in others]
    assert Config.model_validate(BASE).name == base.name
    assert len({base.name, *names}) == len(others) + 1


def test_a_run_named_before_a_setting_was_added_keeps_its_name_and_its_record():
    config = Config.model_validate(BASE)
    assert config.name == "vgg-digits-vanilla-b64-s0-627ce680"
    assert not {"evaluate_every", "compile"} & set(config.model_dump(mode="json"))
    later = Config.model_validate({**BASE, "evaluate_every": 2, "compile": True})
    assert Config.model_validate(later.model_dump(mode="json")) == later


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/runs.jsonl.gz")), ids=lambda file: file.parent.name)
def test_every_kept_run_has_the_name_that_its_setting_gives(file):
    runs = [run for run in archive.read(file).runs if run.config]  # of those that have not begun there is none
    assert runs
    for run in runs:
        assert run.folder.name in Config.model_validate(run.config).names


def test_the_defaults_are_the_papers_settings():
    assert VGG().stages == (2, 2, 3, 3, 3)
    assert (DenseNet().depth, DenseNet().growth, NIN().dropout) == (40, 12, 0.5)
    assert Spectral().strength == 0.01
    assert Config.model_validate(BASE).momentum == 0.9


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 0, "greater than 0"),
        ("learning_rate", float("inf"), "finite"),
        ("method", {"name": "spectral", "strength": -1}, "greater than or equal to 0"),
        ("method", {"name": "spectral", "strength": float("nan")}, "finite"),
        ("method", {"name": "spectrall"}, "spectrall"),
        ("method", {"name": "vanilla", "strength": 1.0}, "Extra inputs"),
        ("model", {"name": "densenet", "depth": 20}, "multiple of 3"),
        ("precision", "16-mixed", "bf16-mixed"),
        ("epoch", 3, "Extra inputs"),
    ],
)
def test_a_wrong_setting_is_refused(key, value, message):
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({**BASE, key: value})


def test_a_setting_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Config.model_validate(BASE).seed = 3


def test_the_name_says_nothing_of_the_folder_that_holds_the_data():
    config = Config(
        model=VGG(), method=Vanilla(), data=Data(name="/a/secret/cifar10/"), batch_size=1, learning_rate=1, epochs=1
    )
    assert config.name.startswith("vgg-cifar10-vanilla-b1-s0-")


@pytest.mark.parametrize("folder", ["a\\b", "a\u00a0b"])
def test_a_run_has_the_name_of_a_folder_whatever_the_data_are_called(folder):
    name = Config.model_validate(BASE | {"data": {"name": f"/photos/{folder}"}}).name
    assert name.startswith("vgg-a_b-vanilla-b64-s0-")
    TypeAdapter(RunName).validate_python(name)
