"""The paper's claims, on studies in which it is known whether they hold."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pandas as pd
import pytest

from spectreg_lab.exhibits.exhibit import Exhibit
from spectreg_lab.page.exhibits import exhibits
from spectreg_lab.statistics import claims, frames, quantities, verdicts
from spectreg_lab.statistics.paired import Difference
from spectreg_lab.storage import store
from spectreg_lab.tables import fit, table1

ACCURACY = {"vanilla": 0.70, "decay": 0.75, "adversarial": 0.71, "spectral": 0.80}
LOSS_AT_LARGE_BATCH = {"vanilla": 0.10, "decay": 0.08, "adversarial": 0.09, "spectral": 0.02}


def jitter(regime: str, method: str, seed: int) -> float:
    """A little that differs between any two runs, so that no two seeds differ by the very same amount."""
    return 1e-4 * float(np.random.default_rng([seed, len(method), regime == "large"]).random())


def as_the_paper_says(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
    test = ACCURACY[method] - (LOSS_AT_LARGE_BATCH[method] if regime == "large" else 0.0)
    return [(0.6, 0.59), (0.8, test - 0.02), (1.0, test + jitter(regime, method, seed))]


def opposite(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
    return [(train, 1 - test) for train, test in as_the_paper_says(regime, method, seed)]


known: dict[folders.Curve, dict[str, Exhibit]] = {}


def all_exhibits(folder: Path, **options: Any) -> dict[str, Exhibit]:
    """Of a study with these options; where a curve is the only one, made once for all tests that look at them."""
    if options.keys() == {"curve"} and options["curve"] in known:
        return known[options["curve"]]
    study = store.read_study(folders.write_study(folder, **options))
    shown = {exhibit.name: exhibit for exhibit in exhibits(study)}
    if options.keys() == {"curve"}:
        known[options["curve"]] = shown
    return shown


def outcomes(shown: dict[str, Exhibit]) -> dict[str, str]:
    return {verdict.sentence: verdict.outcome for verdict in shown["verdicts"].verdicts}


def outcome_of(shown: dict[str, Exhibit], start: str) -> str:
    (found,) = (outcome for sentence, outcome in outcomes(shown).items() if sentence.startswith(start))
    return found


SECTION_4_1 = (
    "Small batch: decay and spectral",
    "Large batch: spectral has the best",
    "Test accuracy falls",
    "It falls less for spectral",
    "The gap of decay after the last epoch grows",
    "It grows more for decay",
)


@pytest.mark.parametrize(("curve", "expected"), [(as_the_paper_says, "held"), (opposite, "did not hold")])
def test_section_4_1_holds_on_runs_that_do_as_it_says_and_not_on_their_mirror_image(
    tmp_path: Path, curve: folders.Curve, expected: str
) -> None:
    shown = all_exhibits(tmp_path / "s", curve=curve)
    assert {start: outcome_of(shown, start) for start in SECTION_4_1} == dict.fromkeys(SECTION_4_1, expected)
    assert outcome_of(shown, "Every method exceeds 95 %") == "held"


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    shown = all_exhibits(tmp_path / "s", curve=as_the_paper_says, seeds=(0,))
    assert set(outcomes(shown).values()) == {"not decided"}


def test_a_claim_whose_measure_is_missing_is_not_decided_and_says_that_there_is_nothing_to_compare(
    tmp_path: Path,
) -> None:
    shown = all_exhibits(tmp_path / "s", curve=as_the_paper_says)
    lines = {verdict.sentence: verdict.line for verdict in shown["verdicts"].verdicts}
    assert lines["Spectral has the largest eigenvalue (training data)."] == "nothing to compare yet"
    assert outcome_of(shown, "Spectral has the largest eigenvalue (training") == "not decided"


def test_the_page_says_where_spectral_does_not_win_and_which_method_does(tmp_path: Path) -> None:
    shown = all_exhibits(tmp_path / "s", curve=opposite)
    sentence = shown["verdicts"].summary[-2]
    assert sentence.startswith(
        "Test accuracy: spectral has the best mean in 0 of 2 rows of Table 1. It does not win in:"
    )
    assert "small batch (vanilla)" in sentence


def measured(regime: str, method: str, seed: int) -> dict[str, Any]:
    sharpness = {"vanilla": 1.0, "decay": 2.0, "adversarial": 3.0, "spectral": 4.0}[method] * (
        1 + 1e-3 * seed * len(method)
    )
    scale = 2.0 + 0.01 * seed if regime == "large" else 1.0
    spectrum = {
        "vanilla": [4.0, 1.0, 1.0],
        "decay": [2.0, 0.5, 0.5],
        "adversarial": [3.0, 1.0, 0.5],
        "spectral": [1.0, 1.0, 0.9],
    }[method]
    return {
        "hessian": {side: {"value": sharpness * scale, "converged": True} for side in ("train", "test")},
        "input_gradient": {"train": (5 - sharpness) / 10, "test": (5 - sharpness) * scale},
        "spectra": {"features.0.weight": [spectrum[0] * (1 + 1e-4 * seed * len(method)), *spectrum[1:]]},
    }


def test_sections_4_3_and_4_4_hold_on_measures_that_do_as_they_say(tmp_path: Path) -> None:
    shown = all_exhibits(tmp_path / "s", curve=as_the_paper_says, measures=measured)
    for start in (
        "Vanilla: the largest eigenvalue",
        "So does that on test data",
        "Regularized models have larger eigenvalues than vanilla (training data)",
        "Spectral has the largest eigenvalue (training data)",
        "Regularized models have larger eigenvalues than vanilla (test data)",
        "Spectral has the largest eigenvalue (test data)",
        "Spectral reduces the gradient norm on test data",
        "It does so at any point: on training data",
        "They keep the skewed shape",
        "The spectra of spectral are flatter",
        "Adversarial and decay shrink",
        "Spectral has the lowest largest singular values",
    ):
        assert outcome_of(shown, start) == "held", start


def test_a_spectrum_is_flat_with_skew_one_and_of_rank_one_with_the_root_of_its_length() -> None:
    assert quantities.shape(np.full(4, 2.0)) == {"largest": 2.0, "frobenius": 4.0, "skew": 1.0}
    assert quantities.shape(np.array([0.0, 3.0, 0.0, 0.0])) == {"largest": 3.0, "frobenius": 3.0, "skew": 2.0}


def line_with(test_norm: Callable[[int], float], train_norm: Callable[[int], float]) -> Callable[..., dict[str, Any]]:
    return lambda regime, method, seed, epoch: {
        "input_gradient": {"test": test_norm(epoch), "train": train_norm(epoch)}
    }


def growing(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
    return [(0.5 + 0.1 * e, 0.5 + 0.05 * e) for e in range(5)]


@pytest.mark.parametrize(
    ("test_norm", "train_norm", "expected"),
    [
        (lambda e: e, lambda e: -e, "held"),
        (lambda e: -e, lambda e: e, "did not hold"),
        (lambda e: 1.0, lambda e: 1.0, "not decided"),
    ],
)
def test_the_gradient_norm_rises_through_training_and_with_the_gap_where_it_does_and_a_constant_one_decides_nothing(
    tmp_path: Path, test_norm: Any, train_norm: Any, expected: str
) -> None:
    shown = all_exhibits(tmp_path / "s", curve=growing, line=line_with(test_norm, train_norm))
    starts = (
        "Through training, the gradient norm on test data",
        "The gradient norm on test data",
        "It does so more than",
    )
    assert [outcome_of(shown, start) for start in starts] == [expected] * 3
    assert outcome_of(shown, "The gradient norm on training data falls") == expected


NAN = math.nan
UP, DOWN, BOTH = Difference(0.2, 0.1, 0.3, 0.01, 3), Difference(-0.2, -0.3, -0.1, 0.01, 3), Difference(0, -1, 1, 1.0, 3)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(UP, "held"), (DOWN, "did not hold"), (BOTH, "not decided"), (Difference(0.2, NAN, NAN, NAN, 1), "not decided")],
)
def test_a_comparison_is_judged_by_which_side_of_zero_its_interval_lies(difference: Difference, verdict: str) -> None:
    assert verdicts.judge([difference]) == [verdict]


def test_one_comparison_among_many_refutes_a_claim_only_where_it_would_after_holms_correction() -> None:
    assert verdicts.judge([DOWN, *[UP] * 3]) == ["did not hold", *["held"] * 3]  # 4 × 0.01 < 0.05
    assert verdicts.judge([DOWN, *[UP] * 4]) == ["not decided", *["held"] * 4]  # 5 × 0.01
    assert verdicts.judge([DOWN, *[Difference(NAN, NAN, NAN, NAN, 0)] * 9])[0] == "did not hold"  # not compared


def test_runs_that_all_differ_by_the_same_amount_decide_nothing_but_a_training_accuracy_of_one_does(
    tmp_path: Path,
) -> None:
    def shown(train: float) -> dict[str, Exhibit]:
        folder = tmp_path / str(train)
        return all_exhibits(folder, curve=lambda regime, method, seed: [(train, ACCURACY[method])])

    of_one = shown(1.0)
    assert outcome_of(of_one, "Large batch: spectral has the best") == "not decided"
    assert outcome_of(of_one, "Every method exceeds 95 %") == "held"
    assert outcome_of(shown(0.97), "Every method exceeds 95 %") == "not decided"
    assert outcome_of(shown(0.9), "Every method exceeds 95 %") == "not decided"


def test_the_visible_line_of_a_claim_has_its_worst_statement_with_interval_and_n(tmp_path: Path) -> None:
    shown = all_exhibits(tmp_path / "s", curve=as_the_paper_says)["verdicts"]
    (verdict,) = (verdict for verdict in shown.verdicts if verdict.sentence.startswith("Large batch"))
    pooled, singles = verdict.tables
    rows = shown.frame[(shown.frame.claim == verdict.sentence) & (shown.frame.setting == "all")].reset_index()
    what, difference, *_ = pooled.rows[rows.p.idxmax()]
    assert verdict.line.startswith(f"{what.text}: {difference.text}")
    assert verdict.line.endswith("single comparisons: 3 held")
    assert re.search(r"\[\+0\.\d+, \+0\.\d+\] over 1 setting, n = 3; P\(improvement\) 1\.00", verdict.line)
    assert len(singles.rows) == len(pooled.rows) == 3


def test_the_deciding_statement_is_the_one_with_most_evidence_against_the_claim() -> None:
    against, unclear = [-0.1, -0.11, -0.09], [-9.0, -90.0, 72.0]
    values = {"up": [0.1, 0.2, 0.3], "unclear": unclear, "against": against}
    compared = [claims.Comparison("vgg", what, pd.Series(v), pd.Series([0.0] * 3)) for what, v in values.items()]
    assert verdicts.worst(verdicts.statements(compared)).what == "against"
    assert verdicts.worst(verdicts.statements(compared[:2])).what == "unclear"


def test_the_setting_that_stands_for_the_densenet_on_stl_10_is_left_out_of_the_claims_that_except_it(
    tmp_path: Path,
) -> None:
    def settings(paper: str | None) -> dict[str, dict[str, Any]]:
        return {"net": {"model": {}, "data": {}, "paper": paper}}

    def last(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
        return opposite(regime, method, seed)[-1:]

    other = all_exhibits(tmp_path / "other", curve=last, settings=settings("vgg/cifar10"))
    excepted = all_exhibits(tmp_path / "excepted", curve=last, settings=settings("densenet22/stl10"))
    for start in ("Spectral has the smallest generalization gap", "Decay has the next smallest"):
        assert (outcome_of(other, start), outcome_of(excepted, start)) == ("did not hold", "not decided")
    assert outcome_of(excepted, "Large batch: spectral has the best") == "did not hold"


@pytest.mark.parametrize(("sign", "expected"), [(-1, "held"), (1, "did not hold")])
def test_an_eigenvalue_that_falls_with_the_gap_predicts_it_as_well_as_one_that_rises(sign: int, expected: str) -> None:
    gap = [0.1, 0.2, 0.3, 0.4, 0.5]
    swapped = [[0.1, 0.3, 0.2, 0.4, 0.5], [0.2, 0.1, 0.4, 0.3, 0.5], [0.1, 0.3, 0.2, 0.5, 0.4]]
    runs = pd.concat(
        pd.DataFrame({"setting": "vgg", "regime": "small", "method": list("abcde"), "seed": seed, "gap": gap}).assign(
            exact=[-value for value in gap], partly=partly
        )
        for seed, partly in enumerate(swapped)
    )
    numbers = quantities.Numbers(runs, ("vgg",), ("small",), tuple("abcde"))
    first, second = ("exact", "partly") if sign < 0 else ("partly", "exact")
    claim = claims.Claim("4.3", "", (claims.Predicts(first, second),))
    assert verdicts.judged(claim, numbers).outcome == expected


def of_spectral(accuracy: float, train: float) -> folders.Curve:
    """Others end at 0.99 and 0.8."""

    def curve(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
        ends = (train, accuracy) if method == "spectral" else (0.99, 0.8)
        return [(ends[0], ends[1] + jitter(regime, method, seed))]

    return curve


@pytest.mark.parametrize(
    ("accuracy", "train", "expected"),
    [(0.9, 1.0, "held"), (0.7, 0.75, "held"), (0.7, 0.99, "did not hold")],
    ids=["best accuracy", "smallest gap", "neither"],
)
def test_appendix_a_asks_for_the_best_accuracy_or_the_smallest_gap(
    tmp_path: Path, accuracy: float, train: float, expected: str
) -> None:
    shown = all_exhibits(tmp_path / "s", curve=of_spectral(accuracy, train))
    assert outcome_of(shown, "In every setting, spectral has the smallest generalization gap or") == expected


def test_the_page_says_on_how_many_epochs_the_correlations_rest(tmp_path: Path) -> None:
    def line(regime: str, method: str, seed: int, epoch: int) -> dict[str, Any]:
        return {"input_gradient": {"test": 1.0, "train": 1.0}} if epoch > 1 else {}

    shown = all_exhibits(tmp_path / "s", curve=growing, line=line)
    assert any("at which both were measured, 4 a run" in note for note in shown["verdicts"].notes)


def measured_at(epochs: dict[str, int]) -> quantities.Numbers:
    """Of two seeds, Fisher's z of a correlation of 1 in each of the settings, of so many epochs."""
    column = quantities.through("input_gradient_test", "epoch")
    rows = [
        {"setting": setting, "regime": "small", "method": "vanilla", "seed": seed}
        | {column: quantities.fisher(1.0, count), quantities.points(column): count}
        for setting, count in epochs.items()
        for seed in (0, 1)
    ]
    return quantities.Numbers(pd.DataFrame(rows), tuple(epochs), ("small",), ("vanilla",))


