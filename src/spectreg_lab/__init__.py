"""The experiments of the paper, built on :mod:`spectreg`."""
