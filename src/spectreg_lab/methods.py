"""The paper's four methods, and the two it compares with in words: from a setting to what happens in a step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectreg import SpectralNormRegularizer
from spectreg.baselines.adversarial import adversarial_loss
from spectreg.baselines.jacobian import jacobian_penalty, layerwise_jacobian_penalty
from spectreg.weights.selection import named_weights
from spectreg_lab.settings.config import Adversarial, Config, Decay, Jacobian, LayerwiseJacobian, Spectral


class Method:
    """Plain empirical risk minimisation; each other method overrides what it does otherwise.

    ``forward`` is how the network is called: ``model`` itself, or what ``torch.compile`` has made of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = self.forward = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch, to be differentiated."""
        return cross_entropy(self.forward(x), y)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is given."""
        return [{"params": list(self.model.parameters())}]

    def after_backward(self) -> None:
        """Called once a step, when the gradients are those of the whole batch."""

    def estimates(self) -> dict[str, Tensor]:
        """The method's own estimate of each weight's spectral norm, as of the last step; empty if it makes none."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What the method must remember between steps."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``."""


class WeightDecay(Method):
    """λW on the gradient of the weights that the spectral penalty acts on too: no biases, no normalization scales."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        super().__init__(model)
        self.strength = strength

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weights with decay, everything else without."""
        weights = [weight.tensor for weight in named_weights(self.model)]
        chosen = {id(weight) for weight in weights}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in chosen]
        return [{"params": weights, "weight_decay": self.strength}, {"params": others}]


class AdversarialTraining(Method):
    """Eq. (3): a part of the loss is taken at examples moved along its gradient."""

    def __init__(self, model: nn.Module, epsilon: float, alpha: float) -> None:
        super().__init__(model)
        self.epsilon, self.alpha = epsilon, alpha

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """α L(x) + (1 − α) L(x + η)."""
        return adversarial_loss(self.forward, cross_entropy, x, y, self.epsilon, self.alpha)


class JacobianPenalty(Method):
    """A penalty on the Jacobian of the network, or of each of its layers, as a term of the loss.

    Random directions come from torch's own generator, which training seeds anew every epoch.
    """

    def __init__(self, model: nn.Module, strength: float, projections: int | None, layerwise: bool) -> None:
        super().__init__(model)
        self.strength, self.layerwise = strength, layerwise
        self.draws: dict[str, Any] = {"projections": projections, "generator": _global_generator(model)}

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """L(x) + λ times the penalty."""
        if self.layerwise:
            penalty = layerwise_jacobian_penalty(nn.Sequential(*_chain(self.model)), x, **self.draws)
        else:
            penalty = jacobian_penalty(self.model, x, **self.draws)
        return super().loss(x, y) + self.strength * penalty


def _global_generator(model: nn.Module) -> torch.Generator:
    """Torch's own generator on the device of ``model``: what it draws need not be brought there."""
    device = next(model.parameters()).device
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _chain(model: nn.Module) -> list[nn.Module]:
    """The modules that follow one another in a network, plain containers opened."""
    if type(model) is not nn.Sequential:
        return [model]
    return [module for child in model for module in _chain(child)]


class SpectralNorm(Method):
    """Algorithm 1: λσuvᵀ on the gradient of each weight."""

    def __init__(self, model: nn.Module, strength: float, seed: int) -> None:
        super().__init__(model)
        self.regularizer = SpectralNormRegularizer(model, strength, seed=seed)

    def after_backward(self) -> None:
        """One power step and one rank-one update a weight."""
        self.regularizer.add_gradient()

    def estimates(self) -> dict[str, Tensor]:
        """σ as the regularizer has it: of the weights before the optimizer's last step."""
        return self.regularizer.sigma()

    def state(self) -> dict[str, Tensor]:
        """The regularizer's state, as tensors by ``weight/part``."""
        vectors = self.regularizer.state_dict()["vectors"]
        return {f"{name}/{part}": torch.as_tensor(x) for name, parts in vectors.items() for part, x in parts.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        vectors: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            vectors.setdefault(name, {})[part] = value if value.is_floating_point() else value.item()
        self.regularizer.load_state_dict({**self.regularizer.state_dict(), "vectors": vectors})


def build(config: Config, model: nn.Module) -> Method:
    """The method of ``config`` for ``model``."""
    setting = config.method
    if isinstance(setting, Decay):
        return WeightDecay(model, setting.strength)
    if isinstance(setting, Adversarial):
        return AdversarialTraining(model, setting.epsilon, setting.alpha)
    if isinstance(setting, Jacobian | LayerwiseJacobian):
        layerwise = isinstance(setting, LayerwiseJacobian)
        return JacobianPenalty(model, setting.strength, setting.projections, layerwise)
    if isinstance(setting, Spectral):
        return SpectralNorm(model, setting.strength, config.seed)
    return Method(model)
