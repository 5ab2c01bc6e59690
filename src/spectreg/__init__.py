"""spectreg: spectral norm regularization for PyTorch."""

from spectreg.baselines import adversarial_loss, jacobian_penalty, layerwise_jacobian_penalty
from spectreg.curvature import hessian_top_eigenvalues
from spectreg.generalization import generalization_gap
from spectreg.jacobians import jacobian_frobenius_norm, jacobian_norm
from spectreg.lipschitz import lipschitz_bound
from spectreg.operator_norms import operator_norm
from spectreg.operators import input_sizes
from spectreg.perturbations import perturbation_curve
from spectreg.regularizer import SpectralNormRegularizer
from spectreg.sensitivity import input_gradient_norm
from spectreg.spectra import singular_values
from spectreg.weights import named_weights

__all__ = [
    "SpectralNormRegularizer",
    "adversarial_loss",
    "generalization_gap",
    "hessian_top_eigenvalues",
    "input_gradient_norm",
    "input_sizes",
    "jacobian_frobenius_norm",
    "jacobian_norm",
    "jacobian_penalty",
    "layerwise_jacobian_penalty",
    "lipschitz_bound",
    "named_weights",
    "operator_norm",
    "perturbation_curve",
    "singular_values",
]
