"""σ of all weights as numbers for a log, read from the device at once."""

import torch
from torch import Tensor

from spectreg.regularizer import SpectralNormRegularizer


def sigma_on_host(regularizer: SpectralNormRegularizer) -> dict[str, Tensor]:
    """``sigma/<name>`` of each weight, on the CPU, by one transfer for each device that holds weights.

    >>> sigma_on_host(SpectralNormRegularizer(torch.nn.Linear(1, 1), 0.1)).keys()
    dict_keys(['sigma/weight'])
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    sigma = regularizer.sigma()
    for name, value in sigma.items():
        by_device.setdefault(value.device, {})[name] = value
    numbers: dict[str, Tensor] = {}
    for values in by_device.values():
        numbers |= zip(values, torch.stack(list(values.values())).cpu().unbind(), strict=True)
    return {f"sigma/{name}": numbers[name] for name in sigma}
