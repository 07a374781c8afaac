"""Question-answering data on images: easy-VQA, drawn scenes, and users' own JSON lines.

Imports neither torch nor transformers: the same loaders run on a device.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bivlm_edge import scenes
from bivlm_edge.errors import DataError
from bivlm_edge.package_files import PackageFile, archive, fetched, read_member
from bivlm_edge.pictures import open_picture

EASY_VQA_VARIABLE = "BIVLM_EASY_VQA"
EASY_VQA = PackageFile(
    title="easy-VQA",
    requirement="easy-vqa==1.0",
    wheel="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    variable=EASY_VQA_VARIABLE,
)
_WHEEL_DATA = "easy_vqa/data"

CALIBRATION_SPLIT = "train"
VALIDATION_SPLIT = "validation"
EASY_VQA_SPLITS = (CALIBRATION_SPLIT, VALIDATION_SPLIT, "test")
# The pictures of easy-VQA's train split that the bundled model was not trained on: the first of a
# permutation with the seed of its training (reference/easy_vqa.py).
_HELD_OUT_SEED, _HELD_OUT_PICTURES = 7, 500

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
OPEN_ENDED_KINDS = frozenset({"color", "shape", "count", "mark", "nearest", "largest"})


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the bytes of one image lie: a file, or a member of a zip archive.

    Attributes:
        path: The image file, or the archive.
        member: Name inside the archive; None if `path` is the image itself.
    """

    path: Path
    member: str | None = None

    def open(self) -> Image.Image:
        """Return the decoded image in RGB, as `bivlm-run` would see it.

        Raises:
            DataError: the bytes are missing or no image.
        """
        if self.member is None:
            return open_picture(self.path)
        return open_picture(io.BytesIO(read_member(self.path, self.member)), str(self))

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}!{self.member}"


@dataclass(frozen=True, slots=True)
class DrawnScene:
    """A picture of `scenes`, drawn when it is opened.

    Attributes:
        split: Name of the split.
        index: Number of the picture in the split.
    """

    split: str
    index: int

    def open(self) -> Image.Image:
        """Return the picture in RGB, 128 pixels square."""
        return Image.fromarray(scenes.draw(scenes.describe(self.split, self.index)))

    def __str__(self) -> str:
        return f"scenes/{self.split}/{self.index}"


PictureSource = ImageSource | DrawnScene


@dataclass(frozen=True, slots=True)
class VqaItem:
    """One question on one image, with its answer.

    Attributes:
        image: Where the image comes from; several items share one source.
        question: As a user would type it.
        answer: The expected answer.
        kind: "yes_no", "color", "shape" or "other"; of scenes, one of `scenes.KINDS`. The
            open-ended ones are in OPEN_ENDED_KINDS.
    """

    image: PictureSource
    question: str
    answer: str
    kind: str

    @property
    def is_open_ended(self) -> bool:
        """Whether the answer is one of many words, and guessing it is hard."""
        return self.kind in OPEN_ENDED_KINDS


def question_kind(answer: str) -> str:
    """The kind of a question, told from its answer: "yes_no", "color", "shape" or "other"."""
    if answer in ("yes", "no"):
        return "yes_no"
    if answer in COLORS:
        return "color"
    return "shape" if answer in SHAPES else "other"


def load_easy_vqa(split: str) -> list[VqaItem]:
    """The questions of one split of easy-VQA, in the order of its questions.json.

    "validation" is a part of "train": the questions on the 500 pictures that the bundled reference
    model was not trained on.

    Read from where BIVLM_EASY_VQA points (an unzipped `easy_vqa/data` folder or the wheel), else
    from the wheel in the cache, else fetched from the package index into the cache. The wheel is
    never installed, as it carries a top-level package named `test`.

    Raises:
        DataError: the split is unknown, or the data are missing, damaged or cannot be fetched.
    """
    if split not in EASY_VQA_SPLITS:
        accepted = ", ".join(map(repr, EASY_VQA_SPLITS))
        raise DataError(f"easy-VQA has no split '{split}'. Use one of {accepted}.")
    if split == VALIDATION_SPLIT:
        return _held_out(load_easy_vqa(CALIBRATION_SPLIT))
    location = _locate_easy_vqa()
    if location.is_dir():
        origin = location / split / "questions.json"
        text = _read_text(origin)
        prefix = None
    else:
        prefix = f"{_WHEEL_DATA}/{split}"
        origin = location / f"{prefix}/questions.json"
        try:
            text = archive(location).read(f"{prefix}/questions.json").decode("utf-8")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{location} is not the easy-VQA wheel: {error}. Set {EASY_VQA_VARIABLE} to "
                f"{EASY_VQA.wheel} or to its unzipped easy_vqa/data folder."
            ) from error
    try:
        rows = json.loads(text)
        items = []
        for question, answer, index in rows:
            name = f"images/{int(index)}.png"
            source = (
                ImageSource(location / split / name)
                if prefix is None
                else ImageSource(location, f"{prefix}/{name}")
            )
            items.append(VqaItem(source, str(question), str(answer), question_kind(answer)))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{origin} is not a list of [question, answer, image number]: {error}. "
            f"Get {EASY_VQA.requirement} anew."
        ) from error
    return items


