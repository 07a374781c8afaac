"""The analysis of models that are known: what they need, what it finds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.datasets import ImageSource, VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.redundancy import analysis, pages, plot
from bivlm_edge.redundancy.analysis import analyse
from bivlm_edge.redundancy.answering import Answers, Cost
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
from bivlm_edge.redundancy.questions import Questions
from bivlm_edge.report import to_json

TOKENS = 64
KINDS = ("color", "shape")
NEEDS = {"color": 3, "shape": 11}
RIGHT, WRONG = "red", "blue"


def _questions(n: int) -> Questions:
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


def _needs(**modes: float) -> dict[str, dict[str, float]]:
    """How much more than NEEDS each selector needs."""
    found = {mode: {kind: NEEDS[kind] * times for kind in KINDS} for mode, times in modes.items()}
    return {**found, TEXT: dict.fromkeys(KINDS, TOKENS)}


def _analyse(
    needs: dict[str, dict[str, float]], n: int = 3000, **changes: Any
) -> tuple[dict[str, Any], Known]:
    known = Known(_questions(n), needs)
    modes = tuple(mode for mode in needs if mode != TEXT)
    setting = Setting(**{"modes": modes, "seeds": 2, **changes})
    return analyse(known.questions, setting, TOKENS, "mmr", known.ask), known


def test_k_star_is_what_the_model_needs_overall_and_by_kind() -> None:
    result, known = _analyse(_needs(mmr=1, random=2))
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
    result, known = _analyse(_needs(mmr=1, random=2))
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
    result, known = _analyse(_needs(mmr=1, uniform=2), also=(12,), searches=False)
    assert {run.kept for run in known.asked} == {TOKENS, 12, 0}
    assert (result["k_star"], result["modes"]["uniform"]["k_star"]) == (12, TOKENS)
    (_, at_12, _) = result["curves"]["mmr"]
    assert at_12["minus_uniform"]["mean"] == 0.375
    assert at_12["minus_uniform"]["interval"][0] > 0.3
    with pytest.raises(RequestError, match="--no-search tests the numbers of --tokens alone"):
        Setting(("mmr",), searches=False)


def test_a_selector_that_is_no_better_than_chance_is_told_so() -> None:
    result, _ = _analyse(_needs(mmr=1, random=1))
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
    result, _ = _analyse(_needs(mmr=2, random=1))
    assert result["verdict"] == analysis.SELECTOR_ADDS_NOTHING
    assert result["method_value"] == 0.5


@pytest.mark.parametrize(
    ("of_mmr", "of_uniform", "verdict", "said"),
    [
        # fewer are needed, and a tenth shows it
        ((3, 11), (9, 33), analysis.REDUNDANT, None),
        # fewer are needed, and a tenth does not show it
        ((3, 11), (3, 33), analysis.REDUNDANT, "is not told apart from uniform (+0.00 points"),
        # a tenth shows it alone
        ((3, 30), (9, 30), analysis.REDUNDANT, None),
        ((9, 30), (9, 30), analysis.SELECTOR_ADDS_NOTHING, "is not told apart from uniform"),
        ((9, 30), (3, 20), analysis.SELECTOR_ADDS_NOTHING, "is worse than uniform (-37.50 points"),
        # more than all tokens: nothing passes
        ((9, 65), (9, 65), analysis.ALL_TOKENS_NEEDED, "is not told apart from uniform"),
    ],
)
def test_a_selector_is_judged_by_what_it_needs_and_at_a_tenth(
    of_mmr: tuple[int, int], of_uniform: tuple[int, int], verdict: str, said: str | None
) -> None:
    needs = {"mmr": of_mmr, "uniform": of_uniform, TEXT: (TOKENS, TOKENS)}
    result, _ = _analyse(
        {mode: dict(zip(KINDS, of, strict=True)) for mode, of in needs.items()}, n=1600
    )
    assert result["verdict"] == verdict
    assert result["modes"]["mmr"]["beats_random"] is None
    assert result["modes"]["mmr"]["beats_uniform"] is (of_mmr[1] < of_uniform[1])
    if said is None:
        assert "At 7 tokens" not in result["message"]
    else:
        assert f"At 7 tokens mmr {said}" in result["message"]


def test_the_best_selector_counts_and_the_files_own_among_equals() -> None:
    result, _ = _analyse(_needs(maxmin=1, mmr=2, random=3))
    assert (result["mode"], result["k_star"]) == ("maxmin", 11)
    assert result["verdict"] == analysis.REDUNDANT
    assert "random selection needs 33; the file's own mmr needs 22." in result["message"]
    result, _ = _analyse(_needs(uniform=1, mmr=3, random=2))
    assert (result["verdict"], result["k_star"]) == (analysis.SELECTOR_ADDS_NOTHING, 11)
    assert "the file's own mmr needs 33. mmr adds nothing" in result["message"]
    assert result["modes"]["uniform"]["beats_random"] is True
    result, _ = _analyse(_needs(maxmin=1, mmr=1, random=3))
    assert result["mode"] == "mmr"


def test_a_blind_model_gets_no_ratio_and_no_further_runs() -> None:
    known = Known(_questions(3000), {})
    blind: Callable[[Run], Answers] = lambda run: known.ask(Run(NO_IMAGE, run.kept))  # noqa: E731
    result = analyse(known.questions, Setting(("mmr", "random")), TOKENS, "mmr", blind)
    assert result["verdict"] == analysis.IMAGE_NOT_USED
    assert result["k_star"] is result["random_k_star"] is result["redundancy"] is None
    assert result["curves"] == {}
    assert len(known.asked) == 3


def test_a_model_that_knows_another_picture_as_well_is_blind_too() -> None:
    known = Known(_questions(3000), {})

    def ask(run: Run) -> Answers:
        return known.ask(Run(FULL, TOKENS) if run.selector == SHUFFLED else run)

    result = analyse(known.questions, Setting(("mmr",)), TOKENS, "mmr", ask)
    assert result["verdict"] == analysis.IMAGE_NOT_USED
    assert "25.00% without, 100.00% with another one" in result["message"]


def test_a_dip_above_counts_against_what_passes_below() -> None:
    known = Known(_questions(3000), _needs(mmr=1))

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
    result, _ = _analyse(_needs(mmr=0), n=100)
    assert (result["verdict"], result["k_star"]) == (analysis.TOO_FEW_QUESTIONS, TOKENS)
    assert "100 questions were asked; a tolerance of 1 point needs about 1,353" in result["message"]
    result, _ = _analyse(_needs(mmr=1), n=100, tolerance=0.05)
    assert result["k_star"] == 11


def test_a_kind_with_few_questions_has_the_tolerance_that_they_resolve() -> None:
    result, _ = _analyse(_needs(mmr=1), n=1400)
    kinds = result["modes"]["mmr"]["kinds"]
    expected = 1.6448536 * math.sqrt(0.05 / 700)
    assert kinds["color"]["tolerance"] == pytest.approx(expected)
    assert result["modes"]["mmr"]["tolerance"] == 0.01
    assert {kind: of["k_star"] for kind, of in kinds.items()} == NEEDS


def test_a_kind_of_question_that_the_picture_does_not_help_has_no_k_star() -> None:
    known = Known(_questions(3000), _needs(mmr=1, random=2))

    def ask(run: Run) -> Answers:
        """Colours are guessed, whatever the picture."""
        whole, guessed = known.ask(run).texts, known.ask(Run(NO_IMAGE, 0)).texts
        kinds = [item.kind for item in known.questions.items]
        texts = (
            g if kind == "color" else w for w, g, kind in zip(whole, guessed, kinds, strict=True)
        )
        return Answers(tuple(texts), run.kept + 9.0, 0.1)

    setting = Setting(("mmr", RANDOM), seeds=1)
    result = analyse(known.questions, setting, TOKENS, "mmr", ask)
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
    report = _report(result, "two_bit")
    (row, _) = pages.needs([report]).rows
    assert row[-2:] == ["-", "11"]
    assert "Margins are" in pages.markdown([report], None)
    pytest.importorskip("matplotlib")
    assert Image.open(io.BytesIO(plot.png([report]))).width > 1000


def test_a_kind_of_question_on_one_picture_has_no_k_star() -> None:
    questions = _questions(3000)
    on_one = np.where(np.arange(3000) % 2, np.arange(3000), 0)
    known = Known(replace(questions, picture_of=on_one), _needs(mmr=1))
    result = analyse(known.questions, Setting(("mmr",)), TOKENS, "mmr", known.ask)
    assert result["kinds"]["color"]["gain_low"] == -1
    kinds = result["modes"]["mmr"]["kinds"]
    assert (kinds["color"]["k_star"], kinds["shape"]["k_star"]) == (None, 11)


def test_random_counts_as_the_mean_over_its_seeds() -> None:
    known = Known(_questions(3000), _needs(random=1))

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
    known = Known(_questions(10), _needs(mmr=1))
    with pytest.raises(RequestError, match="--tokens 64 is not below the 64 tokens"):
        analyse(known.questions, Setting(("mmr",), also=(64,)), TOKENS, "mmr", known.ask)
    assert known.asked == []


def _report(result: dict[str, Any], name: str) -> dict[str, Any]:
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


def _two_reports() -> list[dict[str, Any]]:
    costs = {
        kept: Cost(1.0 + kept, 1024 * kept, kept + 9) for kept in (64, 32, 16, 8, 7, 4, 2, 1, 0)
    }
    reports = []
    for name, times in (("two_bit", 1), ("float", 2)):
        known = Known(_questions(3000), _needs(mmr=times, random=3))
        setting = Setting(("mmr", RANDOM), seeds=2)
        result = analyse(
            known.questions, setting, TOKENS, "mmr", known.ask, lambda numbers: {
                number: costs[number] for number in numbers
            },
        )  # fmt: skip
        reports.append(_report(result, name))
    delta = reports[0]["redundancy"] - reports[1]["redundancy"]
    reports[1].update(delta_redundancy=delta, delta_by_mode={"mmr": delta, RANDOM: 0.0})
    return reports


def test_the_page_says_what_was_found() -> None:
    page = pages.markdown(_two_reports(), "redundancy.png")
    assert "**two_bit: REDUNDANT.** mmr with 11 of 64 image tokens loses no more than" in page
    assert "minus that of float, in points (tokens needed of 64): mmr +17.19 (11 against" in page
    assert "![accuracy against kept image tokens](redundancy.png)" in page
    assert "| two_bit | mmr | 11 | 82.8% | 3.00 | 11 / 11 / 11 |" in page
    assert "| float | no image token | 25.00% (23.48%-26.58%) | 25.00% | 25.00% |" in page
    assert "| two_bit | 8 | 17 | 9.00 | 8,192 B |" in page
    assert "## two_bit: question tokens dropped in the same shares, at random" in page
    assert "## two_bit: question tokens dropped in the same shares, commonest first" in page


def test_csv_holds_every_point_of_every_model() -> None:
    reports = _two_reports()
    rows = list(csv.DictReader(io.StringIO(pages.csv_text(reports))))
    curves = [
        curve
        for report in reports
        for curve in (
            *report["curves"].values(),
            report["question_tokens"],
            report["rarest_question_tokens"],
        )
    ]
    assert len(rows) == sum(map(len, curves))
    of_float = {r["kept"]: r for r in rows if (r["model"], r["selector"]) == ("float", "mmr")}
    row = of_float["16"]
    assert (float(row["accuracy"]), row["passes"]) == (0.625, "0")
    assert (row["prefill_ms"], row["kv_bytes"]) == ("17.0", "16384")
    assert float(row["accuracy_color"]) == 1
    assert float(of_float["8"]["minus_random"]) == 0.375
    assert row["minus_uniform"] == ""
    of_rarest = {r["kept"]: r for r in rows if r["selector"] == RARE_TEXT}
    assert (of_rarest["8"]["accuracy"], of_rarest["16"]["accuracy"]) == ("0.25", "1.0")


def test_no_curve_is_under_a_legend_and_no_text_on_another() -> None:
    pytest.importorskip("matplotlib")
    known = Known(_questions(300), _needs(mmr=1, random=3, uniform=2, maxmin=1.5))
    setting = Setting(("mmr", RANDOM, "uniform", "maxmin"), seeds=1, tolerance=0.1)
    reports = []
    for tokens in (256, 64):
        result = analyse(
            known.questions, setting, tokens, "mmr", known.ask,
            lambda numbers: {number: Cost(1.0 + number, number, number) for number in numbers},
        )  # fmt: skip
        reports.append(_report(result, f"of {tokens}"))
    figure = plot._figure(reports)
    figure.draw_without_rendering()
    panels = figure.get_axes()
    assert len(panels) == 2 * (3 + 1 + 2)  # a second scale for the cache
    legends = [axes.get_legend() for axes in panels if axes.get_legend() is not None]
    assert len(legends) == 2 * (2 + 2)
    for box in (legend.get_window_extent() for legend in legends):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(axes.get_window_extent()) for axes in panels)
    for axes in (axes for axes in panels if axes.xaxis.get_visible()):
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    texts = [label.get_text() for label in panels[0].get_xticklabels()]
    assert texts == ["0\n100%", "256\n0%", "64\n75%", "16\n93.8%", "4\n98.4%", "1\n99.6%"]


@pytest.mark.parametrize(
    ("kept", "tokens", "text"),
    [(0, 64, "100%"), (1, 64, "98.4%"), (1, 4096, ">99.9%"), (32, 64, "50%"), (64, 64, "0%")],
)
def test_all_is_pruned_where_no_token_is_kept_alone(kept: int, tokens: int, text: str) -> None:
    assert plot._pruned(kept, tokens) == text


def test_the_picture_can_be_drawn_with_and_without_curves() -> None:
    pytest.importorskip("matplotlib")
    reports = _two_reports()
    drawn = Image.open(io.BytesIO(plot.png(reports)))
    assert drawn.width > 1000
    assert drawn.height > drawn.width  # a row for each model
    many = [f"kind {number}" for number in range(6)]
    for report in reports:
        report["kinds"] = dict.fromkeys(many, report["kinds"]["color"])
        for mode in report["modes"].values():
            mode["kinds"] = dict.fromkeys(many, mode["kinds"]["color"])
        for curve in report["curves"].values():
            for point in curve:
                point["kinds"] = dict.fromkeys(many, 0.5)
    assert Image.open(io.BytesIO(plot.png(reports))).height > drawn.height
    known = Known(_questions(300), {})
    blind = analyse(
        known.questions, Setting(("mmr",)), TOKENS, "mmr",
        lambda run: known.ask(Run(NO_IMAGE, run.kept)),
    )  # fmt: skip
    report = _report(blind, "blind")
    assert np.asarray(Image.open(io.BytesIO(plot.png([report])))).std() > 5
    page = pages.markdown([report], None)
    assert "**blind: IMAGE_NOT_USED.** The model does not use the image" in page
    assert pages.csv_text([report]).count("\n") == 1
