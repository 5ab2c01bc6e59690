"""Statements pooled over settings: their intervals, what they could have seen, and how often they err."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spectreg_lab.statistics import verdicts
from spectreg_lab.statistics.claims import Claim, Comparison, Exceeds
from spectreg_lab.statistics.paired import Difference, between, interval, paired
from spectreg_lab.statistics.pooled import pool, welch
from spectreg_lab.statistics.quantities import Numbers, fisher, of_run
from spectreg_lab.statistics.registered import PAPER, table
from spectreg_lab.storage.store import RunRecord


def sides(*differences: list[float]) -> list[tuple[pd.Series, pd.Series]]:
    return [(pd.Series(values), pd.Series(0.0, index=range(len(values)))) for values in differences]


def null(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance over seeds (last axis) of draws whose spread differs from setting to setting."""
    draws = np.random.default_rng(seed)
    values = draws.normal(size=shape) * np.exp(0.7 * draws.normal(size=shape[:-1]))[..., None]
    return values.mean(-1), values.var(-1, ddof=1)


def test_one_setting_pooled_is_students_paired_test() -> None:
    first, second = pd.Series([0.5, 0.7, 0.9]), pd.Series([0.4, 0.3, 0.8])
    alone, pooled = paired(first, second), pool([(first, second)])
    assert [pooled.mean, pooled.low, pooled.high, pooled.p] == pytest.approx(
        [alone.mean, alone.low, alone.high, alone.p]
    )


def test_two_settings_pooled_are_welchs_test_of_their_sum() -> None:
    a, b = [0.1, 0.3, 0.2, 0.5], [0.0, 0.9, 0.4]
    test = stats.ttest_ind(a, [-value for value in b], equal_var=False)  # mean(a) − mean(−b) = 2 × the pooled mean
    ends = [end / 2 for end in test.confidence_interval(0.95)]
    pooled = pool(sides(a, b))
    assert [pooled.p, pooled.low, pooled.high] == pytest.approx([test.pvalue, *ends])
    assert (pooled.settings, pooled.n) == (2, 7)


