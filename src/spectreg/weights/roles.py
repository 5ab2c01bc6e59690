"""What each parameter of a model is: the weight of a layer, another matrix, a table, or none of these."""

import re
from enum import Enum
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from spectreg.weights.tables import says_its_features, use_of


class Role(Enum):
    """Of a parameter: what a known layer multiplies by, a bare matrix, rows that are looked up, or none of these."""

    LAYER = "layer"
    BARE = "bare"
    TABLE = "table"
    NONE = "none"


NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
EPSILONS = ("eps", "epsilon", "variance_epsilon")

# Of bare parameters only the name tells. Words between underscores, without digits at their ends.
BIASES = {"bias", "biases", "rpb"}
SCALES = {"scale", "scales", "gamma", "beta", "gain", "alpha", "lambda", "temperature"}
STATES = ("decay", "a_real", "a_imag")  # at the end of a name; and whatever is a logarithm
TABLES = {
    "embed", "embeds", "embedding", "embeddings", "emb", "pos", "position", "positions", "positional", "rel",
    "token", "tokens", "latent", "latents", "prompt", "prompts", "codebook", "codebooks", "codevectors",
}  # fmt: skip
HOLDERS = {"pos", "position", "positions", "positional", "wte", "wpe", "vocab", "codebook", "codebooks", "lookup"}
MATRICES = {
    "proj", "projection", "weight", "weights", "kernel", "kernels", "matrix", "matrices", "linear", "router", "head",
    "heads", "expert", "experts", "mixer", "mixing",
}  # fmt: skip


def role_of(path: str, module: nn.Module, attribute: str, tensor: Tensor) -> Role:
    """The role of the parameter ``attribute`` of ``module``, which is at ``path``.

    >>> role_of("mixer", nn.Module(), "A_log", nn.Parameter(Tensor(8, 4))).value
    'none'
    """
    if is_lazy(tensor):
        return Role.LAYER
    if tensor.ndim < 2 or not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return Role.NONE
    if is_weight_of_a_layer(module, attribute, tuple(tensor.shape)):
        return Role.LAYER
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and attribute == "weight":
        return Role.TABLE
    return _role_of_a_bare_one(path, module, attribute, tensor)


def is_weight_of_a_layer(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> bool:
    """Whether it is what a linear, convolutional, recurrent or attention layer multiplies its input by.

    What a subclass adds, such as the factors of an adapter, is not.
    """
    if isinstance(module, _ConvNd):
        return is_kernel(module, attribute, shape)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return attribute.startswith(("weight_ih", "weight_hh", "weight_hr"))
    if isinstance(module, nn.MultiheadAttention):
        return attribute in ATTENTION
    if isinstance(module, nn.Linear | nn.Bilinear):
        return attribute == "weight"
    return is_stored_transposed(module, attribute, shape)


def is_kernel(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> TypeGuard[_ConvNd]:
    """Whether it is the kernel of a convolution."""
    return isinstance(module, _ConvNd) and attribute == "weight" and shape[2:] == tuple(module.kernel_size)


def is_stored_transposed(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the inputs × outputs of a ``Conv1D`` of transformers, which says so in ``nx`` and ``nf``."""
    return attribute == "weight" and shape == (getattr(module, "nx", None), getattr(module, "nf", None))


def _role_of_a_bare_one(path: str, module: nn.Module, attribute: str, tensor: Tensor) -> Role:
    *_, holder = path.split(".")
    words = _words(f"{holder}_{attribute}" if isinstance(module, nn.ParameterList | nn.ParameterDict) else attribute)
    vector_in_disguise = sum(size > 1 for size in tensor.shape) < 2
    if vector_in_disguise or words & BIASES or _is_a_scale(holder, module, attribute, tensor):
        return Role.NONE
    if attribute == "weight" and _holds_a_table(_words(holder)):
        return Role.BARE if use_of(module, attribute, tensor) == "multiplied" else Role.TABLE
    if _words(attribute.rpartition("_")[2]) & SCALES:  # weight_scale is the scale of a weight
        return Role.NONE
    is_named_as_matrix = bool(words & MATRICES)
    if not is_named_as_matrix and (words & SCALES or "log" in words or attribute.lower().endswith(STATES)):
        return Role.NONE
    is_named_as_table = not is_named_as_matrix and bool(words & TABLES)
    if is_named_as_table or (not says_its_features(module) and use_of(module, attribute, tensor) == "looked up"):
        return Role.TABLE
    return Role.BARE


def _holds_a_table(words: set[str]) -> bool:
    """Whether a module of this name has a table for its weight."""
    return (bool(words & HOLDERS) or any(word.startswith("emb") for word in words)) and not words & MATRICES


def _is_a_scale(holder: str, module: nn.Module, attribute: str, tensor: Tensor) -> bool:
    """Whether it is the scale of a normalization: of torch's, or of a module that is named or made like one."""
    if attribute not in ("weight", "scale", "gamma"):
        return False
    if isinstance(module, NORMALIZATIONS) or any(word.endswith("norm") or word == "ln" for word in _words(holder)):
        return True
    shapes = [tuple(p.shape) for p in module._parameters.values() if p is not None]
    has_epsilon = any(isinstance(getattr(module, name, None), float) for name in EPSILONS)
    if not has_epsilon or len(set(shapes)) > 1 or says_its_features(module):
        return False
    if sum(size > 1 for size in tensor.shape) > 2:
        return len(shapes) > 1  # a shift of the same shape, which no kernel has
    return use_of(module, attribute, tensor) != "multiplied"


def _words(name: str) -> set[str]:
    return {re.sub(r"\d+$", "", word) for word in name.lower().split("_")}
