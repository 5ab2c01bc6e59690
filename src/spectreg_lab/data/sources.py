"""Where images come from: scikit-learn's digits, the Hugging Face hub, parquet files, folders of images."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from spectreg_lab.data.errors import DataError
from spectreg_lab.data.labels import as_classes, integers
from spectreg_lab.data.pictures import pixels

ALIASES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "stl10": "tanganke/stl10"}
IMAGES, LABELS = ("img", "image"), ("label", "fine_label")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
DIGITS = {"digits": 397, "few-digits": 1000}  # test images: the last ones of scikit-learn's 1797

PARQUET = "train.parquet, train-*.parquet or train/*.parquet, and test likewise"
SHOWN = 5  # files that are left out

Decoded = dict[str, tuple[np.ndarray, np.ndarray]]  # split: images (n, h, w, c) in 0 … 255, labels (n,)


def locate(name: str) -> tuple[str, list[Path]]:
    """What ``name`` means: a key of `DIGITS`, ``hub:…``, ``parquet:…`` or ``folder:…``, and its files."""
    if name in DIGITS:
        return name, []
    path = Path(os.path.expandvars(name)).expanduser()
    if "$" in str(path):
        raise DataError(f"data {name!r}: set the environment variable that it names to the folder of the data")
    if path.is_dir():
        path = path.resolve()
        files = sorted(_files(path))
        if parquet := [p for p in files if p.suffix == ".parquet"]:
            return f"parquet:{path}", parquet
        if images := [p for p in files if p.suffix.lower() in IMAGE_ENDINGS or _describes(p)]:
            return f"folder:{path}", images
        raise DataError(f"data {name!r}: the folder holds neither .parquet files nor images in train/ and test/")
    if "$" in name:
        raise DataError(f"data {name!r}: there is no folder {path}")
    known = [*DIGITS, *ALIASES]
    near = get_close_matches(name, known, n=1)
    if name in ALIASES or (name.count("/") == 1 and not name.startswith((".", "/", "~")) and not near):
        return f"hub:{ALIASES.get(name, name)}", []
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}, a hub name such as 'user/name'"
    raise DataError(f"data {name!r}: no such folder or name; {hint} (a folder holds {PARQUET})")


def _files(folder: Path) -> Iterator[Path]:
    """All files below ``folder``, through links too, without those that are hidden or in hidden folders."""
    for place, folders, names in os.walk(folder, followlinks=True):
        above = {Path(place).resolve(), *Path(place).resolve().parents}
        folders[:] = [n for n in folders if not n.startswith(".") and (Path(place) / n).resolve() not in above]
        yield from (Path(place) / name for name in names if not name.startswith("."))


def _describes(path: Path) -> bool:
    """Whether a file gives the labels of the images beside it."""
    return path.name in ("metadata.csv", "metadata.jsonl")


def decode(source: str, files: list[Path], progress: Callable[[str], None]) -> tuple[Decoded, int]:
    """The pixels of both splits as they are, their labels as classes 0 … n − 1, and n."""
    splits, classes = _digits(DIGITS[source]) if source in DIGITS else _from_datasets(source, files, progress)
    train, test = (splits[name][0].shape[1:] for name in ("train", "test"))
    if train != test:
        raise DataError(f"{source}: training images are {train}, test images {test} (height, width, channels)")
    return splits, classes


def _digits(held_back: int) -> tuple[Decoded, int]:
    table = _digits_file()
    images, labels = table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16), table[:, -1].astype(int)
    cut = len(labels) - held_back
    return {"train": (images[:cut], labels[:cut]), "test": (images[cut:], labels[cut:])}, 10


def _digits_file() -> np.ndarray:
    """A row an image: 64 pixels and the label. Without importing scikit-learn, which takes as long as torch does."""
    package = find_spec("sklearn")
    for place in (package and package.submodule_search_locations) or ():
        if (file := Path(place) / "datasets" / "data" / "digits.csv.gz").is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def _from_datasets(source: str, files: list[Path], progress: Callable[[str], None]) -> tuple[Decoded, int]:
    import datasets

    datasets.disable_progress_bars()
    kind, _, place = source.partition(":")
    try:
        dataset = datasets.load_dataset(place) if kind == "hub" else _from_files(source, files, progress)
    except DataError:
        raise
    except Exception as error:  # whatever the reader of the format raises, the user sees one line
        besides = f" (and there is no folder {place} here)" if kind == "hub" and place not in ALIASES.values() else ""
        raise DataError(f"{source} cannot be read: {type(error).__name__}: {_first_line(error)}{besides}") from error
    test = "test" if "test" in dataset else "validation"
    if "train" not in dataset or test not in dataset:
        raise DataError(f"{source} has the splits {sorted(dataset)}: train and test are needed")
    if unused := sorted(set(dataset) - {"train", test}):
        progress(f"{source}: the splits train and {test} are used, and not {', '.join(unused)}")
    feature = dataset["train"].features[_column(dataset["train"], LABELS, source)]
    train, other = (_labels(dataset[split], f"{source} {split}") for split in ("train", test))
    named = getattr(feature, "names", None) or ()
    train, other, classes = as_classes(train, other, source, progress, named)
    if classes < len(named):
        progress(f"{source}: {len(named) - classes} of {len(named)} named classes have no training image")
    labels = {"train": train, "test": other}
    pictures = {"train": dataset["train"], "test": dataset[test]}
    return {n: (_pictures(pictures[n], f"{source} {n}", progress), labels[n]) for n in labels}, classes


def _from_files(source: str, files: list[Path], progress: Callable[[str], None]) -> Any:
    """A dataset of local files, in memory: the reader's cache takes files of the same name and time for the same."""
    import datasets
    from pyarrow import parquet

    kind, _, place = source.partition(":")
    if kind == "parquet":
        _check_class_names(source, files)
        filled = [path for path in files if parquet.read_metadata(path).num_rows]  # of none it makes an error
        found: dict[str, Any] = {"data_files": _by_split(Path(place), filled, PARQUET, progress)}
    else:
        kind, found = "imagefolder", _image_folder(Path(place), files, progress)
    os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
    with TemporaryDirectory(dir=datasets.config.HF_DATASETS_CACHE) as scratch:
        return datasets.load_dataset(kind, **found, cache_dir=scratch, keep_in_memory=True)


