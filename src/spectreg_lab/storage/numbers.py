"""JSON as every reader takes it: a number that is not finite is written as text, and read back as a number."""

import json
import math
from typing import Any

WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(content: Any, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """``content`` as JSON.

    >>> dumps({"loss": math.nan, "norms": (1.5, -math.inf)})
    '{"loss": "NaN", "norms": [1.5, "-Infinity"]}'
    """
    return json.dumps(_spelled(content), indent=indent, separators=separators, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """What `dumps` wrote; bare ``NaN``, which Python's own writer leaves, is read, too.

    Raises:
        ValueError: it is not JSON, or nested more deeply than anything that `dumps` is given.

    >>> loads('{"loss": "Infinity", "old": NaN, "name": "vgg"}')
    {'loss': inf, 'old': nan, 'name': 'vgg'}
    """
    try:
        return restored(json.loads(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def restored(value: Any) -> Any:
    """Parsed JSON with its words for numbers that are not finite as numbers."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return next(word for word, number in WORDS.items() if str(number) == str(value))
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    return [_spelled(item) for item in value] if isinstance(value, list | tuple) else value
