"""Bounds and K* against other ways to compute them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from bivlm_edge.redundancy import statistics
from bivlm_edge.redundancy.statistics import Bracket

Z = 1.6448536269514722  # one-sided 95 %
ALONE = np.arange(1000)  # every question on a picture of its own


def _outcomes(broken: int, repaired: int, n: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """A run and its reference with so many discordant questions."""
    reference = np.ones(n)
    reference[n - repaired :] = 0
    run = np.ones(n)
    run[:broken] = 0
    return run, reference


def test_the_margin_is_that_of_the_discordant_questions() -> None:
    found = statistics.paired_difference(*_outcomes(40, 10), ALONE)
    assert found.mean == pytest.approx(-0.03)
    assert found.margin == pytest.approx(Z * math.sqrt(0.05 / 1000))
    assert found.low == found.mean - found.margin


def test_the_bound_has_the_coverage_that_it_claims() -> None:
    """Of samples from a known rate, about 95 % have a bound below the truth."""
    rng = np.random.default_rng(0)
    truth, rate = -0.02, 0.06
    p_broken, p_repaired = (rate - truth) / 2, (rate + truth) / 2
    below = []
    for _ in range(2000):
        broken, repaired, _ = rng.multinomial(1000, (p_broken, p_repaired, 1 - rate))
        found = statistics.paired_difference(*_outcomes(int(broken), int(repaired)), ALONE)
        below.append(found.low <= truth)
    assert 0.935 <= np.mean(below) <= 0.97


def test_questions_that_fail_together_count_as_one() -> None:
    run, reference = _outcomes(40, 0)
    together = np.repeat(np.arange(250), 4)
    alone = statistics.paired_difference(run, reference, ALONE)
    found = statistics.paired_difference(run, reference, together)
    # ten pictures lose all of their four questions
    assert found.margin == pytest.approx(Z * math.sqrt(10 * 16) / 1000)
    assert found.margin == pytest.approx(2 * alone.margin)


def test_without_any_discordant_question_the_margin_is_that_of_no_failure_in_n() -> None:
    run, reference = _outcomes(0, 0)
    found = statistics.paired_difference(run, reference, ALONE)
    exact = stats.binomtest(0, 1000).proportion_ci(0.9, method="exact")  # two-sided: 5 % each
    assert found.margin == pytest.approx(exact.high)


def test_two_sided_interval() -> None:
    run, reference = _outcomes(40, 10)
    mean, low, high = statistics.two_sided(run, reference, ALONE)
    half = 1.959963984540054 * math.sqrt(0.05 / 1000)
    assert (mean, low, high) == pytest.approx((-0.03, -0.03 - half, -0.03 + half))


@pytest.mark.parametrize("tolerance", [0.003, 0.01, 0.05, 0.4])
def test_the_needed_questions_are_the_fewest_that_can_pass(tolerance: float) -> None:
    needed = statistics.questions_needed(tolerance)

    def passes(n: int) -> bool:
        return statistics.resolvable_tolerance(n) <= tolerance * (1 + 1e-12)

    assert passes(needed)
    assert not passes(needed - 1)


def test_the_needed_questions_of_the_specification() -> None:
    assert statistics.questions_needed(0.01) == 1353


def test_gain_is_over_the_better_control_and_its_bound_that_of_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(1)
    n = 400
    # the four questions on a picture are right or wrong together
    full, none, other = (
        np.repeat(rng.random(n // 4) < rate, 4).astype(float) for rate in (0.9, 0.5, 0.6)
    )
    pictures = np.arange(n) // 4
    found = statistics.gain(full, none, other, pictures, seed=3)
    assert found.value == pytest.approx(full.mean() - max(none.mean(), other.mean()))
    values = []
    for _ in range(4000):
        drawn = rng.integers(0, n // 4, n // 4)
        of = (4 * drawn[:, None] + np.arange(4)).ravel()
        values.append(full[of].mean() - max(none[of].mean(), other[of].mean()))
    assert found.low == pytest.approx(np.percentile(values, 5), abs=0.015)
    assert found.is_used
    assert statistics.gain(full, none, other, pictures, seed=3) == found


def test_a_gain_that_could_be_chance_is_none() -> None:
    rng = np.random.default_rng(2)
    full, none, other = ((rng.random(300) < 0.6).astype(float) for _ in range(3))
    pictures = np.arange(300) // 3
    assert not statistics.gain(full, none, other, pictures, seed=0).is_used
    # a model that answers alike whatever it sees
    assert not statistics.gain(full, full, full, pictures, seed=0).is_used


@pytest.mark.parametrize(
    ("passes", "failed", "enough"),
    [
        ({8: True, 4: True, 2: False, 1: False, 0: False}, 2, 4),
        # accuracy need not rise: what passes below a failure does not count
        ({8: True, 4: False, 2: True, 1: True, 0: False}, 4, 8),
        ({8: True, 4: True, 2: True, 1: True, 0: True}, -1, 0),
        ({8: True, 4: False, 2: False, 1: False, 0: False}, 4, 8),
    ],
)
def test_k_star_has_no_failure_above_it(passes: dict[int, bool], failed: int, enough: int) -> None:
    assert statistics.envelope(passes) == Bracket(failed, enough)


@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 576, 730])
def test_bisection_ends_next_to_the_truth(tokens: int) -> None:
    for truth in {0, 1, 5, tokens // 3, tokens - 1, tokens} & set(range(tokens + 1)):
        passes = {kept: kept >= truth for kept in (0, tokens // 2, tokens)}
        steps = 0
        while True:
            bracket = statistics.envelope(passes)
            kept = statistics.next_to_test(bracket, tokens)
            if kept is None:
                break
            assert kept not in passes
            passes[kept] = kept >= truth
            steps += 1
        assert bracket.failed < truth <= bracket.enough
        assert bracket.enough - bracket.failed <= max(1, 0.02 * tokens)
        assert steps <= math.log2(tokens) + 1


def test_area_and_tokens_for_a_share_of_the_gain() -> None:
    gains = {0: 0.0, 1: 0.2, 2: 0.6, 4: 0.5, 8: 1.0}
    steps = [(a + b) / 2 for a, b in pairwise([0.2, 0.6, 0.5, 1.0])]
    assert statistics.area_under(gains) == pytest.approx(sum(steps) / 3)
    assert statistics.area_under({0: 0.0, 1: 1.0}) is None
    assert statistics.tokens_for(gains, 0.55) == 8  # 2 would do, but 4 does not
    assert statistics.tokens_for(gains, 0.2) == 1
