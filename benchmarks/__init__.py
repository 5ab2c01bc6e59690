"""What spectreg costs beside its peers and the hardware's floor; `make benchmarks` runs all of it."""

NAMES = ("step", "alone", "small_weights", "convolution_norm", "measures", "loop", "epoch", "study", "sharded",
         "demucs")  # fmt: skip
