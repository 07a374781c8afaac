"""Calibration batches from question-answer items or a folder of a user's images."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bivlm_edge.calibration.calls import IGNORED, LABELS
from bivlm_edge.datasets import (
    CALIBRATION_SPLIT,
    DATA_SETS,
    EASY_VQA_NAME,
    ImageSource,
    VqaItem,
    load_jsonl,
)
from bivlm_edge.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
DEFAULT_QUESTION = "Describe this image."
PROMPTS_FILE = "prompts.txt"
_BATCH_SIZE = 16

Prepare = Callable[[Any, str, str | None], dict[str, Tensor]]


def make_batches(
    prepare: Prepare,
    items: Sequence[VqaItem],
    samples: int,
    seed: int = 0,
    batch_size: int = _BATCH_SIZE,
) -> list[dict[str, Tensor]]:
    """Draw samples and stack those of equal length, so that no batch needs padding.

    The answer's tokens follow the prompt. Batches hold the arguments of the model and, if all
    their samples have an answer, `labels`: the answer's tokens, -100 elsewhere.

    Args:
        prepare: `VisionLanguageModel.prepare`: image, question and answer to a batch of one.
        items: What to draw from, without replacement; an empty answer means none is known.
        samples: How many to draw; all, with a log line, if there are fewer.
        seed: The same seed draws the same samples.
        batch_size: Largest number of samples in a batch.
    """
    if not items:
        raise DataError("there are no calibration samples. Give at least one image.")
    if len(items) < samples:
        logger.warning(
            "the calibration data hold %d samples, fewer than the %d asked for; all are used",
            len(items),
            samples,
        )
    by_shape: dict[tuple[object, ...], list[dict[str, Tensor]]] = {}
    for index in drawn_indices(len(items), samples, seed):
        inputs = _prepare_item(prepare, items[index])
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(inputs.items()))
        by_shape.setdefault(shape, []).append(inputs)
    stacked = [
        _stack(group[start : start + batch_size])
        for group in by_shape.values()
        for start in range(0, len(group), batch_size)
    ]
    random.Random(seed).shuffle(stacked)  # lengths mixed, so that held-out batches are typical
    return stacked


def drawn_indices(count: int, samples: int, seed: int) -> list[int]:
    """Which of `count` items `make_batches` draws."""
    return random.Random(seed).sample(range(count), min(samples, count))


def calibration_items(source: Path | str | None) -> list[VqaItem]:
    """The train split of a data set of DATA_SETS, by default easy-VQA, or `items_from_folder`."""
    source = EASY_VQA_NAME if source is None else source
    known = DATA_SETS.get(str(source))
    return items_from_folder(source) if known is None else known.load(CALIBRATION_SPLIT)


def items_from_folder(folder: Path | str) -> list[VqaItem]:
    """Items of a .jsonl file, of a folder with one, or of its images and prompts.txt.

    Without prompts.txt every image is described; with it, image i gets line i modulo the number
    of lines. Images are taken in the order of their names.

    Raises:
        DataError: nothing usable is there.
    """
    folder = Path(folder)
    if folder.suffix == ".jsonl":
        return load_jsonl(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give a folder with images to calibrate on.")
    lists = sorted(folder.glob("*.jsonl"))
    if len(lists) > 1:
        names = ", ".join(path.name for path in lists)
        raise DataError(f"{folder} holds several lists: {names}. Keep one .jsonl file.")
    if lists:
        return load_jsonl(lists[0])
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        accepted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder} holds no images ({accepted}) and no .jsonl file.")
    questions = _questions(folder / PROMPTS_FILE)
    return [
        VqaItem(ImageSource(path), questions[i % len(questions)], "", "other")
        for i, path in enumerate(images)
    ]


def _questions(path: Path) -> list[str]:
    if not path.is_file():
        return [DEFAULT_QUESTION]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Write UTF-8 text.") from error
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise DataError(f"{path} is empty. Write one question per line, or remove the file.")
    return questions


def _prepare_item(prepare: Prepare, item: VqaItem) -> dict[str, Tensor]:
    """Model arguments of one item, with `labels` where the answer is known."""
    image = item.image.open()
    if not item.answer:
        return prepare(image, item.question, None)
    inputs = dict(prepare(image, item.question, item.answer))
    prompt = prepare(image, item.question, None)["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :prompt] = IGNORED
    inputs[LABELS] = labels
    return inputs


def _stack(samples: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    samples = list(samples)
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
