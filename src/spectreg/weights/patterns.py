"""Settings that are one value for all weights, or a mapping from name patterns to values."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any


class Patterns:
    """A setting that is one value for all weights or a mapping from name patterns (the first match counts)."""

    def __init__(self, setting: str, value: Any) -> None:
        self.setting, self.value = setting, value
        self.used_values: set[Any] = set()
        self._matches: dict[str, set[str]] = {}
        if isinstance(value, Mapping):
            if not value or not all(isinstance(pattern, str) for pattern in value):
                raise ValueError(f"{setting} is {value!r}: it must map name patterns, such as '*.weight', to values.")
            self._matches = {pattern: set() for pattern in value}

    def get(self, name: str, default: Any = None) -> Any:
        """The value for the weight ``name``."""
        if not isinstance(self.value, Mapping):
            return self.value
        matching = [pattern for pattern in self.value if fnmatchcase(name, pattern)]
        for pattern in matching:
            self._matches[pattern].add(name)
        return self.value[matching[0]] if matching else default

    def check_all_used(self, names: list[str]) -> None:
        """Raise if a pattern matched none of the names that were asked for, or those before it took all of them.

        A last ``"*"``, for all the others, may have nothing left to do.
        """
        unused = [pattern for pattern, matched in self._matches.items() if not matched]
        if unused:
            raise ValueError(
                f"{self.setting}: no weight matches {', '.join(repr(p) for p in sorted(unused))}. "
                f"The weights are {some(names)}; patterns are those of fnmatch, such as '*.weight'."
            )
        taken: dict[str, str] = {}
        for i, (pattern, matched) in enumerate(self._matches.items(), 1):
            if matched <= taken.keys() and not (pattern == "*" and i == len(self._matches)):
                before = " and ".join(repr(p) for p in dict.fromkeys(taken[name] for name in sorted(matched)))
                raise ValueError(
                    f"{self.setting}: {pattern!r} never counts: what it matches is taken by {before} before it. "
                    "The first match counts: put the narrower pattern before."
                )
            taken |= {name: pattern for name in matched if name not in taken}


def some(names: list[str]) -> str:
    """The first eight names, for an error."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
