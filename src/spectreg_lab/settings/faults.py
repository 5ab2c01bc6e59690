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
    """The first faults, a line each: the field, what is wrong, and the nearest known name for an unknown one.

    Unknown keys come first: one that is misspelt is missing, too.
    """
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return [*(_fault(fault, root) for fault in faults[:SHOWN]), *more]


def _fault(fault: Any, root: type[Setting]) -> str:
    where = ".".join(_part(part) for part in fault["loc"] if part != "[key]")
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(str(fault['loc'][-1]), _known_keys(root, fault['loc'][:-1]))}"
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


def _known_keys(root: type[Setting], place: tuple[int | str, ...]) -> list[str]:
    """The keys of the group at ``place``, which names the kind too where there are several of a group."""
    schema = TypeAdapter(root).json_schema()
    group = schema
    for part in place:
        group = _inside(_group(group, schema), part)
    return sorted(_group(group, schema)["properties"])


def _group(entry: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """What a schema's ``entry`` stands for: the group it refers to, or the one it is where it is set."""
    entry = next((one for one in entry.get("anyOf", ()) if one.get("type") != "null"), entry)
    return schema["$defs"][entry["$ref"].rpartition("/")[2]] if "$ref" in entry else entry


def _inside(group: dict[str, Any], part: int | str) -> dict[str, Any]:
    """A key's entry in a group, the kind of a group of several, or any entry where the user gives the names."""
    if "discriminator" in group:
        return {"$ref": group["discriminator"]["mapping"][part]}
    if part in group.get("properties", ()):
        return group["properties"][part]
    (entry,) = group["patternProperties"].values()
    return entry
