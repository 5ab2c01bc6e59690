"""Reading the tensors of a checkpoint, one at a time, executing nothing."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NESTED = ("state_dict", "model_state_dict", "model", "module")


def read_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a checkpoint, one in memory at a time.

    ``*.safetensors``; ``*.index.json`` with its shards (the layout of Hugging Face); anything else as ``torch.save``
    wrote it, memory-mapped where its format allows, by ``torch.load(weights_only=True)``. In a training checkpoint
    the model's state dict is read, found under one of ``state_dict``, ``model_state_dict``, ``model``, ``module``.

    Raises:
        FileNotFoundError: No such file, or a shard is missing.
        ValueError: Truncated, no checkpoint, or a pickle that would execute code; it never is.
        ImportError: ``*.safetensors`` without the safetensors package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file: give a checkpoint or the index.json of a sharded one.")
    if path.name.endswith(".json"):
        yield from shards(path)
    elif path.suffix == ".safetensors":
        yield from safetensors(path)
    else:
        yield from torch_file(path)


def shards(index: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an ``index.json`` assigns to its shards, shard by shard."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = dict.fromkeys(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} has no 'weight_map': it is not the index of a sharded checkpoint.") from error
    for file in files:
        expected = {name for name, shard in weight_map.items() if shard == file}
        for name, tensor in read_tensors(index.parent / file):
            if name in expected:
                expected.remove(name)
                yield name, tensor
        if expected:
            raise ValueError(f"shard {file!r} lacks {sorted(expected)[0]!r}, which {index.name!r} places there.")


def safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"reading {path.name!r} needs the safetensors package: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or not a safetensors file: {error}") from error


def torch_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    with path.open("rb") as file:
        looks_zipped = file.read(4) == b"PK\x03\x04"
    zipped = zipfile.is_zipfile(path)
    if looks_zipped and not zipped:
        raise ValueError(f"{str(path)!r} is truncated: its directory is missing. Copy it again.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{str(path)!r} is refused, it would call {code[1]} on loading.") from error
        raise ValueError(f"{str(path)!r} is truncated or not a checkpoint that torch.save wrote.") from error
    yield from state_dict(content, str(path)).items()


def state_dict(content: Any, source: str) -> Mapping[str, Tensor]:
    """The tensors by name in what a checkpoint holds."""
    if isinstance(content, Mapping):
        if any(isinstance(value, Tensor) for value in content.values()):
            return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        for key in NESTED:
            if isinstance(content.get(key), Mapping):
                return state_dict(content[key], f"{source}[{key!r}]")
    held = f"the keys {list(content)[:5]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(f"{source} holds {held}: no tensors, and no state dict under {', '.join(NESTED)}.")
