"""How much of a data set is used: what a setting asks for, held against what there is."""

from spectreg_lab.data.errors import DataError
from spectreg_lab.settings.config import Data


def classes_of(setting: Data, there: int) -> int:
    """How many classes are used of those ``there``."""
    classes = setting.classes or there
    if classes > there:
        raise DataError(f"classes = {classes}, but {setting.name} has {there}")
    return classes


def size_of(split: str, asked: int | None, there: int) -> int:
    """How many images are used of those ``there``."""
    if asked is not None and asked > there:
        raise DataError(f"{split}_size = {asked}, but there are {there} {split} images")
    return there if asked is None else asked


def shrunk(setting: Data, height: int, width: int) -> tuple[int, int]:
    """The height and width that images are shrunk to."""
    shrink = setting.shrink or 1
    if shrink > min(height, width):
        raise DataError(f"shrink = {shrink} leaves nothing of images of {(height, width)} pixels")
    return height // shrink, width // shrink


def held_out(setting: Data, train: int) -> int:
    """How many of the training images are held out for validation."""
    held = round(train * setting.validation)
    if setting.validation and not 0 < held < train:
        raise DataError(f"validation = {setting.validation} of {train} training images leaves none on one side")
    return held
