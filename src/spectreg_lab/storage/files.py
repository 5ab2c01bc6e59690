"""Files that are whole or not there."""

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@")  # a spreadsheet computes a cell that begins so


def write(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a kill at any moment leaves the old file or the new one, never a part.

    A device or a pipe is written to, not replaced.
    """
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # machines may have equal process numbers
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def csv(frame: "pd.DataFrame", digits: int = 6) -> bytes:
    """``frame`` as CSV: floats with the ``digits`` they mean on any processor, and no text that a spreadsheet computes.

    A text is one line; one that begins like a formula has an apostrophe before it, as spreadsheets write it themselves.
    """
    safe = frame.map(_text).rename(columns=_text)
    return bytes(safe.to_csv(index=False, float_format=f"%.{digits}g").encode())


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    line = " ".join(value.splitlines())
    return f"'{line}" if line.strip().startswith(FORMULA) else line
