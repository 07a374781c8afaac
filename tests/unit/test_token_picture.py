"""Which tokens a picture shows as kept."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.bundle import ImageSpec, Manifest
from bivlm_edge.errors import RequestError
from bivlm_edge.runtime import Picture
from bivlm_edge.runtime.token_picture import token_grid, token_picture

IMAGE, TEXT = 2, 40
COLORS = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 0]]], dtype=np.uint8)


def _manifest(bundle: Any, **changes: Any) -> Manifest:
    spec = ImageSpec("clip", "exact", (4, 4), 3, None, 1 / 255, (0.5,) * 3, (0.25,) * 3)
    manifest: Manifest = replace(bundle.manifest, image_tokens=4, image=spec, **changes)
    return manifest


def _picture(images: int = 1) -> Picture:
    """Four colours in quarters, normalised as the manifest says."""
    pixels = COLORS.repeat(2, axis=0).repeat(2, axis=1)
    values = ((pixels / 255 - 0.5) / 0.25).astype(np.float32).transpose(2, 0, 1)
    return Picture(np.stack([values] * images))


def _cells(png: bytes, images: int = 1) -> list[list[tuple[int, ...]]]:
    """The colours in the middle of each token, image by image; titles stand above."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    top, side = image.height - 16 - 512, 256
    lefts = [16 + number * (512 + 16) for number in range(images)]
    return [
        [
            image.getpixel((left + column * side + 128, top + row * side + 128))
            for row in range(2)
            for column in range(2)
        ]
        for left in lefts
    ]


def test_kept_tokens_have_their_colour_and_dropped_ones_are_dark(bundle: Any) -> None:
    ids = np.array([3, IMAGE, IMAGE, IMAGE, IMAGE, TEXT])
    png = token_picture(_manifest(bundle), _picture(), ids, np.array([0, 2, 4, 5]))
    (cells,) = _cells(png)
    assert cells[1::2] == [(0, 200, 0), (200, 200, 0)]
    assert all(max(cell) < 90 for cell in cells[::2])


def test_every_image_of_a_picture_has_a_panel_of_its_own(bundle: Any) -> None:
    ids = np.array([3, *[IMAGE] * 4, TEXT, *[IMAGE] * 4])
    png = token_picture(_manifest(bundle), _picture(2), ids, np.array([0, 1, 5, 9]))
    first, second = _cells(png, 2)
    assert [max(cell) == 200 for cell in first] == [True, False, False, False]
    assert [max(cell) == 200 for cell in second] == [False, False, False, True]


def test_a_token_behind_the_grid_is_not_on_the_picture(bundle: Any) -> None:
    ids = np.array([*[IMAGE] * 5, TEXT])
    manifest = replace(_manifest(bundle), image_tokens=5)
    (cells,) = _cells(token_picture(manifest, _picture(), ids, np.array([4, 5])))
    assert all(max(cell) < 90 for cell in cells)


def test_the_grid_of_the_manifest_counts_and_else_a_square(bundle: Any) -> None:
    manifest = _manifest(bundle)
    assert token_grid(manifest) == (2, 2)
    assert token_grid(replace(manifest, image_tokens=730)) == (27, 27)
    assert token_grid(replace(manifest, image_tokens=6, image_grid=(2, 3))) == (2, 3)
    with pytest.raises(RequestError, match="the 6 tokens of an image of 'mock' form no square"):
        token_grid(replace(manifest, image_tokens=6))
