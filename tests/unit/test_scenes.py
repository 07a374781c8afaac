"""The generated data set: the same bytes anywhere, one answer per question, nothing to guess."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from bivlm_edge import datasets, scenes
from bivlm_edge.datasets import DrawnScene, load_questions, load_scenes
from bivlm_edge.errors import DataError
from bivlm_edge.scenes import COLORS, MARKS, SHAPES, Scene, Thing

Question = tuple[str, str, str]
NAME = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
GROUP = rf"(?:({'|'.join(COLORS)}) shapes|({'|'.join(SHAPES)})(?:es|s))"


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[Question]]]:
    """The validation split; the test split follows the same rules and is left alone."""
    described = [scenes.describe("validation", index) for index in range(500)]
    return [(scene, scenes.questions(scene)) for scene in described]


def test_pictures_and_questions_have_the_recorded_bytes() -> None:
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for index in range(4):
            scene = scenes.describe(split, index)
            digest.update(scenes.draw(scene).tobytes())
            digest.update(json.dumps(scenes.questions(scene)).encode())
    assert digest.hexdigest() == "20bc54f9e0a67f86a7150c9998424fd64e4427a94c9df6e90f04770a9dc0bdd9"


def test_draws_are_those_of_shake_128() -> None:
    word = int.from_bytes(hashlib.shake_128(b"name/0").digest(8), "little")
    assert scenes.Draws("name").integer(3, 12) == 3 + word % 10
    draws = scenes.Draws("name")
    assert len({draws.integer(0, 2**62) for _ in range(1000)}) == 1000  # blocks do not repeat


def test_no_picture_is_in_two_splits() -> None:
    things = [
        scenes.describe(split, index).things for split in scenes.PICTURES for index in range(300)
    ]
    assert len(set(things)) == len(things)


def test_things_lie_apart_inside_the_picture(asked: list[tuple[Scene, list[Question]]]) -> None:
    for scene, _ in asked:
        assert 2 <= len(scene.things) <= 6
        for number, one in enumerate(scene.things):
            assert min(one.x, one.y) - one.radius > 0
            assert max(one.x, one.y) + one.radius < scenes.IMAGE_SIZE - 1
            for other in scene.things[:number]:
                gap = max(abs(one.x - other.x), abs(one.y - other.y)) - one.radius - other.radius
                assert gap > 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", scenes.RADII)
def test_a_thing_covers_its_extent_and_nothing_else(shape: str, radius: int) -> None:
    thing = Thing(shape, "red", "none", radius, 60, 70)
    rows, columns = np.nonzero(scenes.owners(Scene("validation", 0, (thing,), shape, "red")) == 0)
    extents = (60 - columns.min(), columns.max() - 60, 70 - rows.min(), rows.max() - 70)
    assert max(extents) <= radius
    assert min(extents) >= (0.75 * radius if shape != "star" else 0.65 * radius)  # thin tips
    assert (70, 60) in set(zip(rows.tolist(), columns.tolist(), strict=True))


def test_a_picture_shows_each_color_and_mark_where_its_thing_is() -> None:
    for index in range(40):
        scene = scenes.describe("validation", index)
        picture = scenes.draw(scene).astype(int)
        owner = scenes.owners(scene)
        assert picture.shape == (128, 128, 3)
        for number, thing in enumerate(scene.things):
            inside = owner == number
            marked = np.zeros_like(inside)
            marked[thing.y - 2 : thing.y + 3, thing.x - 3 : thing.x + 4] = True
            mean = picture[inside & ~marked].mean(axis=0)
            nearest = min(COLORS, key=lambda name: np.abs(mean - scenes.RGB[name]).sum())
            assert nearest == thing.color
            contrast = np.abs(picture[thing.y, thing.x] - mean).max()
            assert (contrast > 100) == (thing.mark != "none"), (index, thing)


def test_marks_have_their_documented_sizes() -> None:
    def ink(mark: str) -> NDArray[np.bool_]:
        plain, marked = (
            scenes.draw(Scene("validation", 0, (Thing("square", "red", m, 18, 60, 60),), "", ""))
            for m in ("none", mark)
        )
        return np.asarray(np.abs(plain.astype(int) - marked).max(axis=-1) > 100)

    rows, columns = np.nonzero(ink("bar"))
    assert np.ptp(columns) + 1 == 5
    assert np.ptp(rows) + 1 <= 3
    rows, columns = np.nonzero(ink("dot"))
    assert np.ptp(columns) == np.ptp(rows)
    assert 3 <= np.ptp(rows) + 1 <= 5


def the(scene: Scene, color: str | None, shape: str | None) -> Thing:
    """The one thing that a description fits; another number of them fails."""
    (thing,) = [
        thing
        for thing in scene.things
        if color in (None, thing.color) and shape in (None, thing.shape)
    ]
    return thing


def count(scene: Scene, color: str | None, shape: str | None) -> int:
    return sum(
        color in (None, thing.color) and shape in (None, thing.shape) for thing in scene.things
    )


def solve(scene: Scene, question: str) -> str:
    """The answer worked out from the description and the words alone, margins checked."""
    if found := re.fullmatch(rf"is there an? {NAME}\?", question):
        return "yes" if count(scene, *found.groups()) else "no"
    if found := re.fullmatch(rf"how many {GROUP} are there\?", question):
        return str(count(scene, *found.groups()))
    if found := re.fullmatch(r"what color is the (\w+)\?", question):
        return the(scene, None, found[1]).color
    if found := re.fullmatch(rf"what is the ({'|'.join(COLORS)}) shape\?", question):
        return the(scene, found[1], None).shape
    if found := re.fullmatch(rf"what mark has the {NAME}\?", question):
        return the(scene, found[1], found[2]).mark
    if found := re.fullmatch(
        rf"is the {NAME} (left of|right of|above|below) the {NAME}\?", question
    ):
        one, other = the(scene, found[1], found[2]), the(scene, found[4], found[5])
        right, down = one.x - other.x, one.y - other.y
        distance = {"left of": -right, "right of": right, "above": -down, "below": down}[found[3]]
        assert abs(distance) >= 12
        return "yes" if distance > 0 else "no"
    if found := re.fullmatch(r"what color is nearest to the (\w+)\?", question):
        thing = the(scene, None, found[1])
        others = [other for other in scene.things if other is not thing]
        near = {other: math.hypot(other.x - thing.x, other.y - thing.y) for other in others}
        first, *rest = sorted(others, key=near.__getitem__)
        assert not rest or near[rest[0]] >= 1.25 * near[first]
        return first.color
    if found := re.fullmatch(rf"are there (more|fewer) {GROUP} than {GROUP}\?", question):
        difference = count(scene, *found.groups()[1:3]) - count(scene, *found.groups()[3:5])
        assert difference
        return "yes" if (difference > 0) == (found[1] == "more") else "no"
    if found := re.fullmatch(rf"is the {NAME} (larger|smaller) than the {NAME}\?", question):
        one, other = the(scene, found[1], found[2]), the(scene, found[4], found[5])
        assert abs(one.radius - other.radius) >= 3
        return "yes" if (one.radius > other.radius) == (found[3] == "larger") else "no"
    found = re.fullmatch(r"what (color )?is the (largest|smallest) shape\?", question)
    assert found is not None, question
    ranked = sorted(scene.things, key=lambda thing: thing.radius, reverse=found[2] == "largest")
    assert abs(ranked[0].radius - ranked[1].radius) >= 3
    return ranked[0].color if found[1] else ranked[0].shape


def test_every_answer_follows_from_what_is_in_the_picture(
    asked: list[tuple[Scene, list[Question]]],
) -> None:
    seen: Counter[str] = Counter()
    for index, (scene, questions) in enumerate(asked):
        for kind, question, answer in questions + scenes.questions(scene, times=4):
            assert solve(scene, question) == answer, (index, question)
            seen[kind] += 1
    assert seen.keys() == set(scenes.KINDS)


def test_each_question_is_asked_once_per_picture(asked: list[tuple[Scene, list[Question]]]) -> None:
    for scene, _ in asked[:50]:
        texts = [question for _, question, _ in scenes.questions(scene, times=4)]
        assert len(set(texts)) == len(texts)


CHANCE = {
    "exists": 1 / 2,
    "count": 1 / 5,
    "color": 1 / 8,
    "shape": 1 / 6,
    "mark": 1 / 3,
    "relation": 1 / 2,
    "nearest": 1 / 8,
    "more": 1 / 2,
    "larger": 1 / 2,
    "largest": (1 / 8 + 1 / 6) / 2,
}


def test_the_words_of_a_question_hardly_tell_its_answer(
    asked: list[tuple[Scene, list[Question]]],
) -> None:
    learned: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(2000):
        for kind, question, answer in scenes.questions(scenes.describe("train", index), times=2):
            learned[question][answer] += 1
            learned[kind][answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for _, questions in asked:
        for kind, question, answer in questions:
            [(guess, _)] = (learned.get(question) or learned[kind]).most_common(1)
            right[kind].append(guess == answer)
    assert right.keys() == CHANCE.keys()
    for kind, hits in right.items():
        chance = CHANCE[kind]
        spread = math.sqrt(chance * (1 - chance) / len(hits))
        assert abs(np.mean(hits) - chance) < 4 * spread, (kind, np.mean(hits))


def test_answers_are_as_often_one_as_another(asked: list[tuple[Scene, list[Question]]]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in asked:
        for kind, _, answer in questions:
            part = "shape" if answer in SHAPES and kind == "largest" else ""
            answers[kind + part][answer] += 1
    for kind, counts in answers.items():
        share, total = 1 / len(counts), counts.total()
        spread = math.sqrt(total * share * (1 - share))
        assert max(counts.values()) - total * share < 4 * spread, (kind, counts)
        assert total * share - min(counts.values()) < 4 * spread, (kind, counts)
    assert answers["mark"].keys() == set(MARKS)
    assert answers["count"].keys() == set("01234")


def test_loaded_split_has_thousands_of_questions_on_drawn_pictures() -> None:
    items = load_scenes("validation")
    assert 3500 <= len(items) <= 5000
    assert {item.kind for item in items} == set(scenes.KINDS)
    assert len({item.image for item in items}) == 500
    item = items[-1]
    assert item.image == DrawnScene("validation", 499)
    picture = item.image.open()
    assert (picture.mode, picture.size) == ("RGB", (128, 128))
    expected = scenes.draw(scenes.describe("validation", 499))
    np.testing.assert_array_equal(np.asarray(picture), expected)
    yes_no = {item.kind for item in items if item.answer in ("yes", "no")}
    assert yes_no == set(scenes.KINDS) - datasets.OPEN_ENDED_KINDS


def test_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"scenes has no split 'dev'\. Use 'train' or 'validation'"):
        load_questions("scenes", "dev")
