"""From answers to curves over the number of image tokens: what passes, what it is worth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.redundancy import statistics
from bivlm_edge.redundancy.answering import Answers
from bivlm_edge.redundancy.plan import BASELINES
from bivlm_edge.redundancy.questions import Questions
from bivlm_edge.redundancy.statistics import Bracket, Difference, Gain, Values
from bivlm_edge.runtime.evaluate import Score, normalized

ALL = "all"
SHARES = (0.90, 0.95, 0.99)  # of the gain


@dataclass(frozen=True, slots=True)
class Measured:
    """One selector at one number of tokens.

    Attributes:
        correct: `[questions]`, mean over the seeds.
        flips: Share of the answers that differ from those with all tokens.
        kept_tokens: Mean tokens of a prompt in the KV cache.
        digest: SHA-256 of the vectors of correctness, 16 digits.
        seeds: Runs.
    """

    correct: Values
    flips: float
    kept_tokens: float
    digest: str
    seeds: int

    @classmethod
    def of(cls, runs: Sequence[Answers], questions: Questions, full: Sequence[str]) -> Measured:
        """Put runs that differ by their seed together.

        Args:
            runs: One or more.
            questions: What was asked.
            full: The answers with all tokens.
        """
        correct = np.stack([questions.correct(run.texts) for run in runs])
        flips = [
            normalized(text) != normalized(other)
            for run in runs
            for text, other in zip(run.texts, full, strict=True)
        ]
        digest = hashlib.sha256(np.packbits(correct.astype(np.bool_), axis=1).tobytes())
        return cls(
            correct.mean(axis=0),
            float(np.mean(flips)),
            float(np.mean([run.kept_tokens for run in runs])),
            digest.hexdigest()[:16],
            len(runs),
        )


class Judge:
    """Tells which numbers of tokens are enough, overall and by kind of question.

    Attributes:
        subsets: Indices of the questions: ALL, and each kind if there are several.
    """

    def __init__(
        self,
        questions: Questions,
        tolerance: float,
        image_tokens: int,
        full: Measured,
        no_image: Measured,
        shuffled: Measured,
        seed: int,
    ) -> None:
        """Take the two ends of every curve.

        Args:
            questions: What was asked.
            tolerance: Loss of accuracy that passes.
            image_tokens: Of one image.
            full: With all of them.
            no_image: With none.
            shuffled: With other pictures.
            seed: Of the resampling.
        """
        self._pictures = questions.picture_of
        self._tolerance = tolerance
        self._image_tokens = image_tokens
        self._full = full
        self._no_image = no_image
        self._shuffled = shuffled
        self._seed = seed
        self._found_gains: dict[str, Gain] = {}
        self.subsets: dict[str, NDArray[np.int64]] = {ALL: np.arange(len(questions.items))}
        kinds = questions.kinds
        if len(kinds) > 1:
            self.subsets.update(kinds)

    def tolerance(self, subset: str) -> float:
        """Return what is asked for; of a kind with too few questions for it, what they resolve."""
        if subset == ALL:
            return self._tolerance
        resolved = statistics.resolvable_tolerance(len(self.subsets[subset]))
        return max(self._tolerance, resolved)

    def gain(self, subset: str) -> Gain:
        """Return what the right pictures add; computed once."""
        if subset not in self._found_gains:
            of = self.subsets[subset]
            _, pictures = np.unique(self._pictures[of], return_inverse=True)
            self._found_gains[subset] = statistics.gain(
                self._full.correct[of],
                self._no_image.correct[of],
                self._shuffled.correct[of],
                pictures,
                self._seed,
            )
        return self._found_gains[subset]

    def uses_image(self, subset: str) -> bool:
        """Whether the pictures add anything, so that a number of tokens means something."""
        return self.gain(subset).is_used

    def difference(self, measured: Measured, subset: str = ALL) -> Difference:
        """Return the paired difference to all tokens."""
        of = self.subsets[subset]
        return statistics.paired_difference(
            measured.correct[of], self._full.correct[of], self._pictures[of]
        )

    def bracket(self, found: Mapping[int, Measured], subset: str = ALL) -> Bracket:
        """Return where the smallest sufficient number lies, by the runs so far."""
        return statistics.envelope(
            {kept: self._passes(kept, measured, subset) for kept, measured in found.items()}
        )

    def summary(self, found: Mapping[int, Measured], tested: Sequence[int]) -> dict[str, Any]:
        """Return what a curve says.

        Args:
            found: All that was measured of a selector.
            tested: The numbers that all selectors were tested at; the area is over these, so that
                selectors can be compared.
        """
        gains = self._gains(found, ALL)
        at_grid = {kept: gains[kept] for kept in tested} if gains else {}
        return {
            **self._need(found, ALL),  # of a model that uses the image: K* is a number
            "tokens_for_gain": {
                f"{share:.0%}": statistics.tokens_for(gains, share) if gains else None
                for share in SHARES
            },
            "area": statistics.area_under(at_grid),
            "kinds": {
                kind: {"questions": len(self.subsets[kind]), **self._need(found, kind)}
                for kind in self.subsets
                if kind != ALL
            },
        }

    def curve(
        self, found: Mapping[int, Measured], baselines: Mapping[str, Mapping[int, Measured]]
    ) -> list[dict[str, Any]]:
        """Return a point for each number of tokens, rising.

        Args:
            found: Of a selector.
            baselines: Of those of BASELINES to compare with.
        """
        gains = self._gains(found, ALL)
        return [
            self._point(
                kept,
                found[kept],
                gains.get(kept),
                {name: points[kept] for name, points in baselines.items() if kept in points},
            )
            for kept in sorted(found)
        ]

    def _point(
        self, kept: int, measured: Measured, gain: float | None, baselines: Mapping[str, Measured]
    ) -> dict[str, Any]:
        difference = self.difference(measured)
        passes = self._passes(kept, measured, ALL)
        n = len(measured.correct)
        accuracy = float(measured.correct.mean())
        is_end = kept in (0, self._image_tokens)
        return {
            "kept": kept,
            "accuracy": accuracy,
            "interval": interval(accuracy, n),
            "difference": difference.mean,
            "difference_low": 0.0 if kept == self._image_tokens else difference.low,
            "passes": passes,
            "undecided": not passes and difference.mean >= -self._tolerance,
            "flips": measured.flips,
            "gain": gain,
            "prompt_tokens": measured.kept_tokens,
            "seeds": measured.seeds,
            "digest": measured.digest,
            **{
                f"minus_{name}": None
                if is_end or name not in baselines
                else self._minus(measured, baselines[name])
                for name in BASELINES
            },
            "kinds": {
                kind: float(measured.correct[of].mean())
                for kind, of in self.subsets.items()
                if kind != ALL
            },
        }

    def _minus(self, measured: Measured, baseline: Measured) -> dict[str, Any]:
        mean, low, high = statistics.two_sided(measured.correct, baseline.correct, self._pictures)
        return {"mean": mean, "interval": [low, high]}

    def _passes(self, kept: int, measured: Measured, subset: str) -> bool:
        # all tokens are the reference itself: nothing to estimate
        if kept == self._image_tokens:
            return True
        return self.difference(measured, subset).low >= -self.tolerance(subset)

    def _need(self, found: Mapping[int, Measured], subset: str) -> dict[str, Any]:
        tolerance = self.tolerance(subset)
        if not self.uses_image(subset):
            return {"tolerance": tolerance, "k_star": None, "k_failed": None, "redundancy": None}
        bracket = self.bracket(found, subset)
        return {
            "tolerance": tolerance,
            "k_star": bracket.enough,
            "k_failed": bracket.failed if bracket.failed >= 0 else None,
            "redundancy": 1 - bracket.enough / self._image_tokens,
        }

    def _gains(self, found: Mapping[int, Measured], subset: str) -> dict[int, float]:
        """The share of the gain from no image to all tokens; empty if there is none."""
        of = self.subsets[subset]
        none = float(self._no_image.correct[of].mean())
        full = float(self._full.correct[of].mean())
        if full <= none:
            return {}
        return {
            kept: (float(measured.correct[of].mean()) - none) / (full - none)
            for kept, measured in found.items()
        }


def interval(accuracy: float, n: int) -> list[float]:
    """Return the 95 % Wilson score interval."""
    score = Score.of(round(accuracy * n), n)
    return [score.low, score.high]
