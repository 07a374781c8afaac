"""What paired runs over the same questions allow to claim, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
EXPECTED_DISCORDANCE = 0.05  # answers that pruning turns right or wrong; PRUNING.md 5
RESOLUTION = 0.02  # of the image tokens: bisection ends there
_RESAMPLES = 9_999

Values = NDArray[np.float64]
Groups = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean paired difference of two runs over the same questions.

    Attributes:
        mean: Of run minus reference.
        margin: One-sided, at 1 - ALPHA.
    """

    mean: float
    margin: float

    @property
    def low(self) -> float:
        """Lower bound of the mean."""
        return self.mean - self.margin


def paired_difference(run: Values, reference: Values, pictures: Groups) -> Difference:
    """Compare two runs question by question.

    The standard error is the larger of sqrt(d / n), d the rate of discordant questions (McNemar),
    and the one with pictures as clusters, as the questions on one picture fail together. No margin
    is below that of "no failure in n trials" (Clopper and Pearson, 1934).

    Args:
        run: `[n]`, 0 or 1, or means over seeds in between.
        reference: `[n]`.
        pictures: `[n]`, number of each question's picture.
    """
    differences = run - reference
    n = len(differences)
    by_question = math.sqrt(float(np.sum(differences**2))) / n
    by_picture = math.sqrt(float(np.sum(np.bincount(pictures, weights=differences) ** 2))) / n
    margin = _quantile() * max(by_question, by_picture)
    return Difference(float(differences.mean()), max(margin, _least_margin(n)))


def two_sided(run: Values, reference: Values, pictures: Groups) -> tuple[float, float, float]:
    """Return mean, lower and upper end of the paired difference's 95 % interval."""
    found = paired_difference(run, reference, pictures)
    margin = found.margin * _quantile(ALPHA / 2) / _quantile()
    return found.mean, found.mean - margin, found.mean + margin


def questions_needed(tolerance: float) -> int:
    """Return how many questions let a run without any loss pass, at EXPECTED_DISCORDANCE."""
    by_rate = (_quantile() / tolerance) ** 2 * EXPECTED_DISCORDANCE
    by_count = math.log(ALPHA) / math.log1p(-tolerance) if tolerance < 1 else 1
    return math.ceil(max(by_rate, by_count))


def resolvable_tolerance(n: int) -> float:
    """Return the smallest tolerance for which `n` questions are enough; see questions_needed."""
    return max(_quantile() * math.sqrt(EXPECTED_DISCORDANCE / n), _least_margin(n))


@cache
def _quantile(beyond: float = ALPHA) -> float:
    """The normal quantile with probability `beyond` above it."""
    from scipy import stats

    return float(stats.norm.ppf(1 - beyond))


def _least_margin(n: int) -> float:
    return float(1 - ALPHA ** (1 / n))


@dataclass(frozen=True, slots=True)
class Gain:
    """What the pictures add.

    Attributes:
        value: accuracy - max(accuracy without image, accuracy with shuffled images).
        low: One-sided lower bound at 1 - ALPHA; -1 where questions on one picture tell nothing.
    """

    value: float
    low: float

    @property
    def is_used(self) -> bool:
        """Whether the bound excludes 0."""
        return self.low > 0


def gain(full: Values, no_image: Values, shuffled: Values, pictures: Groups, seed: int) -> Gain:
    """Return the gain of the right picture; its bound by a paired bootstrap over pictures.

    Args:
        full: `[n]`, correct answers with the right pictures.
        no_image: `[n]`, with no image token.
        shuffled: `[n]`, with other pictures.
        pictures: `[n]`, numbers 0, 1, ... of the pictures, none left out.
        seed: Of the resampling.
    """
    from scipy import stats

    right, none, other, counts = (
        np.bincount(pictures, weights=values).astype(np.float64)
        for values in (full, no_image, shuffled, np.ones(len(full)))
    )
    value = float(_gain_of_sums(right, none, other, counts, axis=-1))
    if len(counts) < 2:
        return Gain(value, -1.0)
    found = stats.bootstrap(
        (right, none, other, counts),
        _gain_of_sums,
        n_resamples=_RESAMPLES,
        batch=max(1, 2_000_000 // len(counts)),
        vectorized=True,
        paired=True,
        confidence_level=1 - ALPHA,
        alternative="greater",
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return Gain(value, float(found.confidence_interval.low))


def _gain_of_sums(
    full: Values, no_image: Values, shuffled: Values, counts: Values, axis: int
) -> Values:
    best = np.maximum(no_image.sum(axis=axis), shuffled.sum(axis=axis))
    gained: Values = (full.sum(axis=axis) - best) / counts.sum(axis=axis)
    return gained


@dataclass(frozen=True, slots=True)
class Bracket:
    """Where the smallest sufficient number of tokens lies.

    Attributes:
        failed: Largest tested number that failed; -1 if none did.
        enough: K*: the smallest tested number from which on every tested one passed.
    """

    failed: int
    enough: int


def envelope(passes: Mapping[int, bool]) -> Bracket:
    """Return K* of tested numbers of tokens: accuracy need not rise with them.

    Args:
        passes: Tokens -> whether the run passed; the largest one, no pruning, must.
    """
    failed = max((kept for kept, passed in passes.items() if not passed), default=-1)
    return Bracket(failed, min(kept for kept in passes if kept > failed))


def next_to_test(bracket: Bracket, image_tokens: int) -> int | None:
    """Return the middle of the bracket, or None once it is narrow enough."""
    if bracket.enough - bracket.failed <= max(1.0, RESOLUTION * image_tokens):
        return None
    return (bracket.enough + bracket.failed) // 2


def tokens_for(gains: Mapping[int, float], share: float) -> int:
    """Return the fewest tokens from which on every tested number has that share of the gain."""
    return envelope({kept: value >= share for kept, value in gains.items()}).enough


def area_under(gains: Mapping[int, float]) -> float | None:
    """Return the mean of the gain-normalised curve over log2 of 1 .. n tokens (trapezoids).

    None if only one number of tokens above 0 was tested.
    """
    points = sorted((kept, value) for kept, value in gains.items() if kept > 0)
    if len(points) < 2:
        return None
    from scipy.integrate import trapezoid

    kept, values = np.array(points).T
    places = np.log2(kept)
    return float(trapezoid(values, places) / (places[-1] - places[0]))
