"""spectreg: spectral norm regularization for PyTorch."""

from spectreg.regularizer import SpectralNormRegularizer
from spectreg.weights import Weight, named_weights

__all__ = ["SpectralNormRegularizer", "Weight", "named_weights"]
