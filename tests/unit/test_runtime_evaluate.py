"""Accuracy on a model whose answers are known, and the interval against known values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bivlm_edge.datasets import ImageSource, VqaItem, load_jsonl
from bivlm_edge.errors import DataError, RequestError
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.evaluate import Score, evaluate

QUESTIONS = ("what color?", "which shape", "is it red?", "hm", "and now")


def _items(bundle: Any, folder: Path) -> list[VqaItem]:
    """Questions on two pictures with the model's own answers, in odd case and spacing."""
    answerer = Answerer(load(bundle.graph))
    items = []
    for number, red in enumerate((1, 9)):
        path = folder / f"{number}.png"
        Image.new("RGB", (4, 4), (red, 0, 0)).save(path)
        picture = answerer.picture(path)
        for index, question in enumerate(QUESTIONS):
            ids = [int(i) for i in answerer.prompts.encode(question, picture)]
            answer = answerer.prompts.decode(bundle.answer(ids, 16 * red, 12))
            kind = ("color", "shape", "yes_no", "other", "other")[index]
            items.append(VqaItem(ImageSource(path), question, f" {answer.upper()}\n", kind))
    return items


def test_all_right_in_any_case_and_spacing(bundle: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    result = evaluate(
        Answerer(load(bundle.graph)), _items(bundle, tmp_path), on_progress=seen.append
    )
    assert (result.overall.n, result.overall.correct) == (10, 10)
    assert result.open_ended is not None
    assert (result.open_ended.n, result.open_ended.correct) == (4, 4)
    assert {kind: score.n for kind, score in result.per_kind.items()} == {
        "color": 2, "other": 4, "shape": 2, "yes_no": 2,
    }  # fmt: skip
    assert seen == list(range(1, 11))


def test_a_wrong_answer_counts_where_it_belongs(bundle: Any, tmp_path: Path) -> None:
    items = _items(bundle, tmp_path)
    items[0] = VqaItem(items[0].image, items[0].question, "nonsense", "color")
    result = evaluate(Answerer(load(bundle.graph)), items)
    assert result.overall.correct == 9
    assert result.open_ended is not None
    assert result.open_ended.correct == 3
    assert result.per_kind["color"].accuracy == 0.5
    assert result.per_kind["shape"].accuracy == 1.0


def test_no_open_ended_questions_and_no_questions(bundle: Any, tmp_path: Path) -> None:
    items = [item for item in _items(bundle, tmp_path) if not item.is_open_ended]
    answerer = Answerer(load(bundle.graph))
    assert evaluate(answerer, items).open_ended is None
    with pytest.raises(RequestError, match="no questions"):
        evaluate(answerer, [])


def test_pruning_shows_in_the_mean_tokens(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(prunes=True)
    result = evaluate(Answerer(load(bundle.graph)), _items(bundle, tmp_path))
    assert result.overall.accuracy == 1.0
    assert result.prompt_tokens - result.kept_tokens == 3.0


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # 81/263: R. G. Newcombe, 1998, table I; 0/10: z^2 / (n + z^2); 5/10: 1/2 -+ z / 2 sqrt(n + z^2)
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    score = Score.of(correct, n)
    assert score.accuracy == correct / n
    assert (round(score.low, 4), round(score.high, 4)) == (low, high)
    assert (score.low == 0.0, score.high == 1.0) == (correct == 0, correct == n)


def test_jsonl_that_names_a_file_which_is_no_picture(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text", encoding="utf-8")
    row = {"image": "a.png", "question": "q", "answer": "a"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.png"):
        evaluate(Answerer(load(bundle.graph)), load_jsonl(tmp_path / "q.jsonl"))
