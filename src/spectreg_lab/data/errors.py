"""What can be wrong with data."""


class DataError(Exception):
    """The images asked for cannot be had or used; the message says what would do."""
