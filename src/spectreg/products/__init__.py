"""Products of weights that a model takes: which factors, and where they are stored."""
