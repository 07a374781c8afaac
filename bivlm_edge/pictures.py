"""Files to pictures in RGB: one way for questions, data sets and calibration. Needs no torch."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from bivlm_edge.errors import DataError

_MOST_SQUARE_PIXELS = 200_000_000

# All that Pillow's decoders raise on damaged files; they share no base but Exception.
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    Image.DecompressionBombError,
)


def open_picture(file: Path | str | IO[bytes], name: str | None = None) -> Image.Image:
    """Return the picture in a file, upright and in RGB.

    Any size, mode and format that Pillow decodes: the EXIF orientation is applied, transparency
    lies on white, 16-bit grey is scaled to 8 bits.

    Args:
        file: Path, or the open bytes.
        name: What errors call it; None: its path.

    Raises:
        DataError: The file is missing or not a picture.
    """
    shown = name or file
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(
            f"the picture '{shown}' does not exist. Give the path of a file."
        ) from error
    except _DAMAGED as error:
        raise DataError(
            f"'{shown}' cannot be read as a picture: {error}. Any format that Pillow decodes is "
            "accepted (PNG, JPEG, WebP, ...); check the file."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture in RGB, transparency composited onto white.

    As transformers does it, but for 16-bit grey: `convert("RGB")` would clip it at 255, which
    leaves a white picture; it is scaled instead.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values = values // 257
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def squared(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return a picture in the middle of a square in one colour.

    Args:
        image: In RGB.
        background: Red, green, blue.

    Raises:
        DataError: The picture is so elongated that the square would take gigabytes.
    """
    edge = max(image.size)
    if edge * edge > _MOST_SQUARE_PIXELS:
        raise DataError(
            f"a picture of {image.width} x {image.height} would be padded to {edge} x {edge} "
            f"pixels; up to {_MOST_SQUARE_PIXELS:,} pixels are accepted. Crop the picture."
        )
    square = Image.new("RGB", (edge, edge), background)
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square
