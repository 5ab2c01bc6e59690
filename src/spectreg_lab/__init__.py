"""The experiments of the paper, built on `spectreg`."""
