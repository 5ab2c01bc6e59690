"""The model's state dict in what a training checkpoint holds."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

NESTED = ("state_dict", "model_state_dict", "model", "module")


def state_dict(content: Any, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and what is passed over with the reason.

    The state dict is what one of ``NESTED`` holds, whatever tensors lie beside it (random states, steps, queues);
    else the content itself, or the only mapping in it that holds weights.
    """
    if isinstance(content, Mapping):
        for key in NESTED:
            if isinstance(content.get(key), Mapping) and _somewhere(content[key]):
                return _inside(content, key, source)
        holders = [key for key, value in content.items() if isinstance(value, Mapping) and _has_weights(value)]
        if len(holders) + _has_weights(content) > 1:
            also = "weights, and beside them " if _has_weights(content) else ""
            raise ValueError(
                f"{source} holds {also}state dicts under {', '.join(map(repr, holders))}, and none under "
                f"{', '.join(NESTED)}: save the one that is meant by itself."
            )
        if holders:
            return _inside(content, holders[0], source)
        if any(isinstance(value, Tensor) for value in content.values()):
            tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
            return tensors, {str(k): "no tensor" for k, v in content.items() if not isinstance(v, Tensor)}
    held = f"the keys {list(content)[:5]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(f"{source} holds {held}: no tensors, and no state dict under {', '.join(NESTED)}.")


def _inside(content: Mapping[Any, Any], key: str, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, passed_over = state_dict(content[key], f"{source}[{key!r}]")
    beside = {str(k): f"beside the state dict in {key!r}" for k in content if k != key}
    return tensors, beside | passed_over


def _has_weights(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(x, Tensor) and x.ndim >= 2 and x.numel() > 0 for x in content.values())


def _somewhere(content: Mapping[Any, Any]) -> bool:
    """Whether there are tensors in it, at any depth of mappings."""
    return any(isinstance(x, Tensor) or (isinstance(x, Mapping) and _somewhere(x)) for x in content.values())
