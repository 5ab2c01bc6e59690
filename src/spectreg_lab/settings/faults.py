"""What is wrong with a setting, in one line for people: the field, what was given, what would do."""

import re
import reprlib
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spectreg_lab.settings.config import Setting

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of studies, settings, regimes and methods: they become names of files
SHOWN = 5  # faults
BRIEF = reprlib.Repr()
BRIEF.maxstring = BRIEF.maxother = BRIEF.maxlong = 60


def explain(error: ValidationError, root: type[Setting]) -> list[str]:
    """The first faults, a line each: the field, what is wrong, and the nearest known name for an unknown one."""
    faults = error.errors(include_url=False)
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return [*(_fault(fault, root) for fault in faults[:SHOWN]), *more]


def _fault(fault: Any, root: type[Setting]) -> str:
    where = ".".join(_part(part) for part in fault["loc"] if part != "[key]")
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(str(fault['loc'][-1]), _known_keys(root))}"
    if fault["type"] == "union_tag_invalid":
        known = [name.strip(" '") for name in fault["ctx"]["expected_tags"].split(",")]
        return f"{where}: unknown name {BRIEF.repr(fault['ctx']['tag'])}{_nearest(fault['ctx']['tag'], known)}"
    if fault["type"].startswith("string_pattern") and fault["ctx"]["pattern"] == NAME:
        return f"{where}: a name has letters of a to z, digits and - _ . and begins with a letter or digit"
    given = "" if fault["type"] in ("missing", "value_error") else f", got {BRIEF.repr(fault['input'])}"
    return f"{where}: {line(fault['msg'].removeprefix('Value error, '))}{given}".removeprefix(": ")


def _part(part: object) -> str:
    """A key as it stands in the file, or its beginning where it is no name."""
    return str(part) if re.fullmatch(NAME, str(part)) and len(str(part)) <= 100 else BRIEF.repr(part)


def line(text: str) -> str:
    """``text`` in one line that is not too long, without control characters."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= 400 else f"{plain[:400]}…"


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name[:100], known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def _known_keys(root: type[Setting]) -> list[str]:
    schema = TypeAdapter(root).json_schema()
    groups = [schema, *schema.get("$defs", {}).values()]
    return sorted({key for group in groups for key in group.get("properties", {})})
