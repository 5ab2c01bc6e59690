"""Settings that are one value for all weights, or a mapping from name patterns to values."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any


class Patterns:
    """A setting that is one value for all weights or a mapping from name patterns (the first match counts)."""

    def __init__(self, setting: str, value: Any) -> None:
        self.setting, self.value = setting, value
        self.used: set[str] = set()
        self.used_values: set[Any] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The value for the weight ``name``."""
        if not isinstance(self.value, Mapping):
            return self.value
        matching = [pattern for pattern in self.value if fnmatchcase(name, pattern)]
        self.used.update(matching)
        return self.value[matching[0]] if matching else default

    def check_all_used(self, names: list[str]) -> None:
        """Raise if a pattern matched none of the names that were asked for."""
        unused = set(self.value) - self.used if isinstance(self.value, Mapping) else ()
        if unused:
            raise ValueError(
                f"{self.setting}: no weight matches {', '.join(repr(p) for p in sorted(unused))}. "
                f"The weights are {some(names)}; patterns are those of fnmatch, such as '*.weight'."
            )


def some(names: list[str]) -> str:
    """The first eight names, for an error."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