def _check_class_names(source: str, files: list[Path]) -> None:
    """Raise where files name their classes, and not alike: the reader takes the names of the first for all of them."""
    import datasets
    from pyarrow import parquet

    first: tuple[str, list[str]] | None = None
    for path in files:
        features = datasets.Features.from_arrow_schema(parquet.read_schema(path))
        names = next((getattr(features[column], "names", None) for column in LABELS if column in features), None)
        first = first or (names and (path.name, list(names)))
        if first and names and list(names) != first[1]:
            i, *_ = (i for i, pair in enumerate(zip_longest(first[1], names)) if pair[0] != pair[1])
            mine, theirs = (repr(n[i]) if i < len(n) else "no class" for n in (first[1], names))
            raise DataError(
                f"{source}: the label {i} is {mine} in {first[0]} and {theirs} in {path.name}: give all files the same "
                "list of class names"
            )


def _column(split: Any, names: tuple[str, ...], source: str) -> str:
    for name in names:
        if name in split.column_names:
            return name
    raise DataError(f"{source} has the columns {split.column_names}: one of {', '.join(names)} is needed")


def _labels(split: Any, where: str) -> np.ndarray:
    if not len(split):
        raise DataError(f"{where}: no images")
    column = _column(split, LABELS, where)
    return integers(split[column][:], f"{where}, column {column!r}")


