"""What became of each claim of the paper."""

import math
from collections import Counter
from dataclasses import dataclass

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table, Verdict, signed
from spectreg_lab.statistics.claims import (
    BASELINES,
    METHODS,
    Comparison,
    Comparisons,
    Numbers,
    batch,
    batch_more,
    best_or_smallest,
    but_for_stl10,
    fits,
    more,
    nearer,
    predicts_better,
    rises,
    worst,
)
from spectreg_lab.statistics.frames import POINT, records, regimes, select
from spectreg_lab.statistics.paired import Difference, holm
from spectreg_lab.storage.store import StudyRecord

HELD, NOT, OPEN = "held", "did not hold", "not decided"
TONES = {HELD: "good", NOT: "bad", OPEN: "open"}
SMALL, LARGE = slice(0, 1), slice(1, None)
LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and what it says about pairs of runs."""

    section: str
    sentence: str
    comparisons: Comparisons


SIDES = {"train": "training data", "test": "test data"}
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
    Claim(
        "4.1",
        "Spectral has the smallest generalization gap at α, the DenseNet on STL-10 excepted.",
        but_for_stl10(more("generalization_gap", BASELINES, SPECTRAL)),
    ),
    Claim(
        "4.1",
        "Decay has the next smallest, with the same exception.",
        but_for_stl10(more("generalization_gap", OTHERS, ("decay",))),
    ),
    Claim("4.1", "The gap of decay after the last epoch grows with the batch.", batch("gap", ("decay",), -1)),
    Claim("4.1", "It grows more for decay than for spectral.", batch_more("gap", ("decay",), "spectral", -1)),
    Claim("4.1", "Every method exceeds 95 % training accuracy in both regimes.", fits),
    Claim("4.2", "Through training, the gradient norm on test data rises.", rises("input_gradient_test", "epoch")),
    Claim("4.2", "The gradient norm on training data falls.", rises("input_gradient_train", "epoch", sign=-1)),
    Claim("4.2", "The gradient norm on test data rises with the gap.", rises("input_gradient_test")),
    Claim(
        "4.2",
        "It does so more than the gradient norm on training data, the DenseNet on STL-10 left out.",
        but_for_stl10(rises("input_gradient_test", less="input_gradient_train")),
    ),
    Claim(
        "4.2",
        "Spectral reduces the gradient norm on test data (against vanilla).",
        more("input_gradient_test", ("vanilla",), SPECTRAL),
    ),
    Claim(
        "4.2",
        "It does so at any point: on training data, too.",
        more("input_gradient_train", ("vanilla",), SPECTRAL),
    ),
    Claim("4.2", "Spectral fits the training data better than decay.", more("train_accuracy", SPECTRAL, ("decay",))),
    Claim(
        "4.3",
        "Vanilla: the largest eigenvalue of the Hessian on training data grows with the batch.",
        batch("hessian_train", ("vanilla",), -1),
    ),
    Claim("4.3", "So does that on test data.", batch("hessian_test", ("vanilla",), -1)),
    *(
        claim
        for side, data in SIDES.items()
        for claim in (
            Claim(
                "4.3",
                f"Regularized models have larger eigenvalues than vanilla ({data}).",
                more(f"hessian_{side}", ("decay", "adversarial", "spectral"), ("vanilla",)),
            ),
            Claim(
                "4.3", f"Spectral has the largest eigenvalue ({data}).", more(f"hessian_{side}", SPECTRAL, BASELINES)
            ),
        )
    ),
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
    Claim(
        "4.4",
        "They keep the skewed shape: nearer in skew to vanilla than to spectral.",
        nearer("skew", ("decay", "adversarial"), to="vanilla", than="spectral"),
    ),
    Claim("4.4", "Spectral has the lowest largest singular values.", more("largest", BASELINES, SPECTRAL)),
    Claim(
        "A",
        "In every setting, spectral has the smallest generalization gap or the best test accuracy.",
        best_or_smallest,
    ),
)


def judge(differences: list[Difference]) -> list[str]:
    """What became of each comparison of a claim.

    It held where its 95 % interval lies above zero; it did not where its mean is negative with p below 5 % after Holm's
    correction for all comparisons of the claim; otherwise it is not decided. Only that side is corrected: a single
    failure refutes a claim, so many comparisons are many chances of one by accident, whereas all must hold.
    """
    opposite = holm({i: found.p if found.mean < 0 else 1.0 for i, found in enumerate(differences) if found.n > 1})
    return [
        HELD if found.low > 0 else NOT if opposite.get(i, math.nan) < LEVEL else OPEN
        for i, found in enumerate(differences)
    ]


def outcome(verdicts: list[str]) -> str:
    """A claim held where every comparison did, did not where any did not, and is otherwise not decided."""
    if NOT in verdicts:
        return NOT
    return HELD if verdicts and set(verdicts) == {HELD} else OPEN


def _counts(study: StudyRecord, comparisons: list[Comparison], verdicts: list[str]) -> str:
    known = [found for found in comparisons if found.difference.n]
    if not known:
        return "nothing to compare yet"
    counted, means = Counter(verdicts), [found.difference.mean for found in known]
    least = worst(known)
    return " · ".join(
        [
            *(f"{name} {counted[name]}" for name in (HELD, OPEN, NOT) if counted[name]),
            *([f"mean {signed(min(means))} to {signed(max(means))}"] if len(means) > 1 else []),
            f"worst: {labels.setting(study, least.setting)}, {least.what}: {least.difference}",
        ]
    )


def _verdict(study: StudyRecord, claim: Claim, numbers: Numbers) -> tuple[Verdict, list[dict[str, object]]]:
    comparisons = list(claim.comparisons(numbers))
    judged = judge([comparison.difference for comparison in comparisons])
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
    return Verdict(claim.section, claim.sentence, outcome(judged), _counts(study, comparisons, judged), table), data


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


def _measured_epochs(numbers: Numbers) -> str:
    counts = numbers.epochs.groupby(POINT).input_gradient_test.count()
    return "none" if counts.empty else " to ".join(str(count) for count in dict.fromkeys([counts.min(), counts.max()]))


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
            "It held where Student's 95 % interval lies above zero, did not where p of the opposite is below 5 % after "
            "Holm's correction for the comparisons of the claim, and is not decided otherwise, with fewer than two "
            "seeds, or where all seeds differ by the very same amount short of a bound. A claim held where "
            "all its comparisons did, and did not where any did not. The "
            "worst comparison is the one with most evidence against the claim.",
            "Sections 4.2 to 4.4 speak of the DenseNet on CIFAR-100; the claims are judged in every setting.",
            f"The correlations of Section 4.2 rest on the epochs that are measured, {_measured_epochs(numbers)} a run.",
            "Differences of spectra are of logarithms, mean over the weights of a network: of the largest singular "
            "value, of the Frobenius norm, and of the largest over the root mean square (flat is 0).",
        ],
    )
