"""What became of each claim: a statement pooled over settings decides, the single comparisons stand beneath it."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table, Verdict
from spectreg_lab.statistics.claims import Claim, Comparison
from spectreg_lab.statistics.frames import records, regimes, select
from spectreg_lab.statistics.paired import Difference, Unit, holm, interval
from spectreg_lab.statistics.pooled import MOST, POWER, Pooled, pool
from spectreg_lab.statistics.quantities import Numbers
from spectreg_lab.statistics.registered import BEST, CLAIMS
from spectreg_lab.storage.store import StudyRecord

HELD, NOT, OPEN = "held", "did not hold", "not decided"
TONES = {HELD: "good", NOT: "bad", OPEN: "open"}
LEVEL = 0.05
FEW = 4  # settings and regimes that fit into a sentence
NOT_PART = "not part of this study"
POINTING = ("It", "So", "They")  # first words of claims that speak of the claim before
NOTES = (
    "A statement is a difference paired over the seeds that both sides have, and pooled: its mean over settings, "
    "each weighing the same, with the interval of Welch and Satterthwaite for the spread of the seeds. Positive, or "
    "a ratio over 1, is what the claim says. A claim held where the intervals of all its statements lie above zero; "
    "it did not where one is negative with p below 5 % after Holm's correction for the statements of the claim; "
    "otherwise, or with fewer than two seeds, it is not decided. A setting whose seeds all differ by the same amount "
    "enters as if it had no spread. The line of a claim has the statement with least evidence for it. These settings "
    "are taken as they are: nothing is said of others.",
    "P(improvement): the probability that a run of the first kind is above one of the second, mean over settings. "
    f"Least detectable: the effect that as many seeds show in {POWER:.0%} of such studies.",
    "Single comparisons decide nothing. Their p is corrected by Holm: between methods for all pairs of methods in that "
    "setting and regime, as in Table 1; otherwise for the comparisons of the claim in that setting.",
    "Appendix A needs one of two things; the better one counts, so that each is judged at half of the 5 %.",
    "Sections 4.2 to 4.4 speak of the DenseNet on CIFAR-100; the claims are judged in every setting.",
    "Differences of norms, eigenvalues and spectra are of logarithms, shown as ratios; of spectra mean over the "
    "weights of a network: of the largest singular value, of the Frobenius norm, and of the largest over the root "
    "mean square (flat is 1).",
)


@dataclass(frozen=True)
class Statement:
    """What was compared, pooled over settings, and the single comparisons that it is pooled of."""

    what: str
    pooled: Pooled
    unit: Unit
    singles: tuple[Comparison, ...]


@dataclass(frozen=True)
class Judged:
    """A claim, the statements of each of its alternatives with what became of them, and what became of the claim."""

    claim: Claim
    alternatives: tuple[tuple[Statement, ...], ...]
    verdicts: tuple[tuple[str, ...], ...]
    outcome: str

    @property
    def level(self) -> float:
        """Of each alternative's intervals: the better of two is chosen, so each has half."""
        return LEVEL / len(self.alternatives)


