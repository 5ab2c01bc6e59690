"""The command away from its checkout, without its packages, and where nothing comes of it."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import forked
import pytest
import torch
from folders import write_study
from small_study import SEARCH, STUDY
from typer.testing import CliRunner

from spectreg_lab.cli import app, main
from spectreg_lab.settings import shipped
from spectreg_lab.settings.studies import StudyError, read_study
from spectreg_lab.training.devices import DeviceError, several_devices

ROOT = Path(__file__).parents[2]


def test_a_study_that_comes_with_the_package_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits.toml", "studies/digits.toml"):
        assert read_study(shipped.find(Path(name))).name == "digits"
    (tmp_path / "digits.toml").write_text(STUDY)
    assert shipped.find(Path("digits.toml")) == Path("digits.toml")
    listed = CliRunner().invoke(app, ["reproduce", "--list"]).output
    assert [line.split()[0] for line in listed.splitlines()] == list(shipped.studies())


def test_a_folder_called_like_a_study_does_not_hide_it_and_a_study_folder_is_no_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("digits", "runs/digits"):
        (tmp_path / folder).mkdir(parents=True)
    assert read_study(shipped.find(Path("digits"))).name == "digits"
    with pytest.raises(StudyError, match="study file runs/digits is no file"):
        read_study(shipped.find(Path("runs/digits")))


def test_the_package_has_the_tables_that_its_studies_name():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    places = wheel["force-include"]
    assert places["studies"] == "spectreg_lab/shipped"
    for path in (ROOT / "studies").glob("*.toml"):
        for table in tomllib.loads(path.read_text()).get("searched", []):
            source = (path.parent / table).resolve().relative_to(ROOT).as_posix()
            there = os.path.normpath(f"{places['studies']}/{table}")
            assert places[source] == there


def test_without_the_labs_packages_the_command_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['typer'] = None; from spectreg_lab.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", code, "reproduce"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == "spectreg: the command needs typer: pip install 'spectreg[lab]'\n"


def test_the_command_tells_its_version_without_loading_torch():
    code = "import sys; from spectreg_lab.__main__ import main; main(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [f"spectreg {version('spectreg')}", "False"]


def test_the_command_tells_how_far_a_study_is_without_loading_torch(tmp_path):
    write_study(tmp_path / "study", seeds=(0,), methods=("vanilla",))
    code = "import sys; from spectreg_lab.cli import app; app(standalone_mode=False); print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, "status", str(tmp_path / "study")]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "2 runs, 2 finished" in found.stdout
    assert found.stdout.splitlines()[-1] == "False"


def test_more_devices_than_a_cpu_has_cores_are_refused_before_any_is_started(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for accelerator in ("auto", "cpu"):
        with (
            pytest.raises(DeviceError, match=r"--devices 1000, but this machine has a CPU of \d+ cores"),
            several_devices(accelerator, 1000, 1, "32-true"),
        ):
            pass


@pytest.mark.slow
def test_a_search_in_which_every_run_failed_says_so_and_is_no_success(tmp_path, monkeypatch, capsys):
    study = (STUDY + SEARCH).replace("[0.1, 0.2]", "[1e30]").replace("[0.3]", "[1e30]").replace("[0, 1]", "[0]")
    (tmp_path / "small.toml").write_text(study.replace("decay = [1e-3, 1e-2, 1e-1]", "decay = [1e-3]"))
    monkeypatch.setattr(
        "sys.argv",
        ["spectreg", "search", str(tmp_path / "small.toml"), "--out", str(tmp_path / "o"), "--processes", "1"],
    )
    with forked.local_engine(), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "no run of this search has finished" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"digits"', '"digitz"', "settings.vgg: data 'digitz': no such folder or name"),
        ("stages = [1, 1]", "stages = [1, 1, 1, 1]", "settings.vgg: an image of 8×8 is too small"),
        ("train_size = 96", "train_size = 1, validation = 0.5", "settings.vgg: validation = 0.5 of 1 training images"),
    ],
)
@pytest.mark.parametrize("words", [("reproduce", "--dry-run"), ("reproduce",)])
def test_what_shows_only_with_the_data_is_refused_with_file_and_field(
    tmp_path, monkeypatch, capsys, old, new, message, words
):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace(old, new))
    out = () if len(words) > 1 else ("--out", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["spectreg", *words, str(path), *out])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"spectreg: study file {path}: {message}" in capsys.readouterr().err.replace("\n", " ")
    assert [p.name for p in tmp_path.iterdir()] == ["small.toml"]


def test_a_search_without_a_table_for_it_is_refused_with_its_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    monkeypatch.setattr(sys, "argv", ["spectreg", "search", str(path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"study file {path}: the study 'small' has no [search] table" in capsys.readouterr().err