@pytest.mark.parametrize("epochs", [{"vgg": 5}, {"vgg": 5, "nin": 5}, {"vgg": 5, "nin": 8}], ids=str)
def test_a_correlation_of_one_in_every_run_decides_however_many_epochs_a_setting_has(epochs: dict[str, int]) -> None:
    claim = claims.Claim("4.2", "", (claims.Correlates("z_input_gradient_test_epoch"),))
    decision = verdicts.judged(claim, measured_at(epochs))
    assert decision.outcome == "held"
    assert {row["verdict"] for row in verdicts.singles(decision, measured_at(epochs))} == {"held"}


def test_a_correlation_with_the_gap_is_of_the_epochs_that_have_a_gap(tmp_path: Path) -> None:
    """Measured at every second epoch, evaluated at every third: of twelve epochs two have both, of eighteen three."""

    def line(regime: str, method: str, seed: int, epoch: int) -> dict[str, Any]:
        evaluated = {} if epoch % 3 == 0 else dict.fromkeys(["train_accuracy", "test_accuracy"])
        return evaluated | ({"input_gradient": {"test": 1.0 + epoch, "train": 1.0}} if epoch % 2 == 0 else {})

    def curve(regime: str, method: str, seed: int) -> list[tuple[float, float]]:
        return [(0.9, 0.9 - 0.01 * epoch) for epoch in range(18)]

    study = store.read_study(folders.write_study(tmp_path / "s", curve=curve, line=line))
    numbers = quantities.numbers(study, frames.runs(study), frames.epochs(study))
    z = numbers.of("vgg", "small", "vanilla", quantities.through("input_gradient_test", "gap"))
    assert z.to_list() == [quantities.fisher(1.0, 3)] * 3
    assert numbers.measured == (3, 9)


