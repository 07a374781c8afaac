"""easy-VQA as a task: labels implied by questions, augmentation, pictures drawn like its own."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from bivlm_edge.datasets import COLORS, SHAPES, VqaItem, load_easy_vqa
from bivlm_edge.reference.architecture import Design
from bivlm_edge.reference.task import UNKNOWN, Example, Pixels, Stage

DESIGN = Design(
    image_size=64,
    patch_size=8,
    vision_width=192,
    vision_layers=4,
    text_width=256,
    text_mlp_width=704,
    text_layers=4,
)
STAGES = (
    Stage("vision", steps=800, images=64, drawn=32, rate=1e-3, vision_rate=1e-3, noise=0.0),
    Stage("decoder", steps=700, images=28, drawn=16, rate=1e-3, vision_rate=0.0, noise=0.05),
    Stage("joint", steps=450, images=28, drawn=14, rate=4e-4, vision_rate=1e-4, noise=0.2),
)
VALIDATION_IMAGES = 500
QUESTIONS_PER_IMAGE = 10
MAX_SHIFT = 24
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


class EasyVqaTask:
    """easy-VQA with pictures drawn like its own; held-out train pictures are for validation.

    Args:
        seed: Chooses the held-out pictures.
    """

    name = "easy-vqa"
    design = DESIGN
    stages: Sequence[Stage] = STAGES
    classifiers: Mapping[str, int] = {"color": len(COLORS), "shape": len(SHAPES)}
    words: Mapping[str, Mapping[str, int]] = {}

    def __init__(self, seed: int) -> None:
        self._items = load_easy_vqa("train")
        examples = group_examples(self._items)
        order = np.random.default_rng(seed).permutation(len(examples))
        self._held_out = [examples[i] for i in order[:VALIDATION_IMAGES]]
        self._training = [examples[i] for i in order[VALIDATION_IMAGES:]]
        self._wordings = sorted({q for example in self._training for q, _ in example.questions})

    def texts(self) -> Iterable[str]:
        """Questions and answers of the train split."""
        return (text for item in self._items for text in (item.question, item.answer))

    def batch(self, stage: Stage, rng: np.random.Generator) -> list[Example]:
        """Augmented pictures of the train split and freshly drawn ones."""
        return sample_batch(self._training, self._wordings, stage, rng)

    def validation(self) -> list[Example]:
        """The held-out pictures of the train split."""
        return self._held_out

    def test(self) -> list[Example]:
        """The test split."""
        return group_examples(load_easy_vqa("test"))


def sample_batch(
    examples: Sequence[Example], wordings: Sequence[str], stage: Stage, rng: np.random.Generator
) -> list[Example]:
    """Augmented training pictures and freshly drawn ones with their questions."""
    batch = []
    for index in rng.choice(len(examples), stage.images - stage.drawn, replace=False):
        example = examples[index]
        pixels = augment(example.pixels, rng, MAX_SHIFT)
        asked = rng.permutation(len(example.questions))[:QUESTIONS_PER_IMAGE]
        questions = tuple(example.questions[i] for i in asked)
        batch.append(Example(pixels, example.labels, questions, ()))
    for _ in range(stage.drawn):
        color, shape = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
        questions = sample_questions(rng, wordings, color, shape, QUESTIONS_PER_IMAGE)
        batch.append(
            Example(draw_picture(rng, color, shape), np.array([[color, shape]]), questions, ())
        )
    return batch


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


def group_examples(items: Sequence[VqaItem]) -> list[Example]:
    """One example per picture, in order of first appearance, with all questions on it."""
    groups: dict[object, list[VqaItem]] = defaultdict(list)
    for item in items:
        groups[item.image].append(item)
    examples = []
    for members in groups.values():
        questions = tuple((item.question, item.answer) for item in members)
        pixels = np.asarray(members[0].image.open(), dtype=np.uint8)
        kinds = tuple(item.kind for item in members)
        labels = np.array([implied_labels(questions)])
        examples.append(Example(pixels, labels, questions, kinds))
    return examples


def draw_picture(rng: np.random.Generator, color: int, shape: int) -> Pixels:
    """A picture of one shape on a plain light background, at a random place and size."""
    canvas = DESIGN.image_size * _DRAW_SCALE
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
    small = image.resize((DESIGN.image_size, DESIGN.image_size), Image.Resampling.BICUBIC)
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
    side = len(pixels)
    y = rng.integers(max(0, top - max_shift), min(side - (bottom - top), top + max_shift) + 1)
    x = rng.integers(max(0, left - max_shift), min(side - (right - left), left + max_shift) + 1)
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
