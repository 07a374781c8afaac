"""The data set "scenes" as a task: fresh pictures without end, each token labelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bivlm_edge import scenes
from bivlm_edge.reference.architecture import Design
from bivlm_edge.reference.task import UNKNOWN, Example, Labels, Stage

DESIGN = Design(
    image_size=scenes.IMAGE_SIZE,
    patch_size=8,
    vision_width=128,
    vision_layers=4,
    text_width=256,
    text_mlp_width=704,
    text_layers=5,
)
_LOOKUPS = ("color", "shape", "mark", "exists", "count")
_DECODER = Stage(
    "decoder", steps=500, images=12, drawn=12, rate=1e-3, vision_rate=0.0, noise=0.0, pointing=0.2
)
STAGES = (
    Stage("vision", steps=2400, images=16, drawn=16, rate=1.5e-3, vision_rate=1.5e-3, noise=0.0),
    Stage("words", steps=150, images=16, drawn=16, rate=2e-3, vision_rate=0.0, noise=0.0),
    replace(_DECODER, name="lookups", steps=400, kinds=_LOOKUPS),
    _DECODER,
    Stage("joint", steps=400, images=12, drawn=12, rate=4e-4, vision_rate=1e-4, noise=0.2),
)
QUESTIONS_PER_KIND = 2  # tries per picture in training; in the splits, once
TOKENIZER_PICTURES = 1000
_TRAIN_PICTURES = 2**40
_OWNED_PIXELS = 12  # of a patch's 64 that a thing covers for the patch to be its own


class ScenesTask:
    """Pictures of the train split, drawn as they are needed."""

    name = "scenes"
    design = DESIGN
    stages: Sequence[Stage] = STAGES
    # Class 0 of each is the background's. Every patch of a thing tells where its center is;
    # "center" is 1 in the patch that holds it.
    classifiers: Mapping[str, int] = {
        "color": len(scenes.COLORS) + 1,
        "shape": len(scenes.SHAPES) + 1,
        "mark": len(scenes.MARKS) + 1,
        "radius": len(scenes.RADII) + 1,
        "column": DESIGN.image_size // DESIGN.patch_size + 1,
        "row": DESIGN.image_size // DESIGN.patch_size + 1,
        "center": 2,
    }

    words: Mapping[str, Mapping[str, int]] = {
        "color": {word: 1 + number for number, word in enumerate(scenes.COLORS)},
        "shape": {
            form: 1 + number
            for number, word in enumerate(scenes.SHAPES)
            for form in (word, scenes.plural(word))
        },
        "mark": {word: 1 + number for number, word in enumerate(scenes.MARKS)},
    }

    def __init__(self, _seed: int) -> None:
        """The splits are fixed: no seed chooses between them."""

    def texts(self) -> Iterable[str]:
        """Questions and answers of the first pictures of the train split: all words there are."""
        for index in range(TOKENIZER_PICTURES):
            for _, question, answer in scenes.questions(scenes.describe("train", index)):
                yield question
                yield answer

    def batch(self, stage: Stage, rng: np.random.Generator) -> list[Example]:
        """Pictures that training has not seen before."""
        return [
            example("train", int(index), QUESTIONS_PER_KIND, stage.kinds)
            for index in rng.integers(_TRAIN_PICTURES, size=stage.images)
        ]

    def validation(self) -> list[Example]:
        """The validation split."""
        return [example("validation", index) for index in range(scenes.PICTURES["validation"])]

    def test(self) -> list[Example]:
        """The test split."""
        return [example("test", index) for index in range(scenes.PICTURES["test"])]


def example(split: str, index: int, times: int = 1, kinds: Sequence[str] = ()) -> Example:
    """A picture of a split with its questions of some kinds or all, each kind tried so often."""
    scene = scenes.describe(split, index)
    asked = [ask for ask in scenes.questions(scene, times) if not kinds or ask[0] in kinds]
    return Example(
        pixels=scenes.draw(scene),
        labels=token_labels(scene),
        questions=tuple((question, answer) for _, question, answer in asked),
        kinds=tuple(kind for kind, _, _ in asked),
    )


def token_labels(scene: scenes.Scene) -> Labels:
    """What each patch shows, ``(256, 7)``: a class for each of the task's classifiers.

    A patch that a thing covers in part, but hardly, is UNKNOWN.
    """
    patch = DESIGN.patch_size
    side = DESIGN.image_size // patch
    tiles = scenes.owners(scene).reshape(side, patch, side, patch).swapaxes(1, 2)
    pixels = tiles.reshape(side * side, patch * patch)
    covered = (pixels[:, :, None] == np.arange(len(scene.things))).sum(axis=1)
    owner, most = covered.argmax(axis=1), covered.max(axis=1)
    classes = np.array(
        [
            [
                1 + scenes.COLORS.index(thing.color),
                1 + scenes.SHAPES.index(thing.shape),
                1 + scenes.MARKS.index(thing.mark),
                1 + scenes.RADII.index(thing.radius),
                1 + thing.x // patch,
                1 + thing.y // patch,
                0,
            ]
            for thing in scene.things
        ]
    )
    labels = np.where((most >= _OWNED_PIXELS)[:, None], classes[owner], 0)
    labels[(most > 0) & (most < _OWNED_PIXELS)] = UNKNOWN
    for thing in scene.things:
        labels[thing.y // patch * side + thing.x // patch, -1] = 1
    return labels
