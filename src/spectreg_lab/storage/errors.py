"""What can be wrong with a folder."""


class RunError(Exception):
    """Something about a run folder that its owner can mend; the message says how."""
