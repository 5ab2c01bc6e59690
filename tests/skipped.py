"""Which tests were left out, and why: `python tests/skipped.py REPORT.xml …` of what pytest wrote with --junitxml."""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def summary(reports: list[Path]) -> list[str]:
    """A line for each reason, the most frequent first."""
    reasons = Counter(
        skipped.get("message", "without a reason")
        for report in reports
        if report.exists()
        for skipped in ElementTree.parse(report).iter("skipped")
    )
    lines = [f"skipped: {n} test{'s' * (n > 1)}: {reason}" for reason, n in reasons.most_common()]
    return lines or ["skipped: no test"]


if __name__ == "__main__":
    print(*summary([Path(name) for name in sys.argv[1:]]), sep="\n")
