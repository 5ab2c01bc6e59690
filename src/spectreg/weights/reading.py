"""A weight as the forward pass of its module has it, without moving anything."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from spectreg.maps.behaviour import random_state_kept


def read_weight(module: nn.Module, attribute: str) -> Tensor:
    """The parameter itself, or what parametrizations make of theirs, with its graph.

    Parametrizations work on copies of their buffers and draw from a copy of the random state: those of
    ``spectral_norm`` would else move ``_u`` and ``_v`` whenever somebody looks. One that gives a constant in evaluation
    mode though it is trained (as those of deel-torchlip do) gives a leaf that requires a gradient.

    >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)).train()
    >>> before = layer.parametrizations.weight[0]._u.clone()
    >>> _ = read_weight(layer, "weight")
    >>> torch.equal(layer.parametrizations.weight[0]._u, before)
    True
    """
    parameter = module._parameters.get(attribute)
    if parameter is not None:
        return parameter
    with torch.inference_mode(False), torch.enable_grad():  # whether it is trained does not depend on who looks
        if not is_parametrized(module, attribute):
            return getattr(module, attribute)
        made_by: nn.Module = module.parametrizations[attribute]  # type: ignore[index, assignment]
        with random_state_kept(made_by):
            weight = functional_call(made_by, {name: b.clone() for name, b in made_by.named_buffers()}, ())
        if not weight.requires_grad and any(p.requires_grad for p in made_by.parameters()):
            return weight.detach().requires_grad_()
        return weight