def _held_out(train: list[VqaItem]) -> list[VqaItem]:
    """The questions on the pictures that the bundled model was not trained on."""
    pictures = list(dict.fromkeys(item.image for item in train))
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(pictures))
    chosen = {pictures[index] for index in order[:_HELD_OUT_PICTURES]}
    return [item for item in train if item.image in chosen]


def load_scenes(split: str) -> list[VqaItem]:
    """The questions of one split of `scenes`: up to ten kinds on each of its pictures.

    The train split is drawn from without end in training; here are its first pictures.

    Raises:
        DataError: the split is unknown.
    """
    if split not in scenes.PICTURES:
        raise DataError(
            f"scenes has no split '{split}'. Use {' or '.join(map(repr, scenes.PICTURES))}."
        )
    return [
        VqaItem(DrawnScene(split, index), question, answer, kind)
        for index in range(scenes.PICTURES[split])
        for kind, question, answer in scenes.questions(scenes.describe(split, index))
    ]


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set that has a name.

    Attributes:
        splits: Names of its splits; CALIBRATION_SPLIT, VALIDATION_SPLIT and "test" are among them.
        load: The questions of a split.
    """

    splits: tuple[str, ...]
    load: Callable[[str], list[VqaItem]]


EASY_VQA_NAME = "easy-vqa"
DATA_SETS = {
    EASY_VQA_NAME: DataSet(EASY_VQA_SPLITS, load_easy_vqa),
    "scenes": DataSet(tuple(scenes.PICTURES), load_scenes),
}
TRAINING_DATA = "training_data"  # key of config.json under which a checkpoint names one of them


def calibrating_data(data: str) -> str:
    """The name of the data set whose train split calibrates for questions of `data`."""
    return data if data in DATA_SETS else EASY_VQA_NAME


def load_questions(data: str, split: str = "test") -> list[VqaItem]:
    """The questions of a split of a data set of DATA_SETS, or of a JSON lines file.

    Raises:
        DataError: as the loaders do.
    """
    known = DATA_SETS.get(data)
    return load_jsonl(data) if known is None else known.load(split)


def load_jsonl(path: Path | str) -> list[VqaItem]:
    """The questions of a file with one `{"image", "question", "answer"}` object per line.

    Image paths are relative to the file's folder. Empty lines are skipped.

    Raises:
        DataError: the file is missing or empty, or a line is wrong; names file and line.
    """
    path = Path(path)
    items = [
        _parse_line(line, path, number)
        for number, line in enumerate(_read_text(path).splitlines(), start=1)
        if line.strip()
    ]
    if not items:
        raise DataError(
            f"{path} holds no questions. Write one JSON object per line: "
            '{"image": "cat.png", "question": "what is this?", "answer": "cat"}'
        )
    return items


class _Fields(NamedTuple):
    image: str
    question: str
    answer: str


def _parse_line(line: str, path: Path, number: int) -> VqaItem:
    """One line of `path` as an item; `number` counts from 1."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path}:{number} is not JSON: {error}. Write one object per line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number} is {type(record).__name__}, expected a JSON object.")
    for name in _Fields._fields:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{path}:{number} has {name!r} = {value!r}, expected a text that is not empty. "
                f"Each line needs {', '.join(map(repr, _Fields._fields))}."
            )
    fields = _Fields(**{name: record[name] for name in _Fields._fields})
    image = path.parent / fields.image
    if not image.is_file():
        raise DataError(
            f"{path}:{number} names the image '{fields.image}', but {image} does not exist. "
            "Image paths are relative to the folder of the JSON lines file."
        )
    return VqaItem(ImageSource(image), fields.question, fields.answer, question_kind(fields.answer))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Give an existing UTF-8 text file."
        ) from error


def _locate_easy_vqa() -> Path:
    """The data folder or the wheel; fetches the wheel if there is neither."""
    given = os.environ.get(EASY_VQA_VARIABLE)
    if given:
        location = Path(given).expanduser()
        if not location.exists():
            raise DataError(
                f"{EASY_VQA_VARIABLE}={given} does not exist. Set it to {EASY_VQA.wheel} or to its "
                "unzipped easy_vqa/data folder, or unset it to fetch the wheel."
            )
        return location
    return fetched(EASY_VQA)
