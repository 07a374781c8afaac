"""The analysis of models that are known: what they need, what it finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from known_model import KINDS, NEEDS, TOKENS, ColourBlind, Known, needs_of, questions_of

from bivlm_edge.errors import RequestError
from bivlm_edge.redundancy import analysis
from bivlm_edge.redundancy.analysis import analyse
from bivlm_edge.redundancy.answering import Answers
from bivlm_edge.redundancy.plan import (
    FULL,
    NO_IMAGE,
    RANDOM,
    RARE_TEXT,
    SHUFFLED,
    TEXT,
    Run,
    Setting,
)
from bivlm_edge.report import to_json


def _analyse(
    needs: dict[str, dict[str, float]], n: int = 3000, **changes: Any
) -> tuple[dict[str, Any], Known]:
    known = Known(questions_of(n), needs)
    modes = tuple(mode for mode in needs if mode != TEXT)
    setting = Setting(**{"modes": modes, "seeds": 2, **changes})
    return analyse(known.questions, setting, TOKENS, "mmr", known.ask), known


def test_k_star_is_what_the_model_needs_overall_and_by_kind() -> None:
    result, known = _analyse(needs_of(mmr=1, random=2))
    assert (result["verdict"], result["mode"]) == (analysis.REDUNDANT, "mmr")
    assert (result["k_star"], result["random_k_star"]) == (11, 22)
    assert result["method_value"] == 2
    assert result["redundancy"] == 1 - 11 / TOKENS
    kinds = result["modes"]["mmr"]["kinds"]
    assert {kind: of["k_star"] for kind, of in kinds.items()} == NEEDS
    assert result["modes"]["mmr"]["k_failed"] == 10
    assert len(known.asked) == len(set(known.asked))
    assert {run.seed for run in known.asked if run.selector == RANDOM} == {0, 1}
    json.loads(to_json(result))


def test_controls_gain_and_curve() -> None:
    result, known = _analyse(needs_of(mmr=1, random=2))
    assert (result["accuracy_full"], result["accuracy_no_image"]) == (1, 0.25)
    assert result["accuracy_shuffled"] == result["kinds"]["shape"]["shuffled"] == 0.25
    assert result["gain"] == 0.75
    assert 0.7 < result["gain_low"] < 0.75
    assert result["image_contribution"] == 3
    points = {point["kept"]: point for point in result["curves"]["mmr"]}
    at_8 = points[8]  # colours right, shapes guessed
    assert at_8["accuracy"] == 0.625
    assert at_8["gain"] == pytest.approx(0.5)
    assert at_8["flips"] == pytest.approx(0.375)
    assert at_8["kinds"] == {"color": 1.0, "shape": 0.25}
    assert at_8["minus_random"]["mean"] == 0
    assert points[16]["minus_random"]["interval"][0] > 0.3
    assert points[16]["minus_uniform"] is None
    assert at_8["prompt_tokens"] == 17
    assert not at_8["passes"]
    assert points[16]["passes"]
    assert result["modes"]["mmr"]["tokens_for_gain"] == {"90%": 11, "95%": 11, "99%": 11}
    # 1 and 2: nothing, 4 and 8: half, 16 .. 64: all; trapezoids over six steps
    area = (0 + 0.25 + 0.5 + 0.75 + 1 + 1) / 6
    assert result["modes"]["mmr"]["area"] == pytest.approx(area)
    tested = [0, 1, 2, 4, 7, 8, 16, 32, 64]
    assert [point["kept"] for point in result["question_tokens"]] == tested
    assert result["question_tokens"][-2]["accuracy"] == 0.25
    rarest = {point["kept"]: point for point in result["rarest_question_tokens"]}
    assert sorted(rarest) == tested
    assert (rarest[8]["accuracy"], rarest[16]["accuracy"]) == (0.25, 1)
    # without any token of the question it does not matter which go first
    assert rarest[0] == result["question_tokens"][0]
    assert Run(RARE_TEXT, 0) not in known.asked


def test_without_a_search_the_numbers_asked_for_alone_are_tested() -> None:
    result, known = _analyse(needs_of(mmr=1, uniform=2), also=(12,), searches=False)
    assert {run.kept for run in known.asked} == {TOKENS, 12, 0}
    assert (result["k_star"], result["modes"]["uniform"]["k_star"]) == (12, TOKENS)
    assert "no other number was tested." in result["message"]
    (_, at_12, _) = result["curves"]["mmr"]
    assert at_12["minus_uniform"]["mean"] == 0.375
    assert at_12["minus_uniform"]["interval"][0] > 0.3
    with pytest.raises(RequestError, match="--no-search tests the numbers of --tokens alone"):
        Setting(("mmr",), searches=False)


def test_a_selector_that_is_no_better_than_chance_is_told_so() -> None:
    result, _ = _analyse(needs_of(mmr=1, random=1))
    assert result["verdict"] == analysis.SELECTOR_ADDS_NOTHING
    assert (
        "random selection needs 11. mmr adds nothing: it needs no fewer than random."
        in (result["message"])
    )
    assert result["message"].endswith(
        "At 7 tokens mmr is not told apart from random (+0.00 points, -0.12 to +0.12): the "
        "selector adds nothing over it there."
    )
    assert result["modes"]["mmr"]["beats_random"] is False
    result, _ = _analyse(needs_of(mmr=2, random=1))
    assert result["verdict"] == analysis.SELECTOR_ADDS_NOTHING
    assert result["method_value"] == 0.5


@pytest.mark.parametrize(
    ("of_mmr", "of_uniform", "verdict", "said"),
    [
        # fewer are needed, and a tenth shows it
        ((3, 11), (9, 33), analysis.REDUNDANT, "is better than uniform (+37.50 points"),
        # fewer are needed, and a tenth does not show it
        ((3, 11), (3, 33), analysis.REDUNDANT, "is not told apart from uniform (+0.00 points"),
        # a tenth shows it alone
        ((3, 30), (9, 30), analysis.REDUNDANT, "is better than uniform (+37.50 points"),
        ((9, 30), (9, 30), analysis.SELECTOR_ADDS_NOTHING, "is not told apart from uniform"),
        ((9, 30), (3, 20), analysis.SELECTOR_ADDS_NOTHING, "is worse than uniform (-37.50 points"),
        # more than all tokens: nothing passes
        ((9, 65), (9, 65), analysis.ALL_TOKENS_NEEDED, "is not told apart from uniform"),
    ],
)
def test_a_selector_is_judged_by_what_it_needs_and_at_a_tenth(
    of_mmr: tuple[int, int], of_uniform: tuple[int, int], verdict: str, said: str
) -> None:
    needs = {"mmr": of_mmr, "uniform": of_uniform, TEXT: (TOKENS, TOKENS)}
    result, _ = _analyse(
        {mode: dict(zip(KINDS, of, strict=True)) for mode, of in needs.items()}, n=1600
    )
    assert result["verdict"] == verdict
    assert result["modes"]["mmr"]["beats_random"] is None
    assert result["modes"]["mmr"]["beats_uniform"] is (of_mmr[1] < of_uniform[1])
    assert f"At 7 tokens mmr {said}" in result["message"]


def test_the_best_selector_counts_and_the_files_own_among_equals() -> None:
    result, _ = _analyse(needs_of(maxmin=1, mmr=2, random=3))
    assert (result["mode"], result["k_star"]) == ("maxmin", 11)
    assert result["verdict"] == analysis.REDUNDANT
    assert "random selection needs 33; the file's own mmr needs 22." in result["message"]
    result, _ = _analyse(needs_of(uniform=1, mmr=3, random=2))
    assert (result["verdict"], result["k_star"]) == (analysis.SELECTOR_ADDS_NOTHING, 11)
    assert "the file's own mmr needs 33. mmr adds nothing" in result["message"]
    assert result["modes"]["uniform"]["beats_random"] is True
    result, _ = _analyse(needs_of(maxmin=1, mmr=1, random=3))
    assert result["mode"] == "mmr"


def test_a_blind_model_gets_no_ratio_and_no_further_runs() -> None:
    known = Known(questions_of(3000), {})
    blind: Callable[[Run], Answers] = lambda run: known.ask(Run(NO_IMAGE, run.kept))  # noqa: E731
    result = analyse(known.questions, Setting(("mmr", "random")), TOKENS, "mmr", blind)
    assert result["verdict"] == analysis.IMAGE_NOT_USED
    assert result["k_star"] is result["random_k_star"] is result["redundancy"] is None
    assert result["curves"] == {}
    assert len(known.asked) == 3


def test_a_model_that_knows_another_picture_as_well_is_blind_too() -> None:
    known = Known(questions_of(3000), {})

    def ask(run: Run) -> Answers:
        return known.ask(Run(FULL, TOKENS) if run.selector == SHUFFLED else run)

    result = analyse(known.questions, Setting(("mmr",)), TOKENS, "mmr", ask)
    assert result["verdict"] == analysis.IMAGE_NOT_USED
    assert "25.00% without, 100.00% with another one" in result["message"]


def test_a_dip_above_counts_against_what_passes_below() -> None:
    known = Known(questions_of(3000), needs_of(mmr=1))

    def ask(run: Run) -> Answers:
        dips = run.selector == "mmr" and 20 < run.kept < 40
        return known.ask(Run(NO_IMAGE, 0) if dips else run)

    result = analyse(known.questions, Setting(("mmr",)), TOKENS, "mmr", ask)
    assert (result["k_star"], result["modes"]["mmr"]["k_failed"]) == (40, 39)


def test_all_tokens_needed() -> None:
    result, _ = _analyse({"mmr": dict.fromkeys(KINDS, TOKENS), TEXT: dict.fromkeys(KINDS, 0)})
    assert (result["verdict"], result["k_star"]) == (analysis.ALL_TOKENS_NEEDED, TOKENS)
    assert result["message"].startswith("All 64 image tokens are needed: mmr with 63 loses more")


def test_too_few_questions_are_told_with_the_number_needed() -> None:
    result, _ = _analyse(needs_of(mmr=0), n=100)
    assert (result["verdict"], result["k_star"]) == (analysis.TOO_FEW_QUESTIONS, TOKENS)
    assert "100 questions were asked; a tolerance of 1 point needs about 1,353" in result["message"]
    result, _ = _analyse(needs_of(mmr=1), n=100, tolerance=0.05)
    assert result["k_star"] == 11


def test_a_kind_with_few_questions_has_the_tolerance_that_they_resolve() -> None:
    result, _ = _analyse(needs_of(mmr=1), n=1400)
    kinds = result["modes"]["mmr"]["kinds"]
    expected = 1.6448536 * math.sqrt(0.05 / 700)
    assert kinds["color"]["tolerance"] == pytest.approx(expected)
    assert result["modes"]["mmr"]["tolerance"] == 0.01
    assert {kind: of["k_star"] for kind, of in kinds.items()} == NEEDS


def test_a_kind_of_question_that_the_picture_does_not_help_has_no_k_star() -> None:
    known = ColourBlind(questions_of(3000), needs_of(mmr=1, random=2))
    setting = Setting(("mmr", RANDOM), seeds=1)
    result = analyse(known.questions, setting, TOKENS, "mmr", known.ask)
    assert (result["verdict"], result["k_star"]) == (analysis.REDUNDANT, 11)
    assert result["kinds"]["color"]["image_used"] is False
    assert result["kinds"]["color"]["gain"] == 0
    assert result["kinds"]["shape"]["gain_low"] > 0.7
    kinds = result["modes"]["mmr"]["kinds"]
    assert kinds["color"]["k_star"] is kinds["color"]["redundancy"] is None
    assert kinds["shape"]["k_star"] == 11
    # nothing was sought for it: the other kind and the whole need 11
    tested = {point["kept"] for point in result["curves"]["mmr"]}
    assert tested == {64, 32, 16, 12, 11, 10, 8, 7, 4, 2, 1, 0}


def test_a_kind_of_question_on_one_picture_has_no_k_star() -> None:
    questions = questions_of(3000)
    on_one = np.where(np.arange(3000) % 2, np.arange(3000), 0)
    known = Known(replace(questions, picture_of=on_one), needs_of(mmr=1))
    result = analyse(known.questions, Setting(("mmr",)), TOKENS, "mmr", known.ask)
    assert result["kinds"]["color"]["gain_low"] == -1
    kinds = result["modes"]["mmr"]["kinds"]
    assert (kinds["color"]["k_star"], kinds["shape"]["k_star"]) == (None, 11)


def test_random_counts_as_the_mean_over_its_seeds() -> None:
    known = Known(questions_of(3000), needs_of(random=1))

    def ask(run: Run) -> Answers:
        is_bad = run.selector == RANDOM and run.seed == 1
        return known.ask(Run(NO_IMAGE, 0) if is_bad else run)

    result = analyse(known.questions, Setting((RANDOM,), seeds=2), TOKENS, "mmr", ask)
    points = {point["kept"]: point for point in result["curves"][RANDOM]}
    assert points[16]["accuracy"] == (1 + 0.25) / 2
    assert points[16]["seeds"] == 2
    assert result["mode"] == RANDOM
    assert result["method_value"] is None


def test_numbers_that_the_model_does_not_have_are_refused_before_any_run() -> None:
    known = Known(questions_of(10), needs_of(mmr=1))
    with pytest.raises(RequestError, match="--tokens 64 is not below the 64 tokens"):
        analyse(known.questions, Setting(("mmr",), also=(64,)), TOKENS, "mmr", known.ask)
    assert known.asked == []
