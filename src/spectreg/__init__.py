"""spectreg: spectral norm regularization for PyTorch."""

from spectreg.baselines.adversarial import adversarial_loss
from spectreg.baselines.jacobian import jacobian_penalty, layerwise_jacobian_penalty
from spectreg.caps import SpectralNormCap
from spectreg.lipschitz.network import lipschitz_bound
from spectreg.lipschitz.operator_norm import operator_norm
from spectreg.measures.adapters import adapter_norms
from spectreg.measures.attention import logit_bound
from spectreg.measures.generalization import generalization_gap
from spectreg.measures.hessian import hessian_top_eigenvalues
from spectreg.measures.input_gradient import input_gradient_norm
from spectreg.measures.jacobian import jacobian_frobenius_norm, jacobian_norm
from spectreg.measures.losses import BatchLoss
from spectreg.measures.normalized import normalized_norms
from spectreg.measures.perturbation import perturbation_curve
from spectreg.measures.spectra import singular_values
from spectreg.penalties import Hinge, Power, Square
from spectreg.products.named import named_products
from spectreg.regularizer import SpectralNormRegularizer
from spectreg.weights.input_sizes import input_sizes
from spectreg.weights.selection import named_weights

__version__ = "0.1.0"

__all__ = [
    "BatchLoss",
    "Hinge",
    "Power",
    "SpectralNormCap",
    "SpectralNormRegularizer",
    "Square",
    "adapter_norms",
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
    "logit_bound",
    "named_products",
    "named_weights",
    "normalized_norms",
    "operator_norm",
    "perturbation_curve",
    "singular_values",
]
