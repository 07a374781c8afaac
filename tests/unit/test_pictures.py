"""Files that are pictures in every way, and files that are none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.errors import DataError
from bivlm_edge.pictures import open_picture


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.asarray(open_picture(tmp_path / "deep.png"))
    np.testing.assert_array_equal(found[..., 0], values // 257)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "glass.png")
    assert open_picture(tmp_path / "glass.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.png' does not exist"):
        open_picture(tmp_path / "nope.png")


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x89PNG\r\n\x1a\n broken"])
def test_file_that_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.png' cannot be read as a picture"):
        open_picture(path)


def test_truncated_picture_and_folder_are_named(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    for bad in (path, tmp_path):
        with pytest.raises(DataError, match="cannot be read as a picture"):
            open_picture(bad)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_beyond_the_limit_of_pillow_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"huge\.png' cannot be read as a picture: .*exceeds limit"):
        open_picture(tmp_path / "huge.png")


def test_png_with_a_false_chunk_length_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "odd.png"
    Image.fromarray(noise).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") - 2] = 0  # of the four bytes of the length
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a picture: broken PNG file"):
        open_picture(path)


def test_damaged_exif_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 300
    path = tmp_path / "odd.jpg"
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    content = path.read_bytes()
    width = content.index(b"\x01\x00", content.index(b"Exif") + 12)
    path.write_bytes(content[: width + 3] + b"\x02" + content[width + 4 :])  # now a text
    with pytest.raises(DataError, match=r"odd\.jpg' cannot be read as a picture"):
        open_picture(path)


def test_bytes_are_called_by_the_given_name() -> None:
    with pytest.raises(DataError, match=r"'a\.zip!b\.png' cannot be read as a picture"):
        open_picture(io.BytesIO(b"text"), "a.zip!b.png")
