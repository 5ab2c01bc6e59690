"""Low-rank adapters in a checkpoint: the product of their factors, alone or on top of the weight they adapt."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spectreg.checkpoints.quantized import NotReadableError

FACTORS = (
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
)
OTHER_KINDS = {
    r"lora_magnitude_vector|dora_scale": "DoRA", r"lora_mid": "LoCon with a Tucker decomposition",
    r"lora_E|ranknum": "AdaLoRA", r"lora_diag": "KaSA", r"gaussian_var_prior": "MonteCLoRA",
    r"hada_(w[12](_[ab])?|t[12])": "LoHa", r"lokr_(w[12](_[ab])?|t2)": "LoKr",
    r"oft_([rRL]|blocks|diag)": "OFT", r"boft_[RS]": "BOFT", r"vera_(A|B|lambda_[bd])": "VeRA",
}  # fmt: skip
OTHER_SETTINGS = {
    "use_dora": "DoRA", "kasa_config": "KaSA", "use_bdlora": "BD-LoRA", "monteclora_config": "MonteCLoRA",
    "use_qalora": "QA-LoRA", "arrow_config": "Arrow",
}  # fmt: skip
MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of init_lora_weights
OF_PEFT = ("lora_A", "lora_embedding_A")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """The factors of one adapted weight: names of the first (rank × inputs) and the second (outputs × rank)."""

    layer: str
    first: str
    second: str
    kind: str
    own_name: str

    @property
    def stem(self) -> str:
        """What the names of both factors begin with."""
        return self.first.partition(f".{self.kind}")[0]

    @property
    def own_base(self) -> str:
        """The adapted weight, where it is stored together with the factors."""
        return f"{self.stem}.base_layer.weight"


def adapter_of(name: str) -> Adapter | None:
    """The adapter whose first factor is called ``name``.

    >>> adapter_of("base_model.model.fc.lora_A.default.weight").layer
    'fc'
    """
    for kind, other in FACTORS:
        before, marker, after = name.partition(f".{kind}")
        if marker and (not after or after.startswith(".")):
            own_name = after.removesuffix(".weight").lstrip(".")
            return Adapter(before.removeprefix(PREFIX), name, f"{before}.{other}{after}", kind, own_name)
    return None


def adapters_in(names: Iterable[str]) -> Counter[str]:
    """How many adapters each layer has.

    >>> adapters_in(["fc.lora_A.a.weight", "fc.lora_A.b.weight", "fc.weight"])
    Counter({'fc': 2})
    """
    return Counter(adapter.layer for adapter in map(adapter_of, names) if adapter)


def is_second_factor(name: str) -> bool:
    return any(f".{other}." in f"{name}." for _, other in FACTORS)


def other_kind(name: str) -> str | None:
    """The kind of adapter, other than a low-rank one, that a tensor of this name belongs to.

    >>> other_kind("unet.down.0.hada_w1_a")
    'LoHa'
    """
    kinds = (kind for part in name.split(".") for own, kind in OTHER_KINDS.items() if re.fullmatch(own, part))
    return next(kinds, None)


def product(adapter: Adapter, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Tensor:
    """(α/r)·BA, outputs × inputs; of a convolution, inputs times kernel."""
    if adapter.second not in tensors:
        raise NotReadableError(f"the factor {adapter.second!r} is missing")
    beside = (n.removeprefix(f"{adapter.stem}.") for n in tensors if n.startswith(f"{adapter.stem}."))
    kinds = (other_kind(n.partition(".")[0]) for n in beside)
    if kind := next(filter(None, kinds), None) or configured_kind(adapter.layer, config or {}):
        raise NotReadableError(f"{kind}, which is more than the product of two factors: merge it and save that")
    A, B = (tensors[name].double() for name in (adapter.first, adapter.second))
    if adapter.kind == "lora_embedding_A":
        return scale(adapter, len(A), tensors, config) * (B @ A).T
    if B.shape[1] != len(A) or math.prod(B.shape[2:]) != 1:
        raise NotReadableError(f"factors of shapes {tuple(A.shape)} and {tuple(B.shape)} make no product")
    return scale(adapter, len(A), tensors, config) * (B.flatten(1) @ A.flatten(1))


def configured_kind(layer: str, config: Mapping[str, Any]) -> str | None:
    """The kind of adapter that ``adapter_config.json`` makes of a layer, other than a low-rank one.

    >>> configured_kind("fc", {"peft_type": "LORA", "use_dora": True})
    'DoRA'
    """
    kind = str(config.get("peft_type") or "LORA")
    if kind.upper() != "LORA":
        return kind
    targets = config.get("target_parameters") or ()
    for module in (str(target).rpartition(".")[0] for target in targets):
        if f".{layer.removesuffix('.base_layer')}".endswith(f".{module}"):
            return "LoRA of parameters, which may be a matrix for each expert"
    return next((name for setting, name in OTHER_SETTINGS.items() if config.get(setting)), None)


def refuse_moved_base(config: Mapping[str, Any]) -> None:
    """Raise where the adapter was begun from the weight itself, of which what it began with is then taken off."""
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(MOVE_THE_BASE):
        raise NotReadableError(
            f"init_lora_weights is {begun!r}, which takes what the adapter begins with off the weight in the base: "
            "merge it and save that, or leave base out to measure the product of its factors"
        )


def scale(adapter: Adapter, rank: int, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> float:
    """α/r: from the file where it is stored, else from ``adapter_config.json``."""
    if (stored := f"{adapter.stem}.alpha") in tensors:
        return tensors[stored].item() / rank
    if adapter.kind not in OF_PEFT:
        return 1.0
    if config is None:
        raise NotReadableError("its scale lora_alpha/r is not known: keep adapter_config.json beside the file")
    alpha = _alpha(adapter.layer, config)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise NotReadableError(f"its scale lora_alpha/r is not known: adapter_config.json has {alpha!r} for lora_alpha")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alpha(layer: str, config: Mapping[str, Any]) -> Any:
    """α of a layer: of the first pattern of ``alpha_pattern`` that matches its name, else ``lora_alpha``."""
    patterns = config.get("alpha_pattern") or {}
    try:
        own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return next(own, config.get("lora_alpha"))
    except (AttributeError, re.error) as error:
        raise NotReadableError(f"alpha_pattern of adapter_config.json is {patterns!r}: no map of patterns") from error


def merged(weight: Tensor, change: Tensor, turned: bool) -> Tensor:
    """W + (α/r)·BA, where W is stored as inputs × outputs if it is ``turned``."""
    change = change.T if turned else change
    if change.shape != weight.flatten(1).shape:
        raise NotReadableError(f"the adapter is {tuple(change.shape)}, the weight in the base {tuple(weight.shape)}")
    return weight.double() + change.reshape(weight.shape)


def name_in(base: Mapping[str, Tensor], layer: str) -> str:
    """The weight of ``layer``, also where one of the two names has a prefix that the other lacks."""
    wanted = f"{layer}.weight"
    if wanted in base:
        return wanted
    similar = [name for name in base if name.endswith(f".{wanted}") or (wanted.endswith(f".{name}") and "." in name)]
    if len(similar) != 1:
        raise NotReadableError(f"the base has {len(similar)} weights that could be {wanted!r}")
    return similar[0]
