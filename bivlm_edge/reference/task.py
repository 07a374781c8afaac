"""What training a reference model needs to know about a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.reference.architecture import Design

UNKNOWN = -100  # what torch's cross entropy skips

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with its questions and with what the classifiers of the first stage learn.

    Attributes:
        pixels: uint8 ``(side, side, 3)``, RGB.
        labels: int64 ``(1, classifiers)`` for the picture as a whole or ``(tokens, classifiers)``;
            UNKNOWN where nothing is known.
        questions: Pairs of question and answer.
        kinds: The kind of each question; may be empty in training.
    """

    pixels: Pixels
    labels: Labels
    questions: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training.

    Attributes:
        name: "vision" trains the tower with classifiers, "words" the projector and the embeddings
            of words that name what patches show; others train on questions.
        steps: Optimizer steps.
        images: Images per step.
        drawn: How many of them are drawn rather than taken from the data set's files.
        rate: Peak learning rate of the decoder side; cosine to a hundredth of it.
        vision_rate: The same for the vision tower; 0 freezes it.
        noise: Standard deviation of the noise on each weight matrix at the stage's end, relative
            to that of each of its rows; grows linearly from half of it.
        kinds: Kinds of questions that are asked; all if empty.
        pointing: Weight of the loss of `grounding.Pointing` beside that of the answers; above 0
            its mask applies too.
    """

    name: str
    steps: int
    images: int
    drawn: int
    rate: float
    vision_rate: float
    noise: float
    kinds: tuple[str, ...] = ()
    pointing: float = 0.0


class Task(Protocol):
    """A data set as a task to train on.

    Attributes:
        name: As `bivlm_edge.datasets.DATA_SETS` has it.
        design: Sizes of the model.
        stages: In the order in which they run.
        classifiers: Name and number of classes of each classifier of the first stage.
        words: Classifier -> word -> the class that it names; for stages "words" and with pointing.
    """

    name: str
    design: Design
    stages: Sequence[Stage]
    classifiers: Mapping[str, int]
    words: Mapping[str, Mapping[str, int]]

    def texts(self) -> Iterable[str]:
        """All questions and answers of the training data, for the tokenizer."""

    def batch(self, stage: Stage, rng: np.random.Generator) -> list[Example]:
        """Training examples of one step; the same `rng` draws the same."""

    def validation(self) -> list[Example]:
        """Examples that are never trained on."""

    def test(self) -> list[Example]:
        """The test split."""
