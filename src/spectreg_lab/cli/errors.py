"""Which errors are told in one line, and how."""


class CommandError(Exception):
    """What the user gave does not work."""


def is_users(error: Exception) -> bool:
    """Whether it is one that the user can mend; the others are ours and show where they arose."""
    from spectreg_lab.data import DataError
    from spectreg_lab.settings.studies import StudyError
    from spectreg_lab.storage.errors import RunError
    from spectreg_lab.studies.execution import UnwritableError
    from spectreg_lab.studies.loggers import LogError
    from spectreg_lab.training.devices import DeviceError

    return isinstance(
        error, CommandError | DataError | DeviceError | LogError | OSError | RunError | StudyError | UnwritableError
    )


def explanation(error: Exception) -> str:
    """The line that says what was wrong and how to go on."""
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}: mend that and give the same command again; what is finished is kept"
    return str(error)
