"""The training loop, and one run with resuming."""
