"""The questions of an analysis: which ones, on which pictures, and the controls made of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.datasets import PictureSource, VqaItem
from bivlm_edge.errors import DataError
from bivlm_edge.runtime.evaluate import normalized


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions with known answers.

    Attributes:
        items: The questions.
        pictures: Distinct pictures, at least two, in order of first use; files with the same
            pixels count once.
        picture_of: int64 `[items]`, index of each question's picture.
        digest: Of questions, answers and pixels.
    """

    items: tuple[VqaItem, ...]
    pictures: tuple[PictureSource, ...]
    picture_of: NDArray[np.int64]
    digest: str

    @property
    def kinds(self) -> dict[str, NDArray[np.int64]]:
        """Indices of the questions of each kind, in alphabetical order of the kinds."""
        found: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(self.items):
            found[item.kind].append(index)
        return {kind: np.array(found[kind], dtype=np.int64) for kind in sorted(found)}

    def correct(self, answers: Sequence[str]) -> NDArray[np.float64]:
        """Return 1 where an answer is exactly the expected one, stripped and in lower case."""
        return np.array(
            [
                normalized(answer) == normalized(item.answer)
                for answer, item in zip(answers, self.items, strict=True)
            ],
            dtype=np.float64,
        )


def spread(items: Sequence[VqaItem], limit: int | None) -> list[VqaItem]:
    """Return `limit` questions: all on each of some pictures that are spread over the list evenly.

    What a picture costs is shared by its questions, so that whole pictures are the cheaper sample.
    """
    if limit is None or limit >= len(items):
        return list(items)
    by_picture: dict[PictureSource, list[VqaItem]] = defaultdict(list)
    for item in items:
        by_picture[item.image].append(item)
    groups = list(by_picture.values())
    for count in range(limit * len(groups) // len(items), len(groups) + 1):
        # the middle of each of `count` parts of the list
        places = [(2 * part + 1) * len(groups) // (2 * count) for part in range(count)]
        chosen = [item for place in places for item in groups[place]]
        if len(chosen) >= limit:
            break
    return chosen[:limit]


def gather(items: Sequence[VqaItem], on_progress: Callable[[int], None] | None = None) -> Questions:
    """Read every picture once and tell distinct ones apart by their pixels.

    Args:
        items: The questions.
        on_progress: Called with the number of questions done.

    Raises:
        DataError: A picture cannot be read, or there are fewer than two distinct ones.
    """
    seen: dict[PictureSource, int] = {}
    by_pixels: dict[bytes, int] = {}
    pictures: list[PictureSource] = []
    digest = hashlib.sha256()
    picture_of = np.zeros(len(items), dtype=np.int64)
    for number, item in enumerate(items):
        if item.image not in seen:
            image = item.image.open()
            content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
            if content not in by_pixels:
                by_pixels[content] = len(pictures)
                pictures.append(item.image)
            seen[item.image] = by_pixels[content]
            digest.update(content)
        picture_of[number] = seen[item.image]
        digest.update(
            repr((item.question, item.answer, item.kind, int(picture_of[number]))).encode()
        )
        if on_progress is not None:
            on_progress(number + 1)
    if len(pictures) < 2:
        raise DataError(
            f"the {len(items)} questions are about {len(pictures)} picture. Asking about another "
            "picture is one of the controls: give questions about two different ones or more."
        )
    return Questions(tuple(items), tuple(pictures), picture_of, digest.hexdigest())


def derangement(count: int, seed: int) -> NDArray[np.int64]:
    """Return for each of `count` >= 2 pictures another one: a random cycle through all."""
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, -1)
    return partner


def question_only(items: Sequence[VqaItem], train: Sequence[VqaItem]) -> list[str]:
    """Answer without looking: the most frequent answer to the same question in `train`.

    Questions that `train` lacks get its most frequent answer. Ties: the first in the alphabet.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for item in train:
        counts[normalized(item.question)][normalized(item.answer)] += 1
        overall[normalized(item.answer)] += 1
    return [_most_frequent(counts.get(normalized(item.question), overall)) for item in items]


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def kept_of_question(length: int, share: float, seed: int, number: int) -> NDArray[np.int64]:
    """Return which tokens of a question stay: the same ones and more for a larger share.

    Args:
        length: Tokens of the question.
        share: Fraction that stays, rounded up as TokenPrune does.
        seed: Of the draw.
        number: Of the question, so that each has a draw of its own.
    """
    order = np.random.default_rng((seed, number)).permutation(length)
    return np.sort(order[: _count(length, share)])


def token_frequencies(questions: Iterable[NDArray[np.int64]]) -> Counter[int]:
    """Return for each token how many of the questions, int64 `[tokens]` each, have it."""
    return Counter(token for ids in questions for token in set(ids.tolist()))


def rarest_of_question(
    ids: NDArray[np.int64], share: float, frequencies: Mapping[int, int]
) -> NDArray[np.int64]:
    """Return which tokens of a question stay: those with the largest inverse document frequency.

    The score of a token is log(questions / questions that have it) (Spärck Jones, 1972): what
    every question has says least about this one, and goes first. Ties: the earlier token stays.

    Args:
        ids: int64 `[tokens]` of the question.
        share: Fraction that stays, rounded up as TokenPrune does.
        frequencies: How many questions have a token; see `token_frequencies`.
    """
    order = np.argsort([frequencies[token] for token in ids.tolist()], kind="stable")
    return np.sort(order[: _count(len(ids), share)])


def _count(length: int, share: float) -> int:
    return min(length, math.ceil(length * share - 1e-6))