def test_the_interval_covers_the_truth_in_95_of_100_studies_where_the_percentile_bootstrap_does_in_81() -> None:
    means, variances = null((20000, 4, 3))
    half, p = welch(means, variances, np.full(4, 3), 0.05)
    assert np.mean(abs(means.mean(-1)) <= half) == pytest.approx(0.95, abs=0.01)
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.01)

    draws = np.random.default_rng(1)
    values = draws.normal(size=(400, 4, 3)) * np.exp(0.7 * draws.normal(size=(400, 4, 1)))
    resampled = np.take_along_axis(values[:, None], draws.integers(3, size=(400, 500, 4, 3)), axis=3)
    low, high = np.percentile(resampled.mean((2, 3)), [2.5, 97.5], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.88


def test_under_the_null_a_claim_of_24_statements_is_refuted_no_oftener_than_in_one_case_of_20() -> None:
    means, variances = null((4000, 24, 4, 3))
    half, p = welch(means, variances, np.full(4, 3), 0.05)
    mean = means.mean(-1)
    found = [
        verdicts.outcome(verdicts.judge([Difference(m, m - h, m + h, q, 12) for m, h, q in zip(*claim, strict=True)]))
        for claim in zip(mean, half, p, strict=True)
    ]
    assert found.count("did not hold") / len(found) <= 0.055
    assert found.count("held") == 0


APPENDIX_A = next(claim for claim in PAPER if claim.section == "A")


def tie(accuracy: np.ndarray, gap: np.ndarray) -> Numbers:
    """Spectral level with decay in accuracy and gap but for noise, the other two far behind."""
    rows = []
    for i, (method, level, least) in enumerate(
        [("vanilla", 0.5, 0.9), ("adversarial", 0.5, 0.9), ("decay", 0.7, 0.3), ("spectral", 0.7, 0.3)]
    ):
        for seed in range(accuracy.shape[1]):
            values = {"test_accuracy": level + accuracy[i, seed], "generalization_gap": least + gap[i, seed]}
            rows.append({"setting": "a", "regime": "small", "method": method, "seed": seed} | values)
    return Numbers(pd.DataFrame(rows), ("a",), ("small",), ("vanilla", "adversarial", "decay", "spectral"))


def test_appendix_a_judges_the_better_of_accuracy_and_gap_each_at_half_of_the_level() -> None:
    draws = np.random.default_rng(0)
    accuracy, gap = 0.01 * draws.normal(size=(2, 4, 4))
    decision = verdicts.judged(APPENDIX_A, tie(accuracy, gap))
    differences = {
        "spectral − decay, small batch": accuracy[3] - accuracy[2],
        "decay − spectral, small batch": gap[2] - gap[3],
    }
    found = {s.what: s.pooled for statements in decision.alternatives for s in statements}
    for what, values in differences.items():
        ends = stats.ttest_1samp(values, 0).confidence_interval(0.975)
        assert [found[what].low, found[what].high] == pytest.approx(list(ends))


def test_a_tie_in_accuracy_and_in_gap_holds_appendix_a_in_2_5_of_100_studies_and_without_the_correction_in_5() -> None:
    means, variances = null((20000, 2, 1, 4))  # of accuracy and of gap, in one setting with four seeds
    for level, expected in ((verdicts.LEVEL / 2, 0.025), (verdicts.LEVEL, 0.05)):
        half, _ = welch(means, variances, np.array([4]), level)
        held = (means.mean(-1) - half > 0).any(-1)
        assert held.mean() == pytest.approx(expected, abs=0.004)


def test_the_least_detectable_effect_is_found_in_four_of_five_studies_that_have_it() -> None:
    values = [
        [0.1, 0.3, 0.2, 0.0, 0.4],
        [0.4, 0.1, 0.1, 0.2, 0.1],
        [0.0, 0.2, 0.3, 0.1, 0.3],
        [0.5, 0.3, 0.2, 0.2, 0.4],
    ]
    effect = pool(sides(*values)).detectable
    draws = np.random.default_rng(0).normal(size=(4000, 4, 5)) * np.std(values, axis=1, ddof=1)[:, None] + effect
    half, _ = welch(draws.mean(-1), draws.var(-1, ddof=1), np.full(4, 5), 0.05)
    assert np.mean(draws.mean((1, 2)) - half > 0) == pytest.approx(0.8, abs=0.05)


def test_as_many_seeds_as_are_named_would_detect_the_mean_and_one_less_would_not() -> None:
    values = [[0.1, -0.3, 0.2], [0.4, -0.1, 0.1], [0.0, 0.2, -0.1], [0.5, -0.3, 0.2]]
    pooled = pool(sides(*values))
    assert pooled.needed is not None
    spread = np.sqrt(np.var(values, axis=1, ddof=1).sum()) / 4

    def detectable(seeds: int) -> float:
        parts = np.var(values, axis=1, ddof=1)
        freedom = (seeds - 1) * parts.sum() ** 2 / (parts**2).sum()
        return (stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom)) * spread / math.sqrt(seeds)

    assert detectable(pooled.needed) <= pooled.mean < detectable(pooled.needed - 1)
    assert pool(sides([1.0, -1.0001], [1.0, -1.0])).needed is None


def test_the_probability_of_improvement_counts_pairs_of_runs_setting_by_setting_and_ties_by_half() -> None:
    better = (pd.Series([0.5, 0.6]), pd.Series([0.4, 0.55]))  # three of four pairs
    level = (pd.Series([0.5, 0.7]), pd.Series([0.5, 0.7]))  # one above, one below, two ties
    pooled = pool([better, level])
    assert pooled.improvement == pytest.approx((0.75 + 0.5) / 2)
    assert 0 <= pooled.improvement_low < pooled.improvement < pooled.improvement_high <= 1


def test_a_setting_with_one_seed_does_not_enter_and_two_alike_settings_decide_nothing_short_of_their_bound() -> None:
    assert pool(sides([0.1, 0.2, 0.3], [9.0])).mean == pytest.approx(0.2)
    alike = pool(sides([0.1, 0.1], [0.2, 0.2]))
    assert (math.isnan(alike.low), math.isnan(alike.p)) == (True, True)
    assert pool(sides([0.05, 0.05], [0.05, 0.05]), [(-0.95, 0.05)] * 2).low == 0.05
    assert str(pool(sides([1.0]))) == "no setting with two seeds"


