"""The names of modules, without those under which wrappers hold what they wrap."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # by torch.compile, and by activation checkpointing


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, but a module inside of a wrapper has the name that it had without.

    >>> [name for name, _ in named_modules(nn.Sequential(DataParallel(nn.Sequential(nn.ReLU()))))]
    ['', '0', '0', '0.0']
    """
    found: dict[str, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        name = last
        if path:
            outer, parent = found[above]
            parallel = last == "module" and isinstance(parent, DataParallel | DistributedDataParallel)
            hidden = parallel or last in WRAPPED
            name = outer if hidden else f"{outer}.{last}".lstrip(".")
        found[path] = name, module
        yield name, module
