"""A picture as numbers 0 … 255: grey or coloured, of eight bits or sixteen, the transparent ones on white."""

from typing import Any

import numpy as np

BACKGROUND = (255, 255, 255, 255)
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # of Pillow, for grey pictures of sixteen bits
COLOURED = ("RGB", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA", "RGBa", "La")


def pixels(picture: Any) -> np.ndarray:
    """Height × width × 3, or × 1 for a grey picture; 0 … 255.

    Raises:
        ValueError: pictures of that mode, or that depth, have no values between black and white.
    """
    if picture.mode in DEEP:
        return _deep(np.asarray(picture))
    if picture.mode in ("1", "L") and "transparency" not in picture.info:
        return np.asarray(picture.convert("L"))[..., None]
    if picture.mode not in (*COLOURED, "1", "L"):
        raise ValueError(f"a picture of mode {picture.mode} has no black and white to scale by: save it as PNG or JPEG")
    if picture.has_transparency_data:
        from PIL import Image

        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, BACKGROUND), picture)
    return np.asarray(picture.convert("RGB"))


def _deep(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values run from {values.min()} to {values.max()}: at most sixteen bits can be read")
    return (values.astype(np.float32) * (255 / 65535))[..., None]
