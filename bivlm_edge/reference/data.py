"""Training batches: labels implied by questions, image augmentation, and packing of questions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from bivlm_edge.datasets import COLORS, SHAPES, VqaItem
from bivlm_edge.reference.architecture import ASSISTANT, END, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, USER

UNKNOWN = -100  # what torch's cross entropy skips
RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
_BACKGROUND_MIN = 225
_DRAW_SCALE = 4
_NEGATION = re.compile(r"\b(not|no)\b")
_COLOR_WORD = re.compile(rf"\b({'|'.join(COLORS)})\b")
_SHAPE_WORD = re.compile(rf"\b({'|'.join(SHAPES)})\b")

Pixels = NDArray[np.uint8]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture with what is known about it.

    Attributes:
        pixels: uint8 ``(64, 64, 3)``, RGB.
        color: Index into COLORS, or UNKNOWN.
        shape: Index into SHAPES, or UNKNOWN.
        questions: Pairs of question and answer.
        kinds: The kind of each question.
    """

    pixels: Pixels
    color: int
    shape: int
    questions: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]


def implied_labels(questions: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """The color and the shape that a picture's questions with their answers give away.

    Returns:
        Indices into COLORS and SHAPES; UNKNOWN for what no question tells.
    """
    color = shape = UNKNOWN
    for question, answer in questions:
        open_ended = question.startswith("what")
        if not open_ended and (answer == "yes") == bool(_NEGATION.search(question)):
            continue  # the named color or shape is not in the picture
        words = f"{question} {answer}"
        if found := _COLOR_WORD.search(words):
            color = COLORS.index(found[0])
        if found := _SHAPE_WORD.search(words):
            shape = SHAPES.index(found[0])
    return color, shape


def answer_question(question: str, color: str, shape: str) -> str:
    """The answer to a question in easy-VQA's wording, for a picture of known color and shape."""
    if question.startswith("what"):
        return color if "color" in question else shape
    named = _COLOR_WORD.search(question) or _SHAPE_WORD.search(question)
    present = named is not None and named[0] in (color, shape)
    return "yes" if present != bool(_NEGATION.search(question)) else "no"


def group_scenes(items: Sequence[VqaItem]) -> list[Scene]:
    """One scene per picture, in order of first appearance, with all questions on it."""
    groups: dict[object, list[VqaItem]] = defaultdict(list)
    for item in items:
        groups[item.image].append(item)
    scenes = []
    for members in groups.values():
        questions = tuple((item.question, item.answer) for item in members)
        pixels = np.asarray(members[0].image.open(), dtype=np.uint8)
        kinds = tuple(item.kind for item in members)
        scenes.append(Scene(pixels, *implied_labels(questions), questions, kinds))
    return scenes


def draw_scene(rng: np.random.Generator, color: int, shape: int) -> Pixels:
    """A picture of one shape on a plain light background, at a random place and size."""
    canvas = IMAGE_SIZE * _DRAW_SCALE
    background = tuple(int(v) for v in rng.integers(_BACKGROUND_MIN, 256, 3))
    image = Image.new("RGB", (canvas, canvas), background)
    draw = ImageDraw.Draw(image)
    low, high = canvas // 8, canvas // 2
    width, height = (int(v) for v in rng.integers(low, high + 1, 2))
    if SHAPES[shape] == "circle":
        height = width
    elif SHAPES[shape] == "triangle":
        height = round(width * rng.uniform(0.8, 1.0))
    left, top = int(rng.integers(0, canvas - width + 1)), int(rng.integers(0, canvas - height + 1))
    box = (left, top, left + width, top + height)
    fill = RGB[COLORS[color]]
    if SHAPES[shape] == "circle":
        draw.ellipse(box, fill=fill)
    elif SHAPES[shape] == "rectangle":
        draw.rectangle(box, fill=fill)
    else:
        corners = [(left, top + height), (left + width, top + height), (left + width / 2, top)]
        draw.polygon(corners, fill=fill)
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(small, dtype=np.uint8)


def augment(pixels: Pixels, rng: np.random.Generator, max_shift: int) -> Pixels:
    """The picture mirrored at random, its shape moved by up to `max_shift` but kept inside."""
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colors, counts = np.unique(edge, axis=0, return_counts=True)
    background = colors[counts.argmax()]
    rows, columns = np.nonzero((pixels != background).any(axis=-1))
    if not len(rows):
        return pixels
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    shape = pixels[top:bottom, left:right]
    moved = np.broadcast_to(background, pixels.shape).copy()
    y = rng.integers(max(0, top - max_shift), min(IMAGE_SIZE - (bottom - top), top + max_shift) + 1)
    x = rng.integers(
        max(0, left - max_shift), min(IMAGE_SIZE - (right - left), left + max_shift) + 1
    )
    moved[y : y + bottom - top, x : x + right - left] = shape
    return moved


def sample_questions(
    rng: np.random.Generator, wordings: Sequence[str], color: int, shape: int, count: int
) -> tuple[tuple[str, str], ...]:
    """Questions on a picture of known content, balanced over what they ask and whether it holds.

    In easy-VQA's own questions the named color is in the picture once in eight times; trained on
    those alone, the decoder answered all such questions by their wording for 600 steps.

    Args:
        rng: Source of the choice.
        wordings: Questions to choose from.
        color: Index into COLORS.
        shape: Index into SHAPES.
        count: Questions wanted: an open-ended one in seven; of the others two in three name a
            color, one a shape; each is in the picture half of the times. Kinds that
            no wording has are left out.
    """
    present = {COLORS[color], SHAPES[shape]}
    pools: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for question in wordings:
        named = {*_COLOR_WORD.findall(question), *_SHAPE_WORD.findall(question)}
        subject = "color" if named & set(COLORS) else "shape"
        pools["open" if question.startswith("what") else subject, named <= present].append(question)
    asked = [("open", True), *[("color", True), ("color", False)] * 2]
    asked += [("shape", True), ("shape", False)]
    asked = [key for key in asked if pools[key]]
    chosen = []
    for index in rng.integers(len(asked), size=count):
        pool = pools[asked[index]]
        question = pool[rng.integers(len(pool))]
        chosen.append((question, answer_question(question, COLORS[color], SHAPES[shape])))
    return tuple(chosen)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences with one image prefix each and all questions on that image behind it.

    A question sees the prefix and itself, and counts its positions from the end of the prefix:
    each block has the tokens and positions that it has when asked alone.

    Attributes:
        ids: int64 ``(sequences, length)``, padded at the end.
        positions: int64 ``(sequences, length)``.
        blocks: int64 ``(sequences, length)``: 0 prefix, 1.. questions, -1 padding.
        targets: int64 ``(sequences, length)``: the token that must follow, UNKNOWN where any may.
        question: int64 ``(sequences, length)``: running number of the question within the batch
            where there is a target, else -1.
    """

    ids: Ids
    positions: Ids
    blocks: Ids
    targets: Ids
    question: Ids


class Packer:
    """Turns questions into packed token sequences; remembers the tokens of each text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[tuple[str, str], tuple[list[int], int]] = {}
        self.image_start = len(self._encode(USER))
        self.prefix = self._encode(USER + IMAGE * IMAGE_TOKENS)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def block(self, question: str, answer: str) -> tuple[list[int], int]:
        """The tokens of one question with its answer, and how many of them are the prompt."""
        key = question, answer
        if key not in self._cache:
            prompt = self._encode(question + ASSISTANT)
            self._cache[key] = (prompt + self._encode(answer + END), len(prompt))
        return self._cache[key]

    def pack(self, questions: Sequence[Sequence[tuple[str, str]]]) -> PackedBatch:
        """One sequence per picture, from the questions on each."""
        blocks = [[self.block(*pair) for pair in pairs] for pairs in questions]
        start = len(self.prefix)
        length = start + max(sum(len(ids) for ids, _ in row) for row in blocks)
        shape = (len(blocks), length)
        ids = np.full(shape, self._tokenizer.pad_token_id, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        block = np.full(shape, -1, dtype=np.int64)
        targets = np.full(shape, UNKNOWN, dtype=np.int64)
        question = np.full(shape, -1, dtype=np.int64)
        ids[:, :start] = self.prefix
        positions[:, :start] = np.arange(start)
        block[:, :start] = 0
        number = 0
        for row, members in enumerate(blocks):
            at = start
            for index, (tokens, prompt) in enumerate(members, start=1):
                end = at + len(tokens)
                ids[row, at:end] = tokens
                positions[row, at:end] = np.arange(start, start + len(tokens))
                block[row, at:end] = index
                targets[row, at + prompt - 1 : end - 1] = tokens[prompt:]
                question[row, at + prompt - 1 : end - 1] = number
                number += 1
                at = end
        return PackedBatch(ids, positions, block, targets, question)