def test_a_study_that_is_kept_with_seven_digits_has_the_verdicts_that_it_had() -> None:
    """Of 397 images spectral has three more right, in both seeds: what a third would have, nobody knows."""

    def numbers(digits: int) -> quantities.Numbers:
        rows = [
            {
                "setting": "vgg",
                "regime": "small",
                "method": method,
                "seed": seed,
                "test_accuracy": round(right / 397, digits),
            }
            for seed, least in enumerate((340, 343))
            for method, right in (("vanilla", least), ("spectral", least + 3))
        ]
        return quantities.Numbers(pd.DataFrame(rows), ("vgg",), ("small",), ("vanilla", "spectral"))

    claim = claims.Claim("4.1", "", (claims.Above("test_accuracy", ("spectral",), ("vanilla",)),))
    assert [verdicts.judged(claim, numbers(digits)).outcome for digits in (16, 7)] == ["not decided"] * 2


def test_the_line_of_a_claim_says_which_comparison_it_lacks(tmp_path: Path) -> None:
    shown = all_exhibits(tmp_path / "s", curve=as_the_paper_says, methods=("vanilla", "spectral"))
    (claim,) = (v for v in shown["verdicts"].verdicts if v.sentence.startswith("Large batch: spectral"))
    assert claim.outcome == "not decided"
    assert "no two seeds of spectral − decay, large batch, spectral − adversarial, large batch ·" in claim.line


