"""How often a model answers a question exactly as expected, with confidence intervals."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bivlm_edge.datasets import PictureSource, VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.runtime.answer import Answerer
from bivlm_edge.runtime.preprocess import Picture

_Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers among questions, with the 95 % Wilson score interval.

    Attributes:
        n: Questions.
        correct: Those answered exactly.
        accuracy: correct / n.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    n: int
    correct: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, n: int) -> Score:
        """Return the score of `correct` out of `n` >= 1 questions.

        Interval: E. B. Wilson, "Probable inference, the law of succession, and statistical
        inference", 1927.
        """
        rate = correct / n
        square = _Z_95**2
        center = (rate + square / (2 * n)) / (1 + square / n)
        half = _Z_95 / (1 + square / n) * math.sqrt(rate * (1 - rate) / n + square / (4 * n * n))
        # Exactly 0 and 1 at the ends, where rounding would leave something like 1e-18.
        low = center - half if correct > 0 else 0.0
        high = center + half if correct < n else 1.0
        return cls(n, correct, rate, low, high)


@dataclass(frozen=True, slots=True)
class Scores:
    """How many questions were answered exactly, stripped and in lower case.

    Attributes:
        overall: All questions.
        open_ended: Those whose answer is one of many words (shape, color); None if there are none.
        per_kind: By kind of question, in alphabetical order.
    """

    overall: Score
    open_ended: Score | None
    per_kind: dict[str, Score]

    @classmethod
    def of(cls, answered: Sequence[tuple[VqaItem, str]]) -> Scores:
        """Compare at least one question's expected answer with the one given."""
        hits: dict[str, list[bool]] = defaultdict(list)
        open_ended: list[bool] = []
        for item, text in answered:
            is_hit = normalized(text) == normalized(item.answer)
            hits[item.kind].append(is_hit)
            if item.is_open_ended:
                open_ended.append(is_hit)
        return cls(
            overall=Score.of(sum(map(sum, hits.values())), len(answered)),
            open_ended=Score.of(sum(open_ended), len(open_ended)) if open_ended else None,
            per_kind={kind: Score.of(sum(hits[kind]), len(hits[kind])) for kind in sorted(hits)},
        )


@dataclass(frozen=True, slots=True)
class Evaluation(Scores):
    """What an evaluation found: the scores and what they cost.

    Attributes:
        seconds: Time of all answers, loading the model left out.
        kept_tokens: Mean tokens of a prompt that reached the decoder.
        prompt_tokens: Mean tokens of a prompt before pruning.
    """

    seconds: float
    kept_tokens: float
    prompt_tokens: float


def evaluate(
    answerer: Answerer,
    items: Sequence[VqaItem],
    *,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Ask every question and compare the answers, stripped and in lower case.

    Questions are asked image by image, so that each picture is prepared once.

    Args:
        answerer: The model.
        items: The questions.
        max_new_tokens: Longest answer; None: the manifest's.
        on_progress: Called with the number of questions done, after each.

    Raises:
        RequestError: There are no questions, or one does not fit the context.
        DataError: A picture cannot be read.
    """
    if not items:
        raise RequestError("there are no questions to ask. Give --limit 1 or more.")
    by_image: dict[PictureSource, list[VqaItem]] = defaultdict(list)
    for item in items:
        by_image[item.image].append(item)
    answered: list[tuple[VqaItem, str]] = []
    kept = given = 0
    start = time.perf_counter()
    for source, questions in by_image.items():
        picture = answerer.picture(source.open())
        for item in questions:
            text, generation_kept, generation_given = _answer(
                answerer, item.question, picture, max_new_tokens
            )
            answered.append((item, text))
            kept += generation_kept
            given += generation_given
            if on_progress is not None:
                on_progress(len(answered))
    scores = Scores.of(answered)
    return Evaluation(
        overall=scores.overall,
        open_ended=scores.open_ended,
        per_kind=scores.per_kind,
        seconds=time.perf_counter() - start,
        kept_tokens=kept / len(answered),
        prompt_tokens=given / len(answered),
    )


def _answer(
    answerer: Answerer, question: str, picture: Picture, max_new_tokens: int | None
) -> tuple[str, int, int]:
    generation = answerer.ask(question, picture, max_new_tokens=max_new_tokens)
    text = answerer.prompts.decode(generation)
    return text, generation.kept_tokens, generation.prompt_tokens


def normalized(answer: str) -> str:
    """Return the form in which answers are compared."""
    return answer.strip().lower()
