"""A model of which it is known how many image tokens it needs, for tests of the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bivlm_edge.datasets import ImageSource, VqaItem
from bivlm_edge.redundancy.answering import Answers
from bivlm_edge.redundancy.plan import FULL, NO_IMAGE, RARE_TEXT, SHUFFLED, TEXT, Run
from bivlm_edge.redundancy.questions import Questions

TOKENS = 64
KINDS = ("color", "shape")
NEEDS = {"color": 3, "shape": 11}
RIGHT, WRONG = "red", "blue"


def questions_of(n: int) -> Questions:
    """`n` questions, half about colours and half about shapes, each on a picture of its own."""
    items = tuple(
        VqaItem(ImageSource(Path(f"{number}.png")), "what?", RIGHT, KINDS[number % 2])
        for number in range(n)
    )
    return Questions(items, tuple(item.image for item in items), np.arange(n), "digest")


class Known:
    """A model that answers right with as many tokens as a kind of question needs.

    Without a picture, or with another one, it is right every fourth time.
    """

    def __init__(self, questions: Questions, needs: dict[str, dict[str, float]]) -> None:
        self.questions = questions
        self.needs = needs
        self.asked: list[Run] = []

    def ask(self, run: Run) -> Answers:
        self.asked.append(run)
        texts = tuple(
            RIGHT if self._is_right(run, number, item.kind) else WRONG
            for number, item in enumerate(self.questions.items)
        )
        return Answers(texts, run.kept + 9.0, 0.1)

    def _is_right(self, run: Run, number: int, kind: str) -> bool:
        guessed = number // 2 % 4 == 0
        if run.selector == RARE_TEXT:  # a quarter of the question will do
            return guessed or run.kept >= TOKENS / 4
        if run.selector == FULL:
            return True
        if run.selector in (NO_IMAGE, SHUFFLED):
            return guessed
        return guessed or run.kept >= self.needs[run.selector][kind]


class ColourBlind(Known):
    """One that guesses colours, whatever the picture."""

    def _is_right(self, run: Run, number: int, kind: str) -> bool:
        return super()._is_right(Run(NO_IMAGE, 0) if kind == "color" else run, number, kind)


def needs_of(**modes: float) -> dict[str, dict[str, float]]:
    """How much more than NEEDS each selector needs."""
    found = {mode: {kind: NEEDS[kind] * times for kind in KINDS} for mode, times in modes.items()}
    return {**found, TEXT: dict.fromkeys(KINDS, TOKENS)}


def report_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    """What the command adds."""
    return {
        **result,
        "model": name,
        "data": "toy",
        "seed": 0,
        "seeds": 2,
        "code": "0123",
        "versions": {"onnxruntime": "1"},
        "accuracy_question_only": 0.3,
        "intervals": {**result["intervals"], "question_only": [0.2, 0.4]},
        "kinds": {kind: {**of, "question_only": 0.3} for kind, of in result["kinds"].items()},
    }
