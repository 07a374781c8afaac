"""A picture becomes pixel_values, number for number as transformers' Pillow processors do it.

Every step rounds where they round: resizing works on 8-bit values, rescaling in float64, and
normalisation in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bivlm_edge.bundle import ImageSpec
from bivlm_edge.errors import BundleError, DataError
from bivlm_edge.pictures import squared, to_rgb

# Idefics3ImageProcessor: no side grows beyond this, whatever the configuration says.
_IDEFICS3_LONGEST_EDGE = 4096
_MOST_RESIZED_PIXELS = 200_000_000

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Picture:
    """A preprocessed picture.

    Attributes:
        pixels: float32 `[images, 3, H, W]`: one image, or the tiles row by row and then the
            whole picture.
        rows: Rows of tiles; 0 if the picture was not split.
        columns: Columns of tiles; 0 if the picture was not split.
    """

    pixels: NDArray[np.float32]
    rows: int = 0
    columns: int = 0


def preprocess(image: Image.Image, spec: ImageSpec) -> Picture:
    """Return a picture as the model takes it.

    Raises:
        DataError: The picture is so elongated that resizing it would take gigabytes.
        BundleError: The manifest names a processor that this build does not know.
    """
    image = to_rgb(image)
    if spec.family == "square":
        image = squared(image, _background(spec))
    if spec.family in ("clip", "square"):
        return Picture(_normalized(_clip(image, spec), spec)[np.newaxis])
    if spec.family == "idefics3":
        return _idefics3(image, spec)
    raise BundleError(
        f"the manifest asks for image preprocessing '{spec.family}'; this build knows clip, square "
        "and idefics3. Install a newer bivlm-edge."
    )


def _clip(image: Image.Image, spec: ImageSpec) -> Pixels:
    """Resize and crop: uint8 `[H, W, 3]`."""
    height, width = spec.resize
    if spec.resize_mode == "shortest_edge":
        height, width = _shortest_edge(image.height, image.width, spec.resize[0])
    elif spec.resize_mode != "exact":
        raise _unknown_mode(spec)
    pixels = np.asarray(_resized(image, height, width, spec.resample))
    return pixels if spec.crop is None else _center_crop(pixels, *spec.crop)


def _background(spec: ImageSpec) -> tuple[int, int, int]:
    if spec.background is None:
        raise BundleError(
            "the manifest names no background for image preprocessing 'square'. Export the model "
            "again."
        )
    return spec.background


def _idefics3(image: Image.Image, spec: ImageSpec) -> Picture:
    """Resize the longest edge, then cut into tiles and append the whole, or shrink to one tile."""
    if spec.resize_mode != "longest_edge" or spec.crop is None:
        raise _unknown_mode(spec)
    tile = spec.crop[0]
    height, width = _longest_edge(image.height, image.width, spec.resize[0])
    image = _resized(image, height, width, spec.resample)
    if not spec.split_tiles:
        whole = _resized(image, tile, tile, spec.resample)
        return Picture(_normalized(np.asarray(whole), spec)[np.newaxis])
    height, width = _tiled_size(height, width, tile)
    image = _resized(image, height, width, spec.resample)
    if height <= tile and width <= tile:
        return Picture(_normalized(np.asarray(image), spec)[np.newaxis])
    rows, columns = height // tile, width // tile
    tiles = [
        image.crop((column * tile, row * tile, (column + 1) * tile, (row + 1) * tile))
        for row in range(rows)
        for column in range(columns)
    ]
    tiles.append(_resized(image, tile, tile, spec.resample))
    normalized = [_normalized(np.asarray(piece), spec) for piece in tiles]
    return Picture(np.stack(normalized), rows, columns)


def _unknown_mode(spec: ImageSpec) -> BundleError:
    return BundleError(
        f"the manifest asks for resize mode '{spec.resize_mode}' with crop {spec.crop} in family "
        f"'{spec.family}', which this build does not know. Install a newer bivlm-edge."
    )


def _shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _longest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """Scale the longer side to `edge`, the other one to an even number, none above 4096."""
    aspect = width / height
    if width >= height:
        width = edge
        height = int(width / aspect)
        height += height % 2
    else:
        height = edge
        width = int(height * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    limit = _IDEFICS3_LONGEST_EDGE
    if width >= height and width > limit:
        width, height = limit, int(limit / aspect)
    elif height > width and height > limit:
        height, width = limit, int(limit * aspect)
    return max(height, 1), max(width, 1)


def _tiled_size(height: int, width: int, tile: int) -> tuple[int, int]:
    """Round both sides up to multiples of a tile, the shorter one after keeping the aspect."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return height, width


def _resized(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    if height * width > _MOST_RESIZED_PIXELS:
        raise DataError(
            f"a picture of {image.width} x {image.height} would be resized to {width} x {height} "
            f"pixels; up to {_MOST_RESIZED_PIXELS:,} pixels are accepted. Crop the picture."
        )
    return image.resize((width, height), resample=Image.Resampling(resample))


def _center_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """Cut `[height, width]` out of the middle; where the picture is smaller, pad with zeros."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    padding = [(max(0, -top), max(0, -top)), (max(0, -left), max(0, -left)), (0, 0)]
    pixels = np.pad(pixels, padding)
    top, left = max(0, top), max(0, left)
    return pixels[top : top + height, left : left + width]


def _normalized(pixels: Pixels, spec: ImageSpec) -> NDArray[np.float32]:
    """Return uint8 `[H, W, 3]` as float32 `[3, H, W]`, rescaled and normalised."""
    values: NDArray[np.float32] = pixels.astype(np.float32)
    if spec.rescale is not None:
        values = (pixels.astype(np.float64) * spec.rescale).astype(np.float32)
    if spec.mean:
        mean = np.array(spec.mean, dtype=np.float32)
        std = np.array(spec.std, dtype=np.float32)
        values = ((values - mean) / std).astype(np.float32, copy=False)
    return np.ascontiguousarray(values.transpose(2, 0, 1))