def test_a_claim_holds_only_where_every_comparison_does_and_fails_where_one_does() -> None:
    held, failed, undecided = "held", "did not hold", "not decided"
    assert verdicts.outcome([held, held]) == held
    assert verdicts.outcome([held, undecided]) == undecided
    assert verdicts.outcome([held, undecided, failed]) == failed
    assert verdicts.outcome([]) == undecided


def test_a_method_that_did_not_fit_its_training_data_is_warned_of_at_the_top(tmp_path: Path) -> None:
    folder = folders.write_study(
        tmp_path / "s", lambda regime, method, seed: [(0.94 if (method, seed) == ("decay", 1) else 0.99, 0.8)]
    )
    shown = fit.exhibit(study := store.read_study(folder), frames.runs(study))
    assert len(shown.warnings) == 2
    assert all("decay did not reach a training accuracy over 0.95" in warning for warning in shown.warnings)
    assert shown.tables[0].rows[0][2].small == ["1 of 3 seeds did not fit"]


def test_the_correlation_of_ranks_is_one_for_any_rising_relation_and_none_for_two_points() -> None:
    rows = pd.DataFrame({"gap": [0.1, 0.2, 0.3, 0.4], "norm": [1.0, 10.0, 100.0, math.inf]})
    assert quantities.rank_correlation(rows, "norm")[0] == 1.0
    assert math.isnan(quantities.rank_correlation(rows.head(2), "norm")[0])


