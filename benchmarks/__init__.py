"""What spectreg costs beside its peers and beside the hardware's floor: ``python -m benchmarks [NAME …]``."""
