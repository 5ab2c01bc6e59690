"""What became of each claim of the paper."""

from collections import Counter
from dataclasses import dataclass

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.claims import (
    BASELINES,
    METHODS,
    Comparison,
    Comparisons,
    Numbers,
    batch,
    batch_more,
    fits,
    goes_with_the_gap,
    more,
    predicts_better,
)
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table, Verdict, signed
from spectreg_lab.exhibits.frames import records, regimes, select
from spectreg_lab.exhibits.paired import Difference
from spectreg_lab.store import StudyRecord

HELD, NOT, OPEN = "held", "did not hold", "not decided"
TONES = {HELD: "good", NOT: "bad", OPEN: "open"}
SMALL, LARGE = slice(0, 1), slice(1, None)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and what it says about pairs of runs."""

    section: str
    sentence: str
    comparisons: Comparisons


SPECTRAL, OTHERS = ("spectral",), ("vanilla", "adversarial")
CLAIMS = (
    Claim(
        "4.1",
        "Small batch: decay and spectral have better test accuracy than vanilla and adversarial.",
        more("test_accuracy", ("decay", "spectral"), OTHERS, SMALL),
    ),
    Claim("4.1", "Large batch: spectral has the best accuracy.", more("test_accuracy", SPECTRAL, BASELINES, LARGE)),
    Claim("4.1", "Test accuracy falls as the batch grows.", batch("test_accuracy", METHODS)),
    Claim(
        "4.1",
        "It falls less for spectral than for the other methods.",
        batch_more("test_accuracy", BASELINES, "spectral"),
    ),
    Claim("4.1", "Spectral has the smallest generalization gap at α.", more("generalization_gap", BASELINES, SPECTRAL)),
    Claim("4.1", "Decay has the next smallest.", more("generalization_gap", OTHERS, ("decay",))),
    Claim("4.1", "The gap of decay grows with the batch.", batch("gap", ("decay",), -1)),
    Claim("4.1", "It grows more for decay than for spectral.", batch_more("gap", ("decay",), "spectral", -1)),
    Claim("4.1", "Every method exceeds 95 % training accuracy in both regimes.", fits),
    Claim(
        "4.2",
        "Through training, the gradient norm on test data rises with the gap.",
        goes_with_the_gap("input_gradient_test"),
    ),
    Claim(
        "4.2",
        "It goes with the gap better than the gradient norm on training data.",
        goes_with_the_gap("input_gradient_test", "input_gradient_train"),
    ),
    Claim(
        "4.2", "Spectral has the smallest gradient norm on test data.", more("input_gradient_test", BASELINES, SPECTRAL)
    ),
    Claim("4.2", "Spectral fits the training data better than decay.", more("train_accuracy", SPECTRAL, ("decay",))),
    Claim(
        "4.3",
        "Vanilla: the largest eigenvalue of the Hessian on training data grows with the batch.",
        batch("hessian_train", ("vanilla",), -1),
    ),
    Claim("4.3", "So does that on test data.", batch("hessian_test", ("vanilla",), -1)),
    Claim(
        "4.3",
        "Regularized models have larger eigenvalues than vanilla (training data).",
        more("hessian_train", ("decay", "adversarial", "spectral"), ("vanilla",)),
    ),
    Claim("4.3", "Spectral has the largest eigenvalue (training data).", more("hessian_train", SPECTRAL, BASELINES)),
    Claim(
        "4.3",
        "Over methods and regimes, the gradient norm on test data predicts the gap better than the eigenvalue does.",
        predicts_better("input_gradient_test", "hessian_train"),
    ),
    Claim(
        "4.4",
        "The spectra of spectral are flatter than those of every other method.",
        more("skew", BASELINES, SPECTRAL),
    ),
    Claim(
        "4.4",
        "Adversarial and decay shrink the spectra of vanilla.",
        more("frobenius", ("vanilla",), ("decay", "adversarial")),
    ),
    Claim("4.4", "Spectral has the lowest largest singular values.", more("largest", BASELINES, SPECTRAL)),
)


def judge(difference: Difference) -> str:
    """Held or not where the 95 % interval lies on one side of zero; otherwise, or for one seed, not decided."""
    if difference.low > 0:
        return HELD
    return NOT if difference.high < 0 else OPEN


def outcome(verdicts: list[str]) -> str:
    """A claim held where every comparison did, did not where any did not, and is otherwise not decided."""
    if NOT in verdicts:
        return NOT
    return HELD if verdicts and set(verdicts) == {HELD} else OPEN


def _counts(comparisons: list[Comparison], verdicts: list[str]) -> str:
    if not any(comparison.difference.n for comparison in comparisons):
        return "nothing to compare yet"
    counted = Counter(verdicts)
    means = [comparison.difference.mean for comparison in comparisons if comparison.difference.n]
    seeds = [comparison.difference.n for comparison in comparisons]
    n = str(min(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    return " · ".join(
        [
            *(f"{name} {counted[name]}" for name in (HELD, OPEN, NOT) if counted[name]),
            f"mean {signed(min(means))} to {signed(max(means))}" if len(means) > 1 else f"mean {signed(means[0])}",
            f"n = {n}",
        ]
    )


def _verdict(study: StudyRecord, claim: Claim, numbers: Numbers) -> tuple[Verdict, list[dict[str, object]]]:
    comparisons = list(claim.comparisons(numbers))
    judged = [judge(comparison.difference) for comparison in comparisons]
    rows = [
        [
            Cell(labels.setting(study, found.setting)),
            Cell(found.what),
            Cell(str(found.difference)),
            Cell(verdict, tone=TONES[verdict]),
        ]
        for found, verdict in zip(comparisons, judged, strict=True)
    ]
    table = Table(["setting", "comparison", "mean difference [95 % interval]", "verdict"], rows)
    data = [
        {
            "section": claim.section,
            "claim": claim.sentence,
            "setting": found.setting,
            "comparison": found.what,
            **vars(found.difference),
            "verdict": verdict,
        }
        for found, verdict in zip(comparisons, judged, strict=True)
    ]
    return Verdict(claim.section, claim.sentence, outcome(judged), _counts(comparisons, judged), table), data


def _rows_won(study: StudyRecord, table: pd.DataFrame, metric: str, what: str) -> str:
    lost, rows = [], 0
    for setting, regime in regimes(study):
        here = select(table, metric=metric, setting=setting, regime=regime)
        best = [row["method"] for row in records(select(here, best=True))]
        rows += bool(best)
        if best and "spectral" not in best:
            lost.append(f"{labels.setting(study, setting)}, {regime} batch ({' and '.join(best)})")
    if not rows:
        return f"{what}: nothing to compare yet."
    sentence = f"{what}: spectral has the best mean in {rows - len(lost)} of {rows} rows of Table 1."
    return sentence + (f" It does not win in: {'; '.join(lost)}." if lost else "")


def exhibit(study: StudyRecord, numbers: Numbers, table: pd.DataFrame) -> Exhibit:
    """Every claim with its verdict, and where spectral does not win."""
    found = [_verdict(study, claim, numbers) for claim in CLAIMS]
    counted = Counter(verdict.outcome for verdict, _ in found)
    tally = ", ".join(f"{counted[name]} {name}" for name in (HELD, OPEN, NOT))
    return Exhibit(
        name="verdicts",
        title="What the paper claims, and what held",
        claim="",
        frame=pd.DataFrame([row for _, rows in found for row in rows]),
        verdicts=[verdict for verdict, _ in found],
        summary=[
            f"Of {len(found)} claims: {tally}.",
            _rows_won(study, table, "test_accuracy", "Test accuracy"),
            _rows_won(study, table, "generalization_gap", "Generalization gap"),
        ],
        notes=[
            "A comparison is a difference paired over the seeds that both sides have; positive is what the paper says. "
            "It held where Student's 95 % interval lies above zero, did not where it lies below, and is not decided "
            "otherwise or with fewer than two seeds. A claim held where all its comparisons did, and did not where any "
            "did not. The intervals are not corrected for the number of comparisons.",
            "Differences of spectra are of logarithms, mean over the weights of a network: of the largest singular "
            "value, of the Frobenius norm, and of the largest over the root mean square (flat is 0).",
        ],
    )
