"""spectreg: spectral norm regularization for PyTorch."""
