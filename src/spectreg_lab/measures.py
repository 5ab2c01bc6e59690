"""What is measured of a trained network, as named numbers that can be stored; the measures themselves are spectreg's.

``during`` training: the gradient by the input, the top Hessian eigenvalue, the local Jacobian and the outputs under
perturbations, each on the same sample of training or test images every time. ``after`` it: all of these, the singular
values of every weight and the bound that the layers' norms give.
"""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import spectreg
from spectreg_lab.data import Images, Split
from spectreg_lab.settings.config import Curve, Measuring

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def sample(split: Split, examples: int, batch: int = 256) -> Batches:
    """The same ``examples`` images (or all, if there are fewer) at every call, in batches that fit in memory."""
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:examples]
    return [(split.images[part], split.labels[part]) for part in chosen.to(split.labels.device).split(batch)]


def during(model: nn.Module, images: Images, setting: Measuring, names: tuple[Curve, ...]) -> dict[str, Any]:
    """The measures called ``names``; the model is left as found."""
    sides = {"train": sample(images.train, setting.examples), "test": sample(images.test, setting.examples)}
    kinds: dict[Curve, Callable[[], dict[str, Any]]] = {
        "input_gradient": lambda: {side: _input_gradient(model, batches) for side, batches in sides.items()},
        "hessian": lambda: {side: _hessian(model, batches) for side, batches in sides.items()},
        "jacobian": lambda: _jacobian(model, sides["test"]),
        "perturbation": lambda: {k: _perturbation(model, sides["test"], k, setting) for k in setting.perturbations},
    }
    return {name: kinds[name]() for name in names}


def after(model: nn.Module, images: Images, setting: Measuring) -> dict[str, Any]:
    """All measures of a finished run, and what they were taken with."""
    measures = during(model, images, setting, get_args(Curve))
    bound = spectreg.lipschitz_bound(model, images.shape)
    measures["jacobian"]["bound"] = bound.value
    measures["jacobian"]["layers"] = {factor.name: factor.constant for factor in bound.factors}
    measures["spectra"] = {
        name: spectrum.values.flatten().sort(descending=True).values.tolist()
        for name, spectrum in spectreg.singular_values(model).items()
    }
    measures["taken_with"] = _taken_with(images, setting)
    return measures


def _taken_with(images: Images, setting: Measuring) -> dict[str, Any]:
    """What the numbers depend on besides the run: those of two runs compare where it is the same."""
    counts = {"train": len(images.train), "test": len(images.test)}
    taken = {f"{side}_images": min(setting.examples, count) for side, count in counts.items()}
    return taken | setting.model_dump(mode="json", include={"radii", "perturbations", "steps", "restarts"})


def _input_gradient(model: nn.Module, batches: Batches) -> float:
    return spectreg.input_gradient_norm(model, cross_entropy, batches).value


def _hessian(model: nn.Module, batches: Batches) -> dict[str, Any]:
    top = spectreg.hessian_top_eigenvalues(model, cross_entropy, batches, tolerance=0.01, max_products=100)
    return {
        "value": top.values[0],
        "residual": top.residuals[0],
        "iterations": top.products,
        "converged": top.converged,
    }


def _jacobian(model: nn.Module, batches: Batches) -> dict[str, Any]:
    norms = [spectreg.jacobian_norm(model, x, tolerance=0.01) for x, _ in batches]
    return {
        "norms": torch.cat([norm.value for norm in norms]).tolist(),
        "converged": all(bool(norm.converged.all()) for norm in norms),
    }


def _perturbation(model: nn.Module, batches: Batches, kind: str, setting: Measuring) -> list[dict[str, float]]:
    points = spectreg.perturbation_curve(
        model, cross_entropy, batches, setting.radii, kind, steps=setting.steps, restarts=setting.restarts
    )
    return [{"radius": p.radius, "accuracy": p.accuracy, "loss": p.loss, "ratio": p.stretch} for p in points]
