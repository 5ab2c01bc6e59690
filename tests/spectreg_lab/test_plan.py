import pytest
from test_studies import STUDY

from spectreg_lab.plan import plan
from spectreg_lab.studies import Selection, read_study


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


@pytest.mark.slow
def test_the_papers_study_is_planned_without_its_data(tmp_path):
    from pathlib import Path

    study = read_study(Path(__file__).parents[2] / "studies" / "paper.toml")
    text = plan(study, Selection(setting=["densenet40"], regime=["large"], method=["spectral"]), lambda _: None)
    assert "1060132" in text
    assert "5 runs of paper" in text
