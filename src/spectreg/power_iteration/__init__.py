"""The power step, and the vectors it remembers from call to call."""
