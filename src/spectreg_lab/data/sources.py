"""Where images come from: scikit-learn's digits, the Hugging Face hub, parquet files, folders of images."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

ALIASES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "stl10": "tanganke/stl10"}
IMAGES, LABELS = ("img", "image"), ("label", "fine_label")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")
DIGITS_TEST = 397  # of scikit-learn's 1797 digits, the last ones

Decoded = dict[str, tuple[np.ndarray, np.ndarray]]  # split: images (n, h, w, c) in 0 … 255, labels (n,)


class DataError(Exception):
    """The images asked for cannot be had or used; the message says what would do."""


def locate(name: str) -> tuple[str, list[Path]]:
    """What ``name`` means: ``digits``, ``hub:…``, ``parquet:…`` or ``folder:…`` with the files that it consists of."""
    if name == "digits":
        return "digits", []
    path = Path(os.path.expandvars(name)).expanduser()
    if "$" in str(path):
        raise DataError(f"data {name!r}: set the environment variable that it names to the folder of the data")
    if path.is_dir():
        parquet = sorted(path.glob("*.parquet"))
        if parquet:
            return f"parquet:{path.resolve()}", parquet
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
        if images:
            return f"folder:{path.resolve()}", images
        raise DataError(f"data {name!r}: the folder holds neither .parquet files nor images in train/ and test/")
    known = ["digits", *ALIASES]
    near = get_close_matches(name, known, n=1)
    if name in ALIASES or (name.count("/") == 1 and not name.startswith((".", "/", "~")) and not near):
        return f"hub:{ALIASES.get(name, name)}", []
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}, a hub name such as 'user/name'"
    raise DataError(f"data {name!r}: no such folder or name; {hint} (a folder holds train*.parquet and test*.parquet)")


def decode(source: str, files: list[Path], progress: Callable[[str], None]) -> tuple[Decoded, int]:
    """The pixels and labels of both splits as they are, and the number of classes; checked for shape and range."""
    splits, classes = _digits() if source == "digits" else _from_datasets(source, files, progress)
    for name, (_, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"{source}: {name} labels run from {labels.min()} to {labels.max()}, but there are {classes} classes: "
                f"labels must lie between 0 and {classes - 1}"
            )
    train, test = (splits[name][0].shape[1:] for name in ("train", "test"))
    if train != test:
        raise DataError(f"{source}: training images are {train}, test images {test} (height, width, channels)")
    return splits, classes


def _digits() -> tuple[Decoded, int]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images[..., None] * (255 / 16), digits.target
    cut = len(labels) - DIGITS_TEST
    return {"train": (images[:cut], labels[:cut]), "test": (images[cut:], labels[cut:])}, 10


def _from_datasets(source: str, files: list[Path], progress: Callable[[str], None]) -> tuple[Decoded, int]:
    import datasets

    datasets.disable_progress_bars()
    kind, _, place = source.partition(":")
    try:
        if kind == "hub":
            found = datasets.load_dataset(place)
        elif kind == "parquet":
            named = {s: [str(p) for p in files if p.name.startswith(s)] for s in ("train", "test", "validation")}
            found = datasets.load_dataset("parquet", data_files={s: paths for s, paths in named.items() if paths})
        else:
            found = datasets.load_dataset("imagefolder", data_dir=place)
    except Exception as error:  # whatever the reader of the format raises, the user sees one line
        raise DataError(f"{source} cannot be read: {type(error).__name__}: {_first_line(error)}") from error
    test = "test" if "test" in found else "validation"
    if "train" not in found or test not in found:
        raise DataError(f"{source} has the splits {sorted(found)}: train and test are needed")
    splits = {
        name: _arrays(found[split], f"{source} {split}", progress)
        for name, split in (("train", "train"), ("test", test))
    }
    feature = found["train"].features[_column(found["train"], LABELS, source)]
    classes = getattr(feature, "num_classes", None) or int(max(labels.max() for _, labels in splits.values())) + 1
    return splits, classes


def _column(split: Any, names: tuple[str, ...], source: str) -> str:
    for name in names:
        if name in split.column_names:
            return name
    raise DataError(f"{source} has the columns {split.column_names}: one of {', '.join(names)} is needed")


def _arrays(split: Any, source: str, progress: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    image, label = _column(split, IMAGES, source), _column(split, LABELS, source)
    labels = np.asarray(split[label])
    if labels.dtype.kind not in "iu":
        raise DataError(f"{source}: labels must be integers, got {labels.dtype} in column {label!r}")
    pictures = []
    for i in range(len(split)):
        pictures.append(_pixels(split, i, image, source))
        if pictures[i].shape[:2] != pictures[0].shape[:2]:
            raise DataError(
                f"{source}: image {i} is {pictures[i].shape[:2]} where the first is {pictures[0].shape[:2]} "
                "(height, width): all images must have one size; resize them first"
            )
        if i % 5000 == 4999:
            progress(f"{source}: {i + 1} of {len(split)} images decoded")
    if not pictures:
        raise DataError(f"{source}: no images")
    channels = max(picture.shape[2] for picture in pictures)  # grey pictures among coloured ones become coloured
    return np.stack([np.broadcast_to(p, (*p.shape[:2], channels)) for p in pictures]), labels


def _pixels(split: Any, i: int, column: str, source: str) -> np.ndarray:
    """Height × width × 3, or × 1 for a grey picture; 0 … 255."""
    try:
        picture = split[i][column]
        pixels = np.asarray(picture if picture.mode in ("RGB", "L") else picture.convert("RGB"))
    except Exception as error:
        raise DataError(f"{source}: image {i} cannot be decoded: {_first_line(error)}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