def test_a_study_without_spectral_has_its_tables_and_decides_nothing_about_it(tmp_path: Path) -> None:
    shown = all_exhibits(tmp_path / "s", curve=as_the_paper_says, methods=("vanilla", "decay"))
    assert outcome_of(shown, "Large batch: spectral") == "not decided"
    assert shown["table1"].frame.p.isna().all()
    assert set(table1.METRICS) == set(shown["table1"].frame.metric)


def test_the_first_sentences_say_what_was_compared_and_what_differences_could_be_seen(tmp_path: Path) -> None:
    shown = all_exhibits(tmp_path / "s", curve=as_the_paper_says)["verdicts"]
    compared, came_out, *_ = shown.summary
    assert compared == (
        "4 methods (vanilla, decay, adversarial, spectral) on 1 setting, small batch, B = 64 and large batch, "
        "B = 512: 24 of 24 runs are finished, 3 seeds of each."
    )
    rows = shown.frame[
        (shown.frame.claim == "Large batch: spectral has the best accuracy.") & (shown.frame.setting == "all")
    ]
    least = 100 * rows.detectable[rows.p.idxmax()]
    assert f"a difference in test accuracy of {least:.2g} points or more" in came_out
    assert came_out.endswith("This study names no commit that fixed its claims and the rule before its first run.")


