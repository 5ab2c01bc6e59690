"""Reading the tensors of a checkpoint by name, executing nothing."""

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectreg.checkpoints.nested import state_dict
from spectreg.checkpoints.quantized import NotReadableError

ADAPTER = "adapter_config.json"
OTHER_FORMATS = {
    b"GGUF": "a GGUF file: read it with the gguf package and give the tensors as a dict",
    b"\x89HDF": "an HDF5 file: read it with h5py and give the tensors as a dict",
}


class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each loaded when it is asked for.

    Args:
        path: ``*.safetensors``; ``*.index.json`` with its shards (the layout of Hugging Face); anything else as
            ``torch.save`` wrote it, memory-mapped where its format allows, by ``torch.load(weights_only=True)``. Of a
            training checkpoint the model's state dict.

    Attributes:
        files: Every file that is read.
        passed_over: What else a training checkpoint holds, by key, with the reason why it is left out.
        adapter: The ``adapter_config.json`` beside it, where there is one.

    Raises:
        FileNotFoundError: No such file, or a shard is missing.
        ValueError: Truncated, no checkpoint, or a pickle that would execute code; it never is.
        ImportError: ``*.safetensors`` without the safetensors package.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not a file"
            raise FileNotFoundError(f"{str(path)!r} {what}: give a checkpoint or the index.json of a sharded one.")
        self.files = [path]
        self.passed_over: dict[str, str] = {}
        self.adapter = _adapter_beside(path)
        self._loaders: dict[str, Callable[[], Tensor]] = {}
        self._open = ExitStack()
        if path.name.endswith(".json"):
            self._read_index(path)
        elif path.suffix == ".safetensors":
            self._read_safetensors(path)
        else:
            tensors, self.passed_over = state_dict(load(path), str(path))
            self._loaders = {name: lambda name=name: tensors[name] for name in tensors}  # type: ignore[misc]

    def __getitem__(self, name: str) -> Tensor:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def _read_safetensors(self, path: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(
                f"reading {path.name!r} needs the safetensors package: pip install safetensors"
            ) from error
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is truncated or not a safetensors file, or newer than this safetensors: {error}"
            ) from error

        def read(name: str) -> Tensor:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise NotReadableError(f"this safetensors cannot read it ({error})") from error

        self._loaders = {name: lambda name=name: read(name) for name in file.keys()}  # type: ignore[misc] # noqa: SIM118

    def _read_index(self, index: Path) -> None:
        """The tensors that an ``index.json`` assigns to its shards, shard by shard."""
        weight_map = _weight_map(index)
        for file in dict.fromkeys(weight_map.values()):
            shard = Stored(index.parent / file)
            self.files += shard.files
            for name in (name for name, place in weight_map.items() if place == file):
                if name not in shard:
                    raise ValueError(f"shard {file!r} lacks {name!r}, which {index.name!r} places there.")
                self._loaders[name] = lambda shard=shard, name=name: shard[name]  # type: ignore[misc]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = dict.fromkeys(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(index)!r} has no 'weight_map': it is not the index of a sharded checkpoint.") from error
    for file in files:
        if not isinstance(file, str) or not file or file.endswith(".json"):
            raise ValueError(f"{str(index)!r} places tensors in {file!r}, which is not the name of a shard.")
    return dict(weight_map)


def _adapter_beside(path: Path) -> dict[str, Any] | None:
    config = path.parent / ADAPTER
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(config)!r} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(config)!r} holds a {type(content).__name__}: it is no configuration of an adapter.")
    return content


def load(path: Path) -> Any:
    """What ``torch.save`` wrote, as far as it is data."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic in OTHER_FORMATS:
        raise ValueError(f"{str(path)!r} is {OTHER_FORMATS[magic]}.")
    zipped = zipfile.is_zipfile(path)
    if magic == b"PK\x03\x04" and not zipped:
        raise ValueError(f"{str(path)!r} is truncated: its directory is missing. Copy it again.")
    if zipped:
        _refuse_other_archives(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{str(path)!r} is refused, it would call {code[1]} on loading.") from error
        raise ValueError(f"{str(path)!r} is truncated or not a checkpoint that torch.save wrote.") from error


def _refuse_other_archives(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError(
            f"{str(path)!r} is a TorchScript program: save torch.jit.load(path).state_dict() with torch.save, and give "
            "that."
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError(
            f"{str(path)!r} is a zip archive without a checkpoint (torch.export, numpy or another): save the state "
            "dict with torch.save, and give that."
        )