def statements(comparisons: Sequence[Comparison], level: float = LEVEL) -> tuple[Statement, ...]:
    """One for each thing compared, over the settings in which it is."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.what, []).append(comparison)
    return tuple(
        Statement(
            what,
            pool([(c.first, c.second) for c in group], [c.bounds for c in group], level),
            group[0].unit,
            tuple(group),
        )
        for what, group in groups.items()
    )


def judge(differences: Sequence[Difference], level: float = LEVEL) -> list[str]:
    """What became of each of the statements that a claim needs.

    It held where its interval lies above zero; it did not where its mean is negative with p below ``level`` after
    Holm's correction for all of them; otherwise it is not decided. Only that side is corrected: a single failure
    refutes a claim, so many statements are many chances of one by accident, whereas all must hold.
    """
    opposite = holm(
        {
            i: difference.p if difference.mean < 0 else 1.0
            for i, difference in enumerate(differences)
            if difference.n > 1
        }
    )
    return [
        HELD if difference.low > 0 else NOT if opposite.get(i, math.nan) < level else OPEN
        for i, difference in enumerate(differences)
    ]


def outcome(verdicts: Sequence[str]) -> str:
    """What needs all of these held where each did, did not where any did not, and is otherwise not decided."""
    if NOT in verdicts:
        return NOT
    return HELD if verdicts and set(verdicts) == {HELD} else OPEN


def either(outcomes: Sequence[str]) -> str:
    """What needs one of these held where any did, and did not where none did."""
    if HELD in outcomes:
        return HELD
    return NOT if outcomes and set(outcomes) == {NOT} else OPEN


def judged(claim: Claim, numbers: Numbers) -> Judged:
    """The claim, decided: each alternative at its share of the level, as the best of them counts."""
    compared = claim.comparisons(numbers)
    level = LEVEL / len(compared)
    alternatives = tuple(statements(comparisons, level) for comparisons in compared)
    verdicts = tuple(tuple(judge([s.pooled for s in group], level)) for group in alternatives)
    return Judged(claim, alternatives, verdicts, either([outcome(group) for group in verdicts]))


def worst(group: Sequence[Statement]) -> Statement:
    """The statement that speaks most against its claim, or least for it."""
    return min(group, key=lambda statement: (statement.pooled.evidence, statement.pooled.mean))


def deciding(decision: Judged) -> Statement | None:
    """The statement that decides: the worst one of the alternative that has most for it; None without any number."""
    known = [group for group in ([s for s in all_ if s.pooled.n] for all_ in decision.alternatives) if group]
    return max(map(worst, known), key=lambda statement: statement.pooled.evidence, default=None)


def singles(decision: Judged, numbers: Numbers) -> list[dict[str, Any]]:
    """Each single comparison with its interval, and its p as Table 1 corrects it, or for the claim in that setting."""
    compared = [single for group in decision.alternatives for statement in group for single in statement.singles]
    differences = [interval((c.first - c.second).dropna(), c.bounds, decision.level) for c in compared]
    by_setting: dict[str, dict[int, float]] = {}
    for i, (single, difference) in enumerate(zip(compared, differences, strict=True)):
        by_setting.setdefault(single.setting, {})[i] = difference.p
    corrected = {i: p for group in by_setting.values() for i, p in holm(group).items()}
    for i, single in enumerate(compared):
        if single.pair is not None:
            regime, measure, methods = single.pair
            corrected[i] = numbers.corrected(single.setting, regime, measure).get(methods, math.nan)
    return [
        {
            "comparison": single,
            "difference": difference,
            "p_holm": corrected[i],
            "verdict": _single(difference, corrected[i]),
        }
        for i, (single, difference) in enumerate(zip(compared, differences, strict=True))
    ]


def _single(difference: Difference, corrected: float) -> str:
    if difference.low > 0:
        return HELD
    return NOT if difference.mean < 0 and corrected < LEVEL else OPEN


def _line(decision: Judged, singles: list[dict[str, Any]], methods: Collection[str]) -> str:
    """The visible line of a claim: the statement that decides, what would, and the count of single comparisons."""
    statement = deciding(decision)
    if statement is None:
        known = [row for row in singles if row["difference"].n]
        if known:
            return f"one seed of {len(known)} comparisons: no interval"
        return "nothing to compare yet" if singles and decision.claim.methods() <= set(methods) else NOT_PART
    parts = [f"{statement.what}: {statement.pooled.text(statement.unit)}"]
    if decision.outcome == OPEN:
        unknown = [s.what for group in decision.alternatives for s in group if not s.pooled.n]
        parts.append(_unknown(unknown) if unknown else _would_decide(statement.pooled))
    counted = Counter(row["verdict"] for row in singles)
    parts.append(
        "single comparisons: " + ", ".join(f"{n} {name}" for name in (NOT, OPEN, HELD) if (n := counted[name]))
    )
    return " · ".join(parts)


def _unknown(whats: Sequence[str]) -> str:
    return f"no two seeds of {', '.join(whats[:FEW])}{' and others' if len(whats) > FEW else ''}"


def _would_decide(pooled: Pooled) -> str:
    if math.isnan(pooled.p):
        return "all seeds alike: nothing says how another would differ"
    if pooled.needed is None:
        return f"an effect this small would take over {MOST} seeds a setting"
    return f"an effect of this size would take {pooled.needed} seeds a setting"


def _tables(study: StudyRecord, decision: Judged, singles: list[dict[str, Any]]) -> list[Table]:
    share = f"{100 * (1 - decision.level):g} %"
    pooled = [
        [
            Cell(statement.what, bold=True),
            Cell(statement.pooled.text(statement.unit)),
            Cell("–" if math.isnan(statement.pooled.detectable) else f"{statement.pooled.needed or f'> {MOST}'}"),
            Cell(verdict, tone=TONES[verdict]),
        ]
        for group, verdicts in zip(decision.alternatives, decision.verdicts, strict=True)
        for statement, verdict in zip(group, verdicts, strict=True)
    ]
    single = [
        [
            Cell(labels.setting(study, row["comparison"].setting)),
            Cell(row["comparison"].what),
            Cell(row["difference"].text(row["comparison"].unit)),
            Cell("–" if math.isnan(row["p_holm"]) else f"{row['p_holm']:.2g}"),
            Cell(row["verdict"], tone=TONES[row["verdict"]]),
        ]
        for row in singles
    ]
    columns = ["pooled over settings", f"mean difference [{share} interval]", "seeds a setting that would show it", ""]
    beneath = ["setting", "comparison", f"mean difference [{share} interval]", "p, Holm", "by itself"]
    return [Table(columns, pooled), Table(beneath, single, "Single comparisons")]


def _frame(decision: Judged, singles: list[dict[str, Any]]) -> list[dict[str, object]]:
    head = {"section": decision.claim.section, "claim": decision.claim.sentence, "outcome": decision.outcome}
    rows: list[dict[str, object]] = [
        head | {"setting": "all", "comparison": statement.what, **vars(statement.pooled), "verdict": verdict}
        for group, verdicts in zip(decision.alternatives, decision.verdicts, strict=True)
        for statement, verdict in zip(group, verdicts, strict=True)
    ]
    return rows + [
        head
        | {"setting": row["comparison"].setting, "comparison": row["comparison"].what}
        | {**vars(row["difference"]), "p_holm": row["p_holm"], "verdict": row["verdict"]}
        for row in singles
    ]


def _rows_won(study: StudyRecord, table: pd.DataFrame, metric: str, what: str) -> str:
    lost, rows = [], 0
    for setting, regime in regimes(study):
        best = [
            row["method"] for row in records(select(table, metric=metric, setting=setting, regime=regime, best=True))
        ]
        rows += bool(best)
        if best and "spectral" not in best:
            lost.append(f"{labels.setting(study, setting)}, {regime} batch ({' and '.join(best)})")
    if not rows:
        return f"{what}: nothing to compare yet."
    sentence = f"{what}: spectral has the best mean in {rows - len(lost)} of {rows} rows of Table 1."
    return sentence + (f" It does not win in: {'; '.join(lost)}." if lost else "")


def _compared(study: StudyRecord, numbers: Numbers) -> str:
    methods, settings = len(numbers.methods), len(numbers.settings)
    regimes_named = " and ".join(labels.batch(study, regime) for regime in numbers.regimes)
    cells = product(numbers.settings, numbers.regimes, numbers.methods)
    counts = [len(numbers.of(*cell, "test_accuracy")) for cell in cells]
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return (
        f"{methods} methods ({', '.join(numbers.methods)}) on {settings} {'settings' if settings > 1 else 'setting'}, "
        f"{regimes_named}: {len(numbers.runs)} of {len(study.runs)} runs are finished, {seeds} seeds of each."
    )


def _means(study: StudyRecord, table: pd.DataFrame) -> list[str]:
    """What came out, in a sentence, where that is few numbers."""
    rows = [
        f"{labels.setting(study, setting)}, {labels.batch(study, regime, setting)}: "
        + ", ".join(
            f"{row['method']} {row['mean']:.3f}"
            for row in records(select(table, metric="test_accuracy", setting=setting, regime=regime))
            if row["runs"]
        )
        for setting, regime in regimes(study)
    ]
    return (
        [f"Test accuracy, mean over seeds: {'; '.join(rows)}."]
        if len(rows) <= FEW and len(table.dropna(subset="mean"))
        else []
    )


def _tally(decisions: Sequence[Judged], lines: Sequence[str]) -> str:
    absent = lines.count(NOT_PART)
    counted = Counter(decision.outcome for decision in decisions) - Counter({OPEN: absent})
    tally = ", ".join(f"{counted[name]} {name}" for name in (NOT, OPEN, HELD))
    return f"Of {len(decisions)} claims: {tally}{f', {absent} {NOT_PART}' if absent else ''}."


def _seen(decisions: Sequence[Judged]) -> str:
    """What differences of accuracy the study can tell from none: those of the statement that decides who is best."""
    best = next(decision for decision in decisions if decision.claim.sentence == BEST)
    statement = deciding(best)
    if statement is None or math.isnan(statement.pooled.detectable):
        return ""
    least = f"{100 * statement.pooled.detectable:.2g}"
    return f"The study can show a difference in test accuracy of {least} points or more. "


def _standing_alone(place: int) -> str:
    """The sentence of a claim; where it begins with “it”, with the sentence that says what that is."""
    sentence, before = CLAIMS[place].sentence, place - 1
    if sentence.split()[0] not in POINTING:
        return sentence
    while CLAIMS[before].sentence.split()[0] in POINTING:
        before -= 1
    return f"{sentence.rstrip('.')} (said after “{CLAIMS[before].sentence.rstrip('.')}”)."


def _registered(study: StudyRecord) -> str:
    commit = study.study.get("registered")
    if commit:
        return f"Claims, directions and the rule were fixed before the first run, in commit {commit} (docs/claims.md)."
    return "This study names no commit that fixed its claims and the rule before its first run."


def exhibit(study: StudyRecord, numbers: Numbers, table: pd.DataFrame) -> Exhibit:
    """Every claim with its verdict, and where spectral does not win."""
    decisions = [judged(claim, numbers) for claim in CLAIMS]
    beneath = [singles(decision, numbers) for decision in decisions]
    lines = [_line(*pair, study.study["methods"]) for pair in zip(decisions, beneath, strict=True)]
    against = [_standing_alone(i) for i, decision in enumerate(decisions) if decision.outcome == NOT]
    measured = " to ".join(map(str, numbers.measured)) or "none"
    return Exhibit(
        name="verdicts",
        title="What the paper claims, and what held",
        claim="",
        frame=pd.DataFrame([row for pair in zip(decisions, beneath, strict=True) for row in _frame(*pair)]),
        verdicts=[
            Verdict(d.claim.section, d.claim.sentence, d.outcome, line, _tables(study, d, rows))
            for d, rows, line in zip(decisions, beneath, lines, strict=True)
        ],
        summary=[
            _compared(study, numbers),
            f"{_tally(decisions, lines)} {_seen(decisions)}{_registered(study)}",
            *_means(study, table),
            *([f"Did not hold: {' '.join(against)}"] if against else []),
            *(
                [
                    _rows_won(study, table, "test_accuracy", "Test accuracy"),
                    _rows_won(study, table, "generalization_gap", "Generalization gap"),
                ]
                if "spectral" in study.study["methods"]
                else []
            ),
        ],
        notes=[
            *NOTES,
            f"The correlations of Section 4.2 rest on the epochs at which both were measured, {measured} a run; they "
            "are averaged, and have their intervals, as Fisher's z.",
        ],
    )