def _pictures(split: Any, source: str, progress: Callable[[str], None]) -> np.ndarray:
    """All pictures as one array; grey ones among coloured ones become coloured."""
    image, pictures = _column(split, IMAGES, source), []
    for i in range(len(split)):
        try:
            pictures.append(pixels(_opened(split[i][image])))
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise DataError(f"{source}: {_name(split, image, i)} cannot be decoded: {_first_line(error)}") from error
        size, first = pictures[i].shape[:2], pictures[0].shape[:2]
        if size != first:
            raise DataError(
                f"{source}: {_name(split, image, i)} is {size} where the first is {first} "
                "(height, width): all images must have one size; resize them first"
            )
        if i % 5000 == 4999:
            progress(f"{source}: {i + 1} of {len(split)} images decoded")
    channels = max(picture.shape[2] for picture in pictures)
    return np.stack([np.broadcast_to(picture, (*picture.shape[:2], channels)) for picture in pictures])


def _name(split: Any, column: str, i: int) -> str:
    """The number of an image, and its file where it has one."""
    import datasets

    if not isinstance(split.features[column], datasets.Image):
        return f"image {i}"
    picture = split.cast_column(column, datasets.Image(decode=False))[i][column]
    return f"image {i} ({picture['path']})" if picture and picture["path"] else f"image {i}"


def _opened(picture: Any) -> Any:
    """A picture, which parquet files of other tools than ``datasets`` hold as its file's bytes."""
    if picture is None:
        raise ValueError("there is no image")
    content = picture.get("bytes") if isinstance(picture, dict) else picture
    if not isinstance(content, bytes):
        return picture
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(BytesIO(content)))


def _image_folder(folder: Path, files: list[Path], progress: Callable[[str], None]) -> dict[str, Any]:
    """What the reader of image folders is told: the files of each split, and whether folders are classes."""
    labels = [path for path in files if _describes(path)]
    if any(_split_of(folder, path) is None for path in labels):  # one for all splits
        return {"data_dir": glob.escape(str(folder))}
    if not labels:
        for path in files:
            _check_class_folder(folder, path)
    by_split = _by_split(folder, files, "train/CLASS/ and test/CLASS/", progress)
    return {"data_files": by_split} | ({} if labels else {"drop_labels": False})


def _check_class_folder(folder: Path, path: Path) -> None:
    """Raise unless an image of a split lies in a folder of its class, and not deeper."""
    if (place := _split_of(folder, path)) is None:
        return
    between = path.relative_to(folder).parts[place[1] + 1 : -1]
    if len(between) != 1:
        why = f"is {len(between)} folders below" if between else "is in no folder of a class below"
        raise DataError(f"{path} {why} its split: an image lies in train/CLASS/ or test/CLASS/, or has metadata.csv")


def _by_split(folder: Path, files: list[Path], where: str, progress: Callable[[str], None]) -> dict[str, list[str]]:
    """The files of each split: what the first folder or file below ``folder`` that is called so belongs to."""
    named: dict[str, list[str]] = {}
    for path in files:
        if place := _split_of(folder, path):
            named.setdefault(place[0], []).append(glob.escape(str(path)))  # the reader takes it for a pattern
    others = _listed([str(path.relative_to(folder)) for path in files if not _split_of(folder, path)])
    lacking = ["training"] * ("train" not in named) + ["test"] * (not named.keys() & {"test", "validation"})
    if lacking:
        besides = f"; of no split by their names: {others}" if others else ""
        raise DataError(f"{folder} has no {' and no '.join(lacking)} images: they are looked for in {where}{besides}")
    if others:
        progress(f"{folder}: left out, since their names say no split: {others}")
    return named


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _split_of(folder: Path, path: Path) -> tuple[str, int] | None:
    """The split that a file belongs to by the first word of a part of its path, and the number of that part."""
    for i, part in enumerate(path.relative_to(folder).parts):
        if split := SPLITS.get(re.split(r"[^a-z]", part.lower())[0]):
            return split, i
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
