import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import forked
import pytest
from small_study import STUDY

from spectreg_lab.cli.app import main

# A shell starts what runs in its background with SIGINT ignored: here it is as in a terminal.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
MAIN += "import sys; sys.argv[0] = 'spectreg'; from spectreg_lab.cli import main; main()"


def start(*words, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", MAIN, *map(str, words)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def spectreg(*words):
    process = start(*words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def in_process(*words):
    """The same without a process of its own, which takes seconds to import torch: exit code, output, errors.

    The processes of its runs are forked from one that has imported it.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        forked.local_engine(),
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.setenv("COLUMNS", "200")
        patch.setenv("NO_COLOR", "1")
        patch.setattr("sys.argv", ["spectreg", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
    return end.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace("seeds = [0, 1]", "seeds = [0]"))
    return path


def test_help_names_every_command():
    code, out, _ = spectreg("--help")
    assert code == 0
    assert all(word in out for word in ("reproduce", "search", "report", "train"))


@pytest.mark.parametrize("command", ["reproduce", "search", "train"])
def test_the_help_of_a_command_has_an_example(command):
    assert f"spectreg {command}" in spectreg(command, "--help")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("reproduce", "absent.toml"), "study file absent.toml does not exist"),
        (("train", "--model", "vggg"), "model: unknown name 'vggg', did you mean 'vgg'"),
        (("train", "--method", "spectal"), "method: unknown name 'spectal', did you mean 'spectral'"),
        (("train", "--method", "vanilla", "--strength", "1"), "method.vanilla.strength: unknown key"),
        (("train", "--method", "adversarial", "--strength", "1"), "strength: unknown key; known: alpha, epsilon, name"),
        (("train", "--data", "digit"), "data 'digit': no such folder or name; did you mean 'digits'"),
        (("train", "--batch-size", "0"), "batch_size: Input should be greater than 0, got 0"),
        (("train", "--strength", "nan"), "strength: Input should be a finite number, got nan"),
        (("train", "--model", "vgg"), "an image of 8×8 is too small for the 5 poolings"),
        (("report", "."), "not a study folder"),
        (("report", ".", "--out", ""), "the folder is '', which would be the current one"),
        (("reproduce", "digits", "--out", " "), "the folder is '', which would be the current one"),
        (("reproduce", "digits-search"), "has a [search] table: carry it out with `spectreg search"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_input_is_one_line_and_a_non_zero_exit(words, message, tmp_path):
    out = ("--out", tmp_path / "run") if words[0] == "train" else ()
    code, _, err = in_process(*words, *out)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_reproduce_leaves_a_page_and_prints_its_place(study, tmp_path):
    code, out, err = in_process("reproduce", study, "--out", tmp_path / "out")
    assert code == 0
    page = tmp_path / "out" / "report" / "report.html"
    assert f"report: {page.resolve()}" in out
    assert page.stat().st_size > 10_000
    assert "left" in err  # the time that is left


@pytest.mark.slow
def test_control_c_stops_cleanly_says_how_to_go_on_and_loses_nothing_finished(study, tmp_path):
    study.write_text(study.read_text().replace("epochs = 2", "epochs = 20"))
    words = ("reproduce", study, "--out", tmp_path / "out", "--processes", "1", "--regime", "small")
    process = start(*words, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("outcome.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from there" in err
    assert "Traceback" not in err
    code, _, err = in_process(*words)
    assert code == 0
    assert "finished before" in err


@pytest.mark.slow
@pytest.mark.photographs
def test_a_reduced_vgg_learns_real_photographs(few_photographs, tmp_path):
    words = ["--model", "vgg", "--width", "8", "--stages", "1,1,1", "--train-size", "2000", "--test-size", "1000"]
    code, out, err = spectreg("train", *words, "--data", few_photographs, "--epochs", "6", "--out", tmp_path / "run")
    assert code == 0, err
    last = [line for line in out.splitlines() if line.startswith("epoch")][-1]
    assert float(last.split("test_accuracy")[1].split()[0]) > 0.35  # 0.1 is chance
