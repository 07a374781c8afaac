"""Pictures against transformers' Pillow processors, and pictures that are none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.bundle import ImageSpec
from bivlm_edge.errors import BundleError, DataError
from bivlm_edge.runtime import preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = ImageSpec("clip", "shortest_edge", (32, 32), 3, (32, 32), 1 / 255, MEAN, STD)
ONEVISION = ImageSpec("square", "exact", (32, 32), 3, None, 1 / 255, MEAN, STD, (122, 116, 104))
IDEFICS = ImageSpec(
    "idefics3", "longest_edge", (64, 64), 1, (32, 32), 1 / 255, (0.5,) * 3, (0.5,) * 3
)
SIZES = [(1, 1), (32, 32), (31, 33), (64, 48), (48, 65), (3, 200), (200, 3), (640, 481)]
# One rounding of the normalised value (at most about 2.7) to float32, on each side.
FLOAT_BOUND = 1e-6


def _image(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    width, height = size
    rng = np.random.default_rng(width * 1000 + height)
    if mode == "P":
        return _image(size).convert("P")
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert(
            "1"
        )
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def _wanted(processor: Any, image: Image.Image) -> Any:
    return processor(images=image, return_tensors="np")


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "HSV"])
@pytest.mark.parametrize("size", SIZES)
def test_clip_is_that_of_transformers(size: tuple[int, int], mode: str) -> None:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    image = _image(size, mode)
    found = preprocess(image, CLIP).pixels
    wanted = _wanted(processor, image)["pixel_values"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT_BOUND)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("size", SIZES)
def test_llava_onevision_is_that_of_transformers_for_several_pictures(
    size: tuple[int, int], mode: str
) -> None:
    module = pytest.importorskip(
        "transformers.models.llava_onevision.image_processing_pil_llava_onevision"
    )
    processor = module.LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    )
    image = _image(size, mode)
    found = preprocess(image, ONEVISION).pixels
    wanted = _wanted(processor, [[image, image]])["pixel_values"][0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT_BOUND)


def test_a_square_needs_a_background_and_a_picture_that_is_no_thread() -> None:
    with pytest.raises(BundleError, match="names no background"):
        preprocess(_image((4, 4)), replace(ONEVISION, background=None))
    with pytest.raises(DataError, match="would be padded to 20000 x 20000"):
        preprocess(Image.new("RGB", (20_000, 1)), ONEVISION)


@pytest.mark.parametrize("size", SIZES)
def test_resampled_bytes_are_equal(size: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(
        size={"height": 20, "width": 24},
        crop_size={"height": 27, "width": 17},
        do_rescale=False,
        do_normalize=False,
    )
    image = _image(size)
    raw = replace(CLIP, resize_mode="exact", resize=(20, 24), crop=(27, 17), rescale=None)
    raw = replace(raw, mean=(), std=())
    np.testing.assert_array_equal(
        preprocess(image, raw).pixels, _wanted(processor, image)["pixel_values"]
    )


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("edge", [64, 96, 32, 80])
@pytest.mark.parametrize("size", [*SIZES, (100, 40), (40, 100)])
def test_idefics3_is_that_of_transformers(size: tuple[int, int], edge: int, split: bool) -> None:
    module = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    processor = module.Idefics3ImageProcessorPil(
        size={"longest_edge": edge},
        max_image_size={"longest_edge": 32},
        do_image_splitting=split,
        return_row_col_info=True,
    )
    image = _image(size)
    found = preprocess(image, replace(IDEFICS, resize=(edge, edge), split_tiles=split))
    wanted = _wanted(processor, image)
    np.testing.assert_allclose(found.pixels, wanted["pixel_values"][0], rtol=0, atol=FLOAT_BOUND)
    assert (found.rows, found.columns) == (wanted["rows"][0][0], wanted["cols"][0][0])


def test_endless_strip_is_refused_with_the_numbers() -> None:
    strip = Image.new("RGB", (1_000_000, 1))
    with pytest.raises(DataError, match=r"1000000 x 1 would be resized to 32000000 x 32"):
        preprocess(strip, CLIP)


@pytest.mark.parametrize(
    "spec",
    [
        replace(CLIP, family="qwen"),
        replace(CLIP, resize_mode="longest_edge"),
        replace(IDEFICS, resize_mode="exact"),
        replace(IDEFICS, crop=None),
    ],
)
def test_unknown_processor_is_refused(spec: ImageSpec) -> None:
    with pytest.raises(BundleError, match="newer bivlm-edge"):
        preprocess(_image((4, 4)), spec)
