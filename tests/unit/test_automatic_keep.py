"""`--keep-tokens auto`: which number of tokens is chosen, and by which questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.config import PruneConfig
from bivlm_edge.datasets import ImageSource, VqaItem, load_easy_vqa, load_scenes
from bivlm_edge.errors import RequestError
from bivlm_edge.pruning import KeepChoice, parse_fraction, tokens_to_keep
from bivlm_edge.redundancy.analysis import (
    ALL_TOKENS_NEEDED,
    IMAGE_NOT_USED,
    REDUNDANT,
    TOO_FEW_QUESTIONS,
)
from bivlm_edge.redundancy.answering import Answers
from bivlm_edge.redundancy.automatic import choose, validation_questions
from bivlm_edge.redundancy.plan import FULL, NO_IMAGE, SHUFFLED, Run
from bivlm_edge.redundancy.questions import Questions
from bivlm_edge.report import to_json

TOKENS = 64


def chosen(
    needs: int, *, n: int = 3000, blind: bool = False, tolerance: float = 1.0
) -> tuple[KeepChoice, list[Run]]:
    """Choose for a model that needs so many tokens; below them it is right every fourth time."""
    items = tuple(
        VqaItem(ImageSource(Path(f"{number}.png")), "what?", "red", "color") for number in range(n)
    )
    questions = Questions(items, tuple(item.image for item in items), np.arange(n), "digest")
    asked: list[Run] = []

    def ask(run: Run) -> Answers:
        asked.append(run)
        sees = run.selector == FULL or (run.kept >= needs and run.selector != SHUFFLED)
        right = [(sees and not blind) or number % 4 == 0 for number in range(n)]
        return Answers(tuple("red" if is_right else "blue" for is_right in right), run.kept, 0.1)

    return choose(questions, tolerance, TOKENS, "mmr", ask, seed=0), asked


@pytest.mark.parametrize("needs", [1, 2, 11, 33, 63])
def test_the_fewest_tokens_that_lose_nothing_are_kept(needs: int) -> None:
    choice, asked = chosen(needs)
    assert choice.kept == needs
    assert choice.account["verdict"] == REDUNDANT
    assert f"keeps {needs} of 64" in choice.account["message"]
    assert tokens_to_keep(choice.account["keep_ratio"], TOKENS) == needs
    assert len(asked) == len(set(asked))
    # nothing is asked below the first of the halves that fails, but what the gap is halved by
    halves = [run.kept for run in asked if run.selector == "mmr" and TOKENS % max(1, run.kept) == 0]
    assert sum(kept < needs for kept in halves) <= 1
    json.loads(to_json(choice.account))


def test_no_ratio_passes() -> None:
    choice, _ = chosen(TOKENS)
    assert (choice.kept, choice.account["verdict"]) == (TOKENS, ALL_TOKENS_NEEDED)
    assert "No ratio below 1 passes: with 63 of 64" in choice.account["message"]
    assert choice.account["message"].endswith("All are kept.")


def test_too_few_questions_keep_all() -> None:
    choice, _ = chosen(4, n=100)
    assert (choice.kept, choice.account["verdict"]) == (TOKENS, TOO_FEW_QUESTIONS)
    assert "100 questions were asked; a tolerance of 1 point needs" in choice.account["message"]


def test_an_image_without_gain_keeps_all_and_asks_no_further() -> None:
    choice, asked = chosen(4, blind=True)
    assert (choice.kept, choice.account["verdict"]) == (TOKENS, IMAGE_NOT_USED)
    assert {run.selector for run in asked} == {FULL, NO_IMAGE, SHUFFLED}
    assert "does not use the image" in choice.account["message"]
    assert choice.account["message"].endswith("All 64 image tokens are kept.")


def test_a_gain_below_the_tolerance_keeps_one_token_and_is_told() -> None:
    choice, _ = chosen(4, tolerance=90.0)
    assert choice.kept == 1
    assert "The picture itself adds only 75.00 points" in choice.account["message"]


def items_on_pictures(folder: Path, count: int) -> list[VqaItem]:
    found = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        found += [VqaItem(ImageSource(path), f"what {i}", "it", "other") for i in range(2)]
    return found


def test_pictures_that_calibrated_are_not_asked_about(tmp_path: Path) -> None:
    items = items_on_pictures(tmp_path, 6)
    name, asked = validation_questions(None, None, items, items[:3], tolerance=1.0, limit=None)
    assert name == "the calibration data"
    assert asked.items == tuple(items[4:])
    _, some = validation_questions(None, None, items, items[:3], tolerance=1.0, limit=4)
    assert len(some.items) == 4


@pytest.mark.parametrize("known", [True, False])
def test_without_questions_nothing_is_chosen(known: bool, tmp_path: Path) -> None:
    items = items_on_pictures(tmp_path, 2)
    if not known:
        items = [VqaItem(item.image, item.question, "", "other") for item in items]
    lacks = "whose pictures were not calibrated on" if known else "with known answers"
    with pytest.raises(RequestError, match=rf"auto needs questions {lacks}.*Add --validation"):
        validation_questions(None, None, items, items, tolerance=1.0, limit=None)


def test_named_data_are_asked_from_their_validation_split() -> None:
    held_out = load_easy_vqa("validation")
    assert len(held_out) == 4830
    assert len({item.image for item in held_out}) == 500
    assert set(held_out) < set(load_easy_vqa("train"))
    name, asked = validation_questions("scenes", None, [], [], tolerance=1.0, limit=20)
    assert name == "scenes, validation"
    assert set(asked.items) < set(load_scenes("validation"))


def test_fraction_or_auto() -> None:
    assert parse_fraction("0.25") == 0.25
    assert parse_fraction("auto") is None
    for text, message in (
        ("some", "'some' is neither a fraction in"),
        ("nan", "nan is not a fraction"),
        ("0", "--keep-tokens 0 is not a fraction"),
    ):
        with pytest.raises(RequestError, match=message):
            parse_fraction(text)


@pytest.mark.parametrize("tolerance", [0.0, 100.0, float("nan"), -1.0])
def test_tolerances_outside_0_to_100_are_refused(tolerance: float) -> None:
    with pytest.raises(RequestError, match=r"--tolerance .* is not between 0 and 100 points"):
        PruneConfig(tolerance=tolerance)
