"""The names of modules, without those under which wrappers hold what they wrap."""

import sys
from collections.abc import Iterator

from torch import nn

# Where each kind of wrapper is defined, and under which name it holds what it wraps.
WRAPPERS = (
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, but a module inside of a wrapper has the name that it had without.

    >>> [name for name, _ in named_modules(nn.Sequential(nn.DataParallel(nn.Sequential(nn.ReLU()))))]
    ['', '0', '0', '0.0']
    """
    seen: dict[str, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        name = last
        if path:
            outer, parent = seen[above]
            name = outer if _wraps(parent, last) else f"{outer}.{last}".lstrip(".")
        seen[path] = name, module
        yield name, module


def _wraps(parent: nn.Module, child: str) -> bool:
    """Whether ``parent`` is a wrapper; one whose module nobody has imported cannot be there."""
    return any(
        child == held and place in sys.modules and isinstance(parent, getattr(sys.modules[place], kind))
        for place, kind, held in WRAPPERS
    )
