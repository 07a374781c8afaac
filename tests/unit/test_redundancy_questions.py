"""Which questions are asked, and the controls made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.datasets import ImageSource, VqaItem
from bivlm_edge.errors import DataError, RequestError
from bivlm_edge.redundancy import questions
from bivlm_edge.redundancy.plan import Run, Setting, grid


def _items(folder: Path, pictures: int, each: int) -> list[VqaItem]:
    found = []
    for number in range(pictures):
        path = folder / f"{number}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        kinds = ("color", "yes_no")
        found += [
            VqaItem(ImageSource(path), f"q{index}", "yes", kinds[index % 2])
            for index in range(each)
        ]
    return found


def test_a_limit_takes_whole_pictures_from_all_over_the_data(tmp_path: Path) -> None:
    items = _items(tmp_path, 10, 4)
    for limit in (1, 7, 8, 39):
        assert len(questions.spread(items, limit)) == limit
    names = [item.image.path.stem for item in questions.spread(items, 8)]
    assert names == ["2"] * 4 + ["7"] * 4
    assert questions.spread(items, None) == questions.spread(items, 40) == items


def test_a_limit_is_reached_where_pictures_have_few_questions(tmp_path: Path) -> None:
    few, many = _items(tmp_path, 4, 1), _items(tmp_path, 1, 9)
    items = [*many, *few[1:]]
    for limit in range(1, len(items)):
        found = questions.spread(items, limit)
        assert len(found) == len(set(map(id, found))) == limit


def test_the_same_pixels_are_one_picture(tmp_path: Path) -> None:
    items = _items(tmp_path, 3, 2)
    copy = tmp_path / "copy.bmp"
    Image.open(tmp_path / "1.png").save(copy)
    items.append(VqaItem(ImageSource(copy), "q", "no", "yes_no"))
    seen: list[int] = []
    found = questions.gather(items, seen.append)
    assert found.picture_of.tolist() == [0, 0, 1, 1, 2, 2, 1]
    assert [source.path.name for source in found.pictures] == ["0.png", "1.png", "2.png"]
    assert {kind: of.tolist() for kind, of in found.kinds.items()} == {
        "color": [0, 2, 4],
        "yes_no": [1, 3, 5, 6],
    }
    assert seen == list(range(1, 8))
    assert found.digest != questions.gather(items[:-1]).digest
    assert found.correct(["yes", " YES ", "no", "", "yes", "no", "No"]).tolist() == [
        1, 1, 0, 0, 1, 0, 1,
    ]  # fmt: skip


def test_questions_about_one_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the 3 questions are about 1 picture"):
        questions.gather(_items(tmp_path, 1, 3))


@pytest.mark.parametrize("count", [2, 3, 50])
def test_every_picture_is_replaced_by_another_one(count: int) -> None:
    for seed in range(5):
        partner = questions.derangement(count, seed)
        assert sorted(partner.tolist()) == list(range(count))
        assert (partner != np.arange(count)).all()
    assert (questions.derangement(50, 0) != questions.derangement(50, 1)).any()


def test_the_most_frequent_answer_of_the_question_and_else_of_all(tmp_path: Path) -> None:
    source = ImageSource(tmp_path)

    def item(question: str, answer: str) -> VqaItem:
        return VqaItem(source, question, answer, "other")

    train = [item("a", "x"), item("a", "y"), item("A ", "Y"), item("b", "x"), item("b", "x")]
    asked = [item("a", "?"), item("b", "?"), item("new", "?")]
    assert questions.question_only(asked, train) == ["y", "x", "x"]


def test_question_tokens_that_stay_are_more_for_a_larger_share() -> None:
    kept = [set(questions.kept_of_question(8, share, 0, 5).tolist()) for share in (0, 0.1, 0.5, 1)]
    assert [len(tokens) for tokens in kept] == [0, 1, 4, 8]
    assert kept[1] < kept[2] < kept[3]
    others = [questions.kept_of_question(8, 0.5, 0, number).tolist() for number in range(9)]
    assert len(set(map(tuple, others))) > 3


def test_of_a_question_the_rarest_tokens_stay() -> None:
    asked = [np.array(ids) for ids in ([7, 1, 2, 9], [7, 1, 3, 9], [7, 4, 3, 9], [7, 7, 5, 9])]
    frequencies = questions.token_frequencies(asked)
    assert frequencies == {7: 4, 9: 4, 1: 2, 3: 2, 2: 1, 4: 1, 5: 1}

    def kept(share: float) -> list[list[int]]:
        return [questions.rarest_of_question(q, share, frequencies).tolist() for q in asked]

    assert kept(0) == [[], [], [], []]
    assert kept(0.25) == [[2], [1], [1], [2]]
    assert kept(0.5) == [[1, 2], [1, 2], [1, 2], [0, 2]]
    assert kept(0.51) == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert kept(1) == [[0, 1, 2, 3]] * 4


def test_the_grid_halves_down_to_nothing() -> None:
    assert grid(64) == [64, 32, 16, 8, 4, 2, 1, 0]
    assert grid(730, (7, 5))[-6:] == [11, 7, 5, 2, 1, 0]
    assert grid(1) == [1, 0]
    for wrong in (64, 100, -1):
        with pytest.raises(RequestError, match=f"--tokens {wrong} is not below the 64 tokens"):
            grid(64, (wrong,))


def test_a_search_has_a_tenth_of_the_tokens() -> None:
    assert Setting(("mmr",)).grid(256)[4:6] == [26, 16]
    assert Setting(("mmr",)).grid(30) == [30, 15, 7, 3, 1, 0]
    assert Setting(("mmr",)).grid(1) == [1, 0]
    assert Setting(("mmr",), also=(9,), searches=False).grid(256) == [256, 9, 0]


def test_random_has_a_run_for_each_seed_and_the_others_one() -> None:
    setting = Setting(("mmr", "random"), seeds=3, seed=7)
    assert setting.runs("random", 8) == [Run("random", 8, seed) for seed in (7, 8, 9)]
    assert setting.runs("mmr", 8) == [Run("mmr", 8)]
    assert Run("mmr", 8).name == "mmr 8"
    assert Run("shuffled", 8, 2).name == "shuffled 8 seed 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ("mmr", "best")}, "--modes 'best' is not known. Accepted: mmr"),
        ({"modes": ()}, "--modes names none of mmr"),
        ({"modes": ("mmr",), "seeds": 0}, "--seeds 0"),
        ({"modes": ("mmr",), "tolerance": 0.0}, "--tolerance 0 is not between 0 and 100"),
        ({"modes": ("mmr",), "tolerance": 1.0}, "--tolerance 100 is not between"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Setting(**arguments)  # type: ignore[arg-type]
