"""Table 1 and the gap at a threshold, on studies whose numbers are known."""

import math
from dataclasses import replace
from pathlib import Path

import folders
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spectreg_lab.exhibits import labels
from spectreg_lab.settings import studies
from spectreg_lab.settings.config import Config, Data
from spectreg_lab.statistics import frames, paper
from spectreg_lab.statistics.paired import holm, interval, paired
from spectreg_lab.storage import run_folder, store
from spectreg_lab.tables import table1

pytestmark = pytest.mark.portable


def build(folder: Path) -> tuple[store.StudyRecord, pd.DataFrame, pd.DataFrame]:
    study = store.read_study(folder)
    values = table1.values(study, frames.epochs(study), frames.runs(study))
    return study, table1.frame(study, values), values


def row(table: pd.DataFrame, **point: str) -> pd.Series:
    found = frames.select(table, **point)
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize(("lowest", "alpha"), [(0.884, 0.88), (0.88, 0.87), (0.004, 0.0), (1.0, 0.99), (0.0, -0.01)])
def test_the_gap_in_table_1_is_the_least_above_the_largest_hundredth_that_the_worst_run_exceeds(
    tmp_path: Path, lowest: float, alpha: float
) -> None:
    def curve(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
        return [(0.2, -0.02), (1.0, lowest if (method, seed) == ("decay", 1) else 1.0), (0.9, lowest - 0.02)]

    _, _, values = build(folders.write_study(tmp_path / "s", curve))
    assert set(values.alpha) == {alpha}
    (gap,) = frames.select(values, regime="small", method="decay", seed=1).generalization_gap
    assert gap == 1.0 - lowest


def test_a_threshold_of_the_study_that_no_epoch_exceeds_is_shown_as_never_reached(tmp_path: Path) -> None:
    settings = {"vgg": {"model": {}, "data": {}, "alpha": {"small": 0.85, "large": 0.7}}}
    study, table, values = build(folders.write_study(tmp_path / "s", settings=settings))
    small = row(table, metric="generalization_gap", regime="small", method="decay")
    large = row(table, metric="generalization_gap", regime="large", method="decay")
    assert (small.runs, small.reached, math.isnan(small["mean"])) == (3, 0, True)
    assert (large.reached, round(large["mean"], 12)) == (3, 0.1)  # of the two epochs above 0.7: 0.9 − 0.8, 0.99 − 0.85
    cells = table1.exhibit(study, table, values).tables[1].rows
    assert [cell.text for cell in cells[0]][1:] == ["0.85", *["never reached"] * 4]


def test_the_best_of_a_row_is_bold_with_its_ties_and_a_mean_over_some_seeds_never_beats_one_over_all(
    tmp_path: Path,
) -> None:
    accuracy = {"vanilla": 0.80, "decay": 0.8201, "adversarial": 0.70, "spectral": 0.8199}
    folder = folders.write_study(tmp_path / "s", lambda regime, method, seed: [(0.99, accuracy[method])])
    _, table, _ = build(folder)
    best = frames.select(table, metric="test_accuracy", regime="small", best=True)
    assert list(best.method) == ["decay", "spectral"]
    partly = {"decay": pd.Series([0.1, math.nan]), "spectral": pd.Series([0.2, 0.2])}
    assert table1.best(partly, "generalization_gap") == {"spectral"}


def test_a_paired_difference_and_its_corrected_p_value_are_those_of_the_textbook(tmp_path: Path) -> None:
    noise = {"vanilla": (0, 0.01, 0.02, 0.01), "decay": (0.01, 0.0, 0.01, 0.03), "spectral": (0.02, 0.04, 0.05, 0.05)}
    folder = folders.write_study(
        tmp_path / "s",
        lambda regime, method, seed: [(0.99, 0.7 + noise[method][seed])],
        seeds=(0, 1, 2, 3),
        methods=("vanilla", "decay", "spectral"),
    )
    _, table, _ = build(folder)
    found = {m: row(table, metric="test_accuracy", regime="small", method=m) for m in ("vanilla", "decay")}
    p = {}
    for method, line in found.items():
        differences = np.subtract(noise["spectral"], noise[method])
        half = stats.t.ppf(0.975, 3) * differences.std(ddof=1) / 2
        p[method] = 2 * stats.t.sf(abs(differences.mean() / (differences.std(ddof=1) / 2)), 3)
        expected = [differences.mean(), differences.mean() - half, differences.mean() + half, p[method]]
        assert [line.spectral_minus_this, line.low, line.high, line.p] == pytest.approx(expected)
        assert line.pairs == 4
    among_others = stats.ttest_rel(noise["vanilla"], noise["decay"]).pvalue
    expected = holm({**p, "vanilla and decay": among_others})
    assert {method: line.p_holm for method, line in found.items()} == pytest.approx({m: expected[m] for m in p})


def test_seeds_that_only_one_of_two_methods_has_do_not_enter_their_difference() -> None:
    first, second = pd.Series({0: 0.5, 1: 0.6, 2: 9.0}), pd.Series({1: 0.5, 0: 0.5, 3: 7.0})
    difference = paired(first, second)
    assert (difference.n, difference.mean) == (2, pytest.approx(0.05))


def test_one_seed_gives_a_difference_without_interval_and_none_gives_neither() -> None:
    one, none = interval(pd.Series([0.1])), interval(pd.Series([], dtype=float))
    assert (one.n, one.mean, math.isnan(one.low), math.isnan(one.p)) == (1, 0.1, True, True)
    assert (none.n, math.isnan(none.mean)) == (0, True)


def test_differences_without_spread_have_no_interval_unless_their_bound_was_reached() -> None:
    values = pd.Series([0.1, 0.1, math.inf, math.nan])
    alike = interval(values)
    assert (str(alike), math.isnan(alike.low), math.isnan(alike.p)) == ("+0.1 in each of 2 seeds", True, True)
    assert math.isnan(interval(values, (-1, 1)).low)
    reached = interval(values, (-1, 0.1))
    assert (str(reached), reached.low, reached.high, reached.p) == ("+0.1 in each of 2 seeds", 0.1, 0.1, 0.0)
    assert interval(pd.Series([0.0, 0.0])).p == 1.0


def test_differences_by_rounding_alone_are_no_differences() -> None:
    noise = interval(pd.Series([0.3 - 0.1 - 0.2, 0.0, 1e-17]))
    assert (noise.mean, math.isnan(noise.low), noise.p) == (0.0, True, 1.0)
    shared = interval(pd.Series([0.3 - 0.1, 0.2, 0.5 - 0.3]))
    assert math.isnan(shared.p)


def test_the_evidence_of_a_difference_is_one_minus_p_with_its_sign() -> None:
    up, down = interval(pd.Series([0.1, 0.2, 0.4])), interval(pd.Series([-0.1, -0.2, -0.4]))
    assert up.evidence == -down.evidence == 1 - up.p
    assert interval(pd.Series([0.1])).evidence == 0.0


def test_holm_multiplies_by_the_number_of_hypotheses_left_and_never_falls() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.9, "b": math.nan})["a"] == 0.9


