"""Numbers read off a model: spectra, curvature, Jacobians, gradients, perturbations, the gap."""
