"""The ``spectreg`` command: a skin over the other modules, which it imports only when a command runs."""

from spectreg_lab.cli.app import app, main
from spectreg_lab.cli.errors import CommandError

__all__ = ["CommandError", "app", "main"]
