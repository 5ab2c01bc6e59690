"""What an epoch tells of a network: loss, accuracy and the norm of every weight, all read from the device at once."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectreg.weights.selection import named_weights
from spectreg_lab.data import Split

CACHED = 128  # images whose activations stay in the caches of a CPU from layer to layer


def portion(micro_batch: int, fabric: Fabric) -> int:
    """How many images to evaluate at a time: what fits in the memory, and on a CPU in its caches."""
    return min(micro_batch, CACHED) if fabric.device.type == "cpu" else micro_batch


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, size: int, fabric: Fabric) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sum of the loss and the number of correct answers over a whole split, ``size`` images at a time.

    In evaluation mode, in which the model is left, and without augmentation. Nothing is read from the device.
    """
    model.eval()
    loss, correct = torch.zeros((), device=fabric.device), torch.zeros((), device=fabric.device)
    for x, y in zip(split.images.split(size), split.labels.split(size), strict=True):
        with fabric.autocast():
            logits = model(x)
        loss += cross_entropy(logits.float(), y, reduction="sum")
        correct += (logits.argmax(1) == y).sum()
    return loss, correct


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, Float[Tensor, ""]]:
    """The exact spectral norm of every weight, of several blocks the largest; NaN for one that is not finite.

    The root of the largest eigenvalue of the smaller of WWᵀ and WᵀW, in float64: as exact as an SVD for the largest
    singular value, at a fraction of its cost. Those of one size are decomposed together.
    """
    grams: dict[int, dict[str, Tensor]] = {}
    for weight in named_weights(model):
        gram = _gram(weight.map.matrices(weight.tensor))
        grams.setdefault(gram.shape[-1], {})[weight.name] = gram
    norms: dict[str, Tensor] = {}
    for group in grams.values():
        largest = torch.linalg.eigvalsh(torch.cat(list(group.values())))[:, -1].clamp_min(0).sqrt()
        blocks = largest.split([len(gram) for gram in group.values()])
        norms |= {name: values.max() for name, values in zip(group, blocks, strict=True)}
    finite = {weight.name: weight.tensor.isfinite().all() for weight in named_weights(model)}
    return {name: torch.where(finite[name].to(norms[name].device), norms[name], torch.nan) for name in finite}


def _gram(W: Float[Tensor, "blocks outputs inputs"]) -> Float[Tensor, "blocks size size"]:
    W = (W.cpu() if W.device.type == "mps" else W).double()  # mps has no float64
    W = W if W.shape[1] <= W.shape[2] else W.mT
    return (W @ W.mT).nan_to_num(0, 0, 0)


def read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The scalars on the host, in one transfer from each device."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in values.items():
        by_device.setdefault(value.device, {})[name] = value.detach()
    numbers_by_name: dict[str, float] = {}
    for device, group in by_device.items():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        numbers = torch.stack([value.to(dtype) for value in group.values()]).tolist()
        numbers_by_name |= dict(zip(group, numbers, strict=True))
    return {name: numbers_by_name[name] for name in values}
