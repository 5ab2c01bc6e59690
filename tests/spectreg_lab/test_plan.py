import pytest
from test_studies import STUDY

from spectreg_lab.settings.studies import Selection, read_study
from spectreg_lab.studies.plan import plan


def test_a_plan_counts_runs_parameters_and_steps_and_trains_nothing(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    said = []
    text = plan(read_study(path), Selection(method=["vanilla"]), said.append)
    assert "4 runs of small" in text
    assert said == ["timing vgg small vanilla", "timing vgg large vanilla"]
    head, small, large = text.splitlines()[:3]
    assert head.split() == ["setting", "regime", "method", "runs", "parameters", "steps", "an", "epoch", "GiB", "hours"]
    # two convolutions with their normalization, a hidden layer and ten classes, counted by hand
    parameters = (9 * 4 + 2 * 4) + (9 * 4 * 8 + 2 * 8) + (8 * 2 * 2 * 8 + 8) + (8 * 10 + 10)
    assert small.split()[:6] == ["vgg", "small", "vanilla", "2", str(parameters), "6"]
    assert large.split()[5] == "1"


def test_a_plan_counts_the_images_on_the_device_and_says_what_it_leaves_out(tmp_path):
    path = tmp_path / "small.toml"
    small = ("width = 4, stages = [1, 1]", "width = 1, stages = [1]")
    path.write_text(STUDY.replace(*small).replace(", train_size = 96, test_size = 40", "") + "[measure]\n")
    only = Selection(regime=["small"], method=["vanilla"])
    text = plan(read_study(path), only, lambda _: None)
    assert "what [measure] asks for comes on top" in text
    path.write_text(path.read_text().replace('"digits"', '"cifar10"'))
    sizes = [
        float(plan(read_study(path, precision), only, lambda _: None).splitlines()[1].split()[-2])
        for precision in ("32-true", "64-true")
    ]
    assert sizes == pytest.approx([60_000 * 3 * 32 * 32 * size / 2**30 for size in (4, 8)], abs=0.02)


@pytest.mark.slow
def test_the_papers_study_is_planned_without_its_data(tmp_path):
    from pathlib import Path

    study = read_study(Path(__file__).parents[2] / "studies" / "paper.toml")
    text = plan(study, Selection(setting=["densenet40"], regime=["large"], method=["spectral"]), lambda _: None)
    assert "1060132" in text
    assert "5 runs of paper" in text