def test_claims_about_methods_that_a_study_does_not_have_are_not_part_of_it(tmp_path: Path) -> None:
    path = folders.write_study(tmp_path / "s", as_the_paper_says) / store.STUDY
    record = json.loads(path.read_text())
    record["study"]["methods"] = {name: {} for name in ("vanilla", "decay")}
    record["points"] = [point for point in record["points"] if point["method"] in ("vanilla", "decay")]
    path.write_text(json.dumps(record))
    shown = {exhibit.name: exhibit for exhibit in exhibits(store.read_study(tmp_path / "s"))}["verdicts"]
    lines = {verdict.sentence: verdict.line for verdict in shown.verdicts}
    assert lines["It does so at any point: on training data, too."] == "not part of this study"
    assert lines["Vanilla: the largest eigenvalue of the Hessian on training data grows with the batch."] == (
        "nothing to compare yet"
    )
    assert f"{list(lines.values()).count('not part of this study')} not part of this study" in shown.summary[1]
    assert shown.summary[2].startswith("Test accuracy, mean over seeds: ")
    assert "vanilla 0.700" in shown.summary[2]
    assert not any("spectral has the best mean" in sentence for sentence in shown.summary)


def test_a_study_that_names_the_commit_of_its_claims_says_so_at_the_top(tmp_path: Path) -> None:
    folders.write_study(tmp_path / "s", as_the_paper_says)
    path = tmp_path / "s" / store.STUDY
    record = json.loads(path.read_text())
    record["study"]["registered"] = "0123abc"
    path.write_text(json.dumps(record))
    shown = {exhibit.name: exhibit for exhibit in exhibits(store.read_study(tmp_path / "s"))}
    assert "fixed before the first run, in commit 0123abc" in shown["verdicts"].summary[1]


def test_a_claim_that_points_back_is_quoted_with_the_claim_it_points_to() -> None:
    place = next(i for i, c in enumerate(verdicts.CLAIMS) if c.sentence.startswith("It does so at any point"))
    assert verdicts._standing_alone(place) == (
        "It does so at any point: on training data, too (said after “Spectral reduces the gradient norm on test data "
        "(against vanilla)”)."
    )
    assert verdicts._standing_alone(place - 1) == verdicts.CLAIMS[place - 1].sentence


def test_the_small_batch_is_the_smaller_one_wherever_the_study_names_it(tmp_path: Path) -> None:
    study = store.read_study(folders.write_study(tmp_path / "s", curve=as_the_paper_says))
    regimes = study.study["regimes"]
    swapped = replace(study, study=study.study | {"regimes": dict(reversed(regimes.items()))})
    first, second = ({e.name: e for e in exhibits(s)} for s in (study, swapped))
    assert list(swapped.study["regimes"]) == ["large", "small"]
    assert outcomes(first) == outcomes(second)


def test_methods_without_a_finished_run_count_as_none(tmp_path: Path) -> None:
    study = store.read_study(folders.write_study(tmp_path / "s", curve=as_the_paper_says))
    runs = [replace(r, status="failed", error="?") if r.method == "decay" else r for r in study.runs]
    shown = {e.name: e for e in exhibits(replace(study, runs=runs))}
    assert "0 to 3 seeds of each" in shown["verdicts"].summary[0]
