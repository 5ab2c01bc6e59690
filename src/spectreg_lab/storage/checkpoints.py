"""A checkpoint file: tensors and the epoch after which they are, with a checksum that every reading verifies.

Torch is imported where tensors are read or written: how far a study is can be told without it.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from spectreg_lab.storage.files import write as write_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1


class DamagedCheckpointError(Exception):
    """A file that is not what was written; the message says how that is known."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after ``epoch``: tensors by ``part/name``."""

    epoch: int
    tensors: dict[str, "Tensor"]

    def part(self, name: str) -> dict[str, "Tensor"]:
        """The tensors below ``name/``, without that prefix."""
        prefix = name + "/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` at ``path``, whole or not at all."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {"format": str(FORMAT), "epoch": str(checkpoint.epoch)}
    write_file(path, save(tensors, metadata | {"checksum": _checksum(checkpoint.epoch, tensors)}))


def read(path: Path) -> Checkpoint:
    """Read the checkpoint at ``path``.

    Raises:
        DamagedCheckpointError: the file was cut short or changed, or never was a checkpoint.
        OSError: the file cannot be read now, whatever is in it.
    """
    with path.open("rb") as file:  # an error of the system shows here, apart from one of the content
        if len(file.read(8)) < 8:
            raise DamagedCheckpointError("it was cut short")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, struct.error, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(str(error)) from None
    epoch = metadata.get("epoch", "")
    if not (epoch.isascii() and epoch.isdigit() and len(epoch) < 20):
        raise DamagedCheckpointError(f"it says epoch {epoch!r}")
    if metadata.get("checksum") != _checksum(int(epoch), tensors):
        raise DamagedCheckpointError("its checksum is not that of its content")
    return Checkpoint(int(epoch), tensors)


def _checksum(epoch: int, tensors: dict[str, "Tensor"]) -> str:
    """A CRC-32 of the epoch and of every tensor's name, type, shape and bytes: any single changed bit shows."""
    import torch

    checksum = zlib.crc32(str(epoch).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
