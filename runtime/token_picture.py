"""A picture of the image tokens that reach the decoder: bright kept ones, dark dropped ones."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from bivlm_edge.bundle import ImageSpec, Manifest
from bivlm_edge.errors import RequestError
from bivlm_edge.runtime.preprocess import Picture

_LEAST_SIDE = 512  # of a drawn image, in pixels
_MARGIN = 16
_FONT_SIZE = 20
_BACKGROUND = (255, 255, 255)
_INK = (0, 0, 0)
_FRAME = (255, 170, 0)
_DIMMED = (48, 48, 56)
_DIM_SHARE = 0.8


def token_picture(
    manifest: Manifest, picture: Picture, prompt_ids: NDArray[np.int64], kept: NDArray[np.int64]
) -> bytes:
    """Return a PNG of a picture as the model sees it, its tokens kept or dropped.

    Args:
        manifest: Of the model.
        picture: What the model was given.
        prompt_ids: int64 `[tokens]` of the prompt.
        kept: int64 `[kept]`, indices into it that pruning kept.

    Raises:
        RequestError: The tokens of an image form no square, and the model names no other grid.
    """
    rows, columns = token_grid(manifest)
    places = np.flatnonzero(prompt_ids == manifest.image_token_id)
    is_kept = np.isin(places, kept).reshape(len(picture.pixels), manifest.image_tokens)
    panels = [
        _panel(_visible(pixels, manifest.image), flags[: rows * columns].reshape(rows, columns))
        for pixels, flags in zip(picture.pixels, is_kept, strict=True)
    ]
    title = f"{is_kept.sum():,} of {is_kept.size:,} image tokens kept ({is_kept.mean():.1%})"
    if manifest.image_tokens > rows * columns:
        of_lines = is_kept[:, rows * columns :]
        title += f"; {of_lines.sum()} of {of_lines.size} line ends"
    return _png(panels, title)


def token_grid(manifest: Manifest) -> tuple[int, int]:
    """Return rows and columns of an image's tokens; a token behind the grid ends its last line.

    Raises:
        RequestError: There is no such grid.
    """
    if manifest.image_grid is not None:
        return manifest.image_grid
    side = math.isqrt(manifest.image_tokens)
    if manifest.image_tokens - side * side > 1:
        raise RequestError(
            f"the {manifest.image_tokens} tokens of an image of '{manifest.name}' form no square, "
            "and its manifest names no other grid: they cannot be shown on the picture."
        )
    return side, side


def _visible(pixels: NDArray[np.float32], spec: ImageSpec) -> NDArray[np.uint8]:
    """Undo normalisation and rescaling: uint8 `[H, W, 3]`."""
    values = pixels.transpose(1, 2, 0).astype(np.float64)
    if spec.mean:
        values = values * np.array(spec.std) + np.array(spec.mean)
    if spec.rescale is not None:
        values = values / spec.rescale
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _panel(pixels: NDArray[np.uint8], is_kept: NDArray[np.bool_]) -> Image.Image:
    """The enlarged image with a frame round every kept token and the others darkened."""
    scale = max(1, math.ceil(_LEAST_SIDE / min(pixels.shape[:2])))
    cell_height = pixels.shape[0] // is_kept.shape[0] * scale
    cell_width = pixels.shape[1] // is_kept.shape[1] * scale
    image = Image.fromarray(pixels).resize(
        (pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST
    )
    dark = Image.blend(image, Image.new("RGB", image.size, _DIMMED), _DIM_SHARE)
    draw = ImageDraw.Draw(dark)
    for row, column in np.argwhere(is_kept).tolist():
        left, top = column * cell_width, row * cell_height
        right, bottom = left + cell_width, top + cell_height
        dark.paste(image.crop((left, top, right, bottom)), (left, top))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_FRAME, width=2)
    return dark


def _png(panels: list[Image.Image], title: str) -> bytes:
    """The panels side by side under a title."""
    font = ImageFont.load_default(_FONT_SIZE)
    lines = (title, "bright, framed: reaches the decoder; dark: dropped")
    head = _MARGIN + len(lines) * (_FONT_SIZE + 6)
    text_width = max(math.ceil(font.getlength(line)) for line in lines)
    width = max(text_width, sum(panel.width + _MARGIN for panel in panels) - _MARGIN) + 2 * _MARGIN
    height = head + max(panel.height for panel in panels) + _MARGIN
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN // 2 + number * (_FONT_SIZE + 4)), line, fill=_INK, font=font)
    left = _MARGIN
    for panel in panels:
        sheet.paste(panel, (left, head))
        left += panel.width + _MARGIN
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    return stream.getvalue()
