"""Files that are whole or not there."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a kill at any moment leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