def test_unfinished_failed_and_missing_runs_stay_out_of_table_1(tmp_path: Path) -> None:
    folder = folders.write_study(tmp_path / "s")
    folders.lose(folder, "vgg-small-decay-0")
    folders.fail(folder, "vgg-small-decay-1", "the loss became nan")
    (folder / "runs" / "vgg-small-spectral-2" / run_folder.OUTCOME).unlink()
    _, table, _ = build(folder)
    counts = frames.select(table, metric="test_accuracy", regime="small").set_index("method").runs
    assert counts.to_dict() == {"vanilla": 3, "decay": 1, "adversarial": 3, "spectral": 2}


PAPER = {"vgg": {"model": {}, "data": {"name": "cifar10"}, "paper": "vgg/cifar10"}}


def long(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
    """As many epochs as studies/paper.toml has."""
    return [(0.9, 0.8)] * 200


def test_the_papers_value_is_comparable_where_data_network_and_training_are_the_papers(tmp_path: Path) -> None:
    folder = folders.write_study(
        tmp_path / "s",
        long,
        settings=PAPER,
        data=Data(name="cifar10"),
        batch_sizes=(64, 512),
        rates=(0.01, 0.1),
        methods=("vanilla", "spectral"),
        seeds=(0,),
    )
    study, table, values = build(folder)
    small = row(table, metric="test_accuracy", regime="small", method="spectral")
    large = row(table, metric="test_accuracy", regime="large", method="spectral")
    assert (small.paper, small.not_comparable_in) == (0.904, "")
    assert (large.paper, large.not_comparable_in) == (0.885, "batch size")
    spectral = [line[-1] for line in table1.exhibit(study, table, values).tables[0].rows]
    assert [cell.small[-1] for cell in spectral] == ["paper 0.904", "paper 0.885†"]


def test_a_stand_in_for_the_papers_data_is_marked_as_not_comparable_and_no_paper_means_no_value(tmp_path: Path) -> None:
    data = Data(name="photos/cifar10-jpeg", train_size=100)
    jpeg = {"vgg": {**PAPER["vgg"], "data": {"name": data.name}}, "other": {"model": {}, "data": {"name": data.name}}}
    study, table, _ = build(folders.write_study(tmp_path / "s", settings=jpeg, data=data))
    beside = row(table, metric="generalization_gap", setting="vgg", regime="small", method="decay")
    differing = "data, number of images, learning rate, epochs, α"
    assert (beside.paper, beside.not_comparable_in) == (0.074, differing)
    assert frames.select(table, setting="other").paper.isna().all()
    assert "JPEG CIFAR-10" in labels.setting(study, "vgg")
    assert any("† Not comparable" in note for note in paper.notes(study))


def test_against_the_paper_only_settings_that_are_the_papers_get_its_numbers(tmp_path: Path) -> None:
    same = folders.write_study(tmp_path / "same", data=Data(name="cifar10"), batch_sizes=(64, 4096))
    other = folders.write_study(tmp_path / "other", data=Data(name="cifar10", train_size=100))
    for folder, printed in ((same, 0.904), (other, math.nan)):
        study = paper.beside(store.read_study(folder))
        table = table1.frame(study, table1.values(study, frames.epochs(study), frames.runs(study)))
        found = row(table, metric="test_accuracy", setting="vgg", regime="small", method="spectral").paper
        assert found == pytest.approx(printed, nan_ok=True)
    assert any("The paper has no setting" in note for note in paper.notes(study))


STUDY = studies.read_study(Path(__file__).parents[3] / "studies" / "paper.toml")


def test_the_settings_of_the_papers_study_are_the_papers() -> None:
    for point in STUDY.points():
        config = point.config.model_dump(mode="json")
        model, dataset = (STUDY.settings[point.setting].paper or "").split("/")
        assert not paper.differences(config, model, dataset, point.config.batch_size, point.method)
    for name, case in STUDY.settings.items():
        model, dataset = (case.paper or "").split("/")
        thresholds = frames.select(paper.table1(), model=model, dataset=dataset, metric="generalization_gap").threshold
        assert list((case.alpha or {}).values()) == list(thresholds), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.1}, "learning rate"),
        ({"epochs": 2}, "epochs"),
        ({"method": {"name": "decay", "strength": 1e-3}}, "strength"),
        ({"batch_size": 63}, "batch size"),
        ({"data": {"name": "cifar10", "augmentation": {"pad": 4, "flip": True}}}, "augmentation"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_run_that_is_not_trained_as_the_papers_is_not_comparable(change: dict, named: str) -> None:
    point = next(p for p in STUDY.points() if (p.setting, p.regime, p.method) == ("vgg", "small", "decay"))
    config = Config.model_validate(point.config.model_dump() | change).model_dump(mode="json")
    assert paper.differences(config, "vgg", "cifar10", 64, "decay") == (named,)


@pytest.mark.parametrize(("alpha", "differing"), [(0.88, ""), (0.3, "α"), (None, "α")])
def test_gaps_at_another_threshold_than_the_papers_are_marked_and_accuracies_are_not(
    tmp_path: Path, alpha: float | None, differing: str
) -> None:
    settings = {"vgg": PAPER["vgg"] | ({"alpha": {"small": alpha, "large": 0.85}} if alpha else {})}
    settled = {"data": Data(name="cifar10"), "batch_sizes": (64, 4096), "rates": (0.01, 0.1)}
    folder = folders.write_study(tmp_path / "s", long, settings=settings, methods=("decay",), seeds=(0,), **settled)
    study = store.read_study(folder)
    assert paper.row(study, "vgg", "small", "generalization_gap").differing == ((differing,) if differing else ())
    assert paper.row(study, "vgg", "small", "test_accuracy").differing == ()
    assert any("VGG" in note or "vgg" in note for note in paper.notes(study)) == bool(differing)


def test_the_papers_regime_is_the_one_of_the_same_batch_size_wherever_it_stands(tmp_path: Path) -> None:
    study = store.read_study(folders.write_study(tmp_path / "s", settings=PAPER, data=Data(name="cifar10")))
    for regimes, expected in (
        ({"large": {"batch_size": 4096}}, 0.885),
        ({"huge": {"batch_size": 4096}, "tiny": {"batch_size": 64}}, 0.885),
        ({"large": {"batch_size": 128}}, 0.885),
        ({"huge": {"batch_size": 128}}, None),
    ):
        other = replace(study, study=study.study | {"regimes": regimes})
        assert paper.row(other, "vgg", next(iter(regimes)), "test_accuracy").values.get("spectral") == expected


def test_a_setting_with_its_own_batch_size_is_labelled_with_it(tmp_path: Path) -> None:
    settings = {
        "vgg": {"model": {}, "data": {"name": "digits"}, "batch_size": {"large": 100}},
        "other": {"model": {}, "data": {"name": "digits"}},
    }
    study = store.read_study(folders.write_study(tmp_path / "s", settings=settings, seeds=(0,)))
    assert labels.batch(study, "large", "vgg") == "large batch, B = 100"
    assert labels.batch(study, "large") == "large batch"
    assert labels.batch(study, "small") == "small batch, B = 64"


def test_the_packaged_table_is_the_papers() -> None:
    table = paper.table1()
    assert len(table) == 16
    assert row(table, model="densenet40", batch_size=64, metric="generalization_gap").decay == 0.080


def test_a_mean_over_fewer_seeds_is_no_rival_and_says_of_how_many_it_is(tmp_path: Path) -> None:
    accuracy = {"vanilla": 0.9, "decay": 0.8, "adversarial": 0.7, "spectral": 0.6}
    folder = folders.write_study(tmp_path / "s", lambda regime, method, seed: [(0.99, accuracy[method])])
    study = store.read_study(folder)
    runs = [replace(r, status="failed", error="?") if r.method == "vanilla" and r.seed else r for r in study.runs]
    study = replace(study, runs=runs)
    epochs, per_run = frames.epochs(study), frames.runs(study)
    values = table1.values(study, epochs, per_run)
    table = table1.frame(study, values)
    assert list(frames.select(table, metric="test_accuracy", regime="small", best=True).method) == ["decay"]
    cell = table1.exhibit(study, table, values).tables[0].rows[0][1]
    assert "1 of 3 seeds" in cell.small