def test_intervals_stay_within_what_can_be() -> None:
    assert pool(sides([0.04, 0.05, 0.02], [0.05, 0.05, 0.04]), [(-0.95, 0.05)] * 2).high == 0.05
    assert interval(pd.Series([0.9, 0.99, 0.3]), (-1, 1)).high == 1
    outside = interval(pd.Series([-1.2, -1.5, -1.4]), (-0.95, 0.05))
    assert outside.low <= outside.mean <= outside.high
    found = interval(pd.Series([fisher(r, 6) for r in (1.0, 0.9, 0.6)]))
    assert -1 < math.tanh(found.low) < math.tanh(found.mean) < math.tanh(found.high) < 1
    assert found.text("correlation").startswith("+0.891 [−0.331, +0.997]")


def test_one_correction_holds_in_table_1_and_beneath_the_verdicts_for_all_pairs_of_methods() -> None:
    draws = np.random.default_rng(3)
    numbers = tie(0.01 * draws.normal(size=(4, 4)), 0.01 * draws.normal(size=(4, 4)))
    by_method = {name: numbers.of("a", "small", name, "test_accuracy") for name in numbers.methods}
    corrected = between(by_method)
    assert len(corrected) == 6
    for section, start in (("4.1", "Small batch"), ("A", "In every setting")):
        claim = next(c for c in PAPER if c.section == section and c.sentence.startswith(start))
        singles = verdicts.singles(verdicts.judged(claim, numbers), numbers)
        for row in singles:
            if row["comparison"].pair[1] == "test_accuracy":
                assert row["p_holm"] == corrected[row["comparison"].pair[2]]


def test_what_is_the_same_in_several_settings_is_one_statement_and_a_claim_needs_all_of_its_statements() -> None:
    numbers = Numbers(
        pd.DataFrame(
            [
                {
                    "setting": s,
                    "regime": r,
                    "method": "spectral",
                    "seed": k,
                    "accuracy": 0.96 + 0.001 * k * (r == "small"),
                }
                for s in "ab"
                for r in ("small", "large")
                for k in range(3)
            ]
        ),
        ("a", "b"),
        ("small", "large"),
    )
    claim = Claim("4.1", "", (Exceeds("accuracy", ("spectral",), 0.95),))
    decision = verdicts.judged(claim, numbers)
    assert [statement.what for statement in decision.alternatives[0]] == [
        "spectral − 0.95, small batch",
        "spectral − 0.95, large batch",
    ]
    assert [statement.pooled.settings for statement in decision.alternatives[0]] == [2, 2]
    assert (decision.verdicts, decision.outcome) == ((("held", "not decided"),), "not decided")


def test_a_claim_of_alternatives_holds_where_one_does_and_fails_where_all_do() -> None:
    assert verdicts.either(["did not hold", "held"]) == "held"
    assert verdicts.either(["did not hold", "not decided"]) == "not decided"
    assert verdicts.either(["did not hold", "did not hold"]) == "did not hold"


def test_a_comparison_keeps_its_direction() -> None:
    up = Comparison("a", "x", pd.Series([0.3, 0.4, 0.5]), pd.Series([0.1, 0.1, 0.1]))
    assert verdicts.statements([up])[0].pooled.mean > 0


def test_the_claims_in_the_docs_are_those_that_are_judged() -> None:
    assert table() in (Path(__file__).parents[3] / "docs" / "claims.md").read_text()


def test_an_estimate_of_sigma_is_judged_by_the_worst_weight_of_each_epoch_above_or_below() -> None:
    lines = [
        {"sigma": {"a": 2.0, "b": 1.0}, "sigma_estimate": {"a": 1.9, "b": 1.0}},
        {"sigma": {"a": 2.0, "b": 1.0}, "sigma_estimate": {"a": 2.0, "b": 1.15}},
        {"sigma": {"a": 2.0, "b": 0.0}, "sigma_estimate": {"b": 0.0}},
    ]
    run = RunRecord("vgg", "small", "spectral", 0, Path("run"), "finished", None, {}, {}, lines, {})
    assert of_run(run)["misjudged"] == pytest.approx((0.05 + 0.15) / 2)


def test_what_was_not_measured_is_no_number() -> None:
    run = RunRecord("vgg", "small", "vanilla", 0, Path("run"), "finished", None, {}, {}, [{"sigma": {"a": 1.0}}], {})
    assert all(math.isnan(value) for value in of_run(run).values())
