from pathlib import Path

import pytest
from small_study import STUDY

from spectreg_lab import data, models
from spectreg_lab.settings.shipped import find
from spectreg_lab.settings.studies import Selection, StudyError, read_study
from spectreg_lab.studies.plan import _of_an_image, plan


def rows(text):
    head, *lines = text.split("\n\n")[0].splitlines()
    assert head.split() == ["setting", "regime", "method", "runs", "parameters", "steps", "an", "epoch", "GiB", "PFLOP"]
    return [line.split() for line in lines]


def test_a_plan_counts_runs_parameters_steps_and_arithmetic(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace("epochs = 2", "epochs = 200000"))
    text = plan(read_study(path), Selection(method=["vanilla"]), print)
    assert "4 runs of small" in text
    small, large = rows(text)
    # two convolutions with their normalization, a hidden layer and ten classes, counted by hand
    parameters = (9 * 4 + 2 * 4) + (9 * 4 * 8 + 2 * 8) + (8 * 2 * 2 * 8 + 8) + (8 * 10 + 10)
    assert small[:6] == ["vgg", "small", "vanilla", "2", str(parameters), "6"]
    assert large[5] == "1"
    forward = 2 * (64 * 9 * 4 + 16 * 9 * 4 * 8 + 32 * 8 + 80)
    first = 2 * 64 * 9 * 4  # nobody asks for the gradient by the images
    expected = 2 * 200_000 * 96 * (3 * forward - first) / 1e15
    assert float(small[7]) == pytest.approx(expected, rel=0.1)


def test_a_plan_counts_the_images_on_the_device_and_says_what_it_leaves_out(tmp_path):
    path = tmp_path / "small.toml"
    small = ("width = 4, stages = [1, 1]", "width = 1, stages = [1]")
    path.write_text(STUDY.replace(*small).replace(", train_size = 96, test_size = 40", "") + "[measure]\n")
    only = Selection(regime=["small"], method=["vanilla"])
    assert "What [measure] asks for comes on top" in plan(read_study(path), only, print)
    path.write_text(path.read_text().replace('"digits"', '"cifar10"'))
    sizes = [float(rows(plan(read_study(path, precision), only, print))[0][6]) for precision in ("32-true", "64-true")]
    assert sizes == pytest.approx([60_000 * 3 * 32 * 32 * size / 2**30 for size in (4, 8)], abs=0.02)


def test_a_plan_of_the_first_classes_counts_their_images_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    path, counted = tmp_path / "small.toml", []
    for asked in ('"cifar100"', '"cifar100", classes = 25', '"cifar100", classes = 25, validation = 0.2'):
        path.write_text(STUDY.replace('"digits", train_size = 96, test_size = 40', asked))
        row = rows(plan(read_study(path), Selection(regime=["small"], method=["vanilla"]), print))[0]
        counted.append((int(row[5]), float(row[7])))
    assert [steps for steps, _ in counted] == [images // 16 for images in (50_000, 12_500, 10_000)]
    assert counted[0][1] == pytest.approx(4 * counted[1][1], rel=0.1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("train_size = 50001", "train_size = 50001, but there are 50000 train images"),
        ("train_size = 10001, classes = 2", "train_size = 10001, but there are 10000 train images"),
        ("test_size = 10001", "test_size = 10001, but there are 10000 test images"),
        ("classes = 11", "classes = 11, but cifar10 has 10"),
        ("shrink = 33", r"shrink = 33 leaves nothing of images of \(32, 32\) pixels"),
        ("train_size = 2, validation = 0.1", "validation = 0.1 of 2 training images leaves none on one side"),
    ],
)
def test_a_plan_refuses_of_known_data_what_could_not_be_loaded(tmp_path, asked, message):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace('"digits", train_size = 96, test_size = 40', f'"cifar10", {asked}'))
    with pytest.raises(StudyError, match=f"settings.vgg: {message}"):
        plan(read_study(path), Selection(), print)


def test_the_papers_study_is_planned_whole_without_its_data(monkeypatch):
    monkeypatch.setattr(data, "load", None)
    text = plan(read_study(find(Path("paper"))), Selection(), print)
    assert "1060132" in text
    assert "160 runs of paper" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stages = [1, 1]", "stages = [1, 1, 1, 1]"),
        ("width = 4", "width = 90000"),
        ('"digits"', '"digitz"'),
    ],
)
def test_a_plan_of_what_cannot_be_is_refused_with_the_setting(tmp_path, old, new):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(StudyError, match=r"settings.vgg: (an image of 8×8 is too small|the network has|data 'digitz')"):
        plan(read_study(path), Selection(), print)


def test_each_network_is_counted_once_however_many_methods_and_regimes_it_is_in(monkeypatch):
    counted, real = [], models.outline
    monkeypatch.setattr(models, "outline", lambda *network: counted.append(network) or real(*network))
    _of_an_image.cache_clear()
    plan(read_study(find(Path("paper"))), Selection(), print)
    assert len(counted) == 4
