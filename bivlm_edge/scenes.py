"""The data set "scenes": drawn pictures of two to six shapes, and questions with one answer each.

Everything follows from the name of a split and an index: random numbers come out of SHAKE-128 and
pictures out of integer arithmetic, so every machine draws the same bytes. Splits have no picture in
common and no end. Answers are balanced: the text of a question tells nothing about its answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import isqrt
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 128
RGB = {
    "black": (24, 24, 24),
    "blue": (48, 80, 220),
    "green": (40, 168, 60),
    "orange": (240, 136, 28),
    "purple": (150, 56, 190),
    "red": (214, 40, 40),
    "white": (236, 236, 236),
    "yellow": (236, 214, 48),
}
COLORS = tuple(RGB)
SHAPES = ("circle", "cross", "diamond", "square", "star", "triangle")
MARKS = ("bar", "dot", "none")
RADII = (9, 12, 15, 18)
MAX_THINGS = 6
MAX_COUNTED = 4

PICTURES = {"train": 2000, "validation": 500, "test": 500}  # of the endless splits, those loaded

# What two things must differ by where a question compares them.
SIDE_MARGIN = 12  # pixels between centers, for left, right, above and below
NEAR_MARGIN = (5, 4)  # distances of the second nearest and the nearest center
_GAP = 3  # pixels between the boxes of two things

_WHITE_MARKS = frozenset({"black", "blue", "green", "purple", "red"})
_JITTER = 10
_NOISE = 10
_PATCHES = 14  # amplitude of the background's patches
_PATCH_PITCH = 16
_SUBSAMPLES = 4  # per pixel and axis
_EIGHTHS = 8  # shapes are tested in eighths of a pixel, so that subsamples are integers
_STAR_TIPS = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))
_STAR_WAIST = 309  # cos 72 deg: distance of a pentagram's lines from its center, in thousandths

Item = TypeVar("Item")
Integers = NDArray[np.int64]


class Draws:
    """Uniform random integers out of SHAKE-128, the same for the same name anywhere."""

    def __init__(self, name: str) -> None:
        self._words = self._endless(name)

    @staticmethod
    def _endless(name: str) -> Iterator[int]:
        block = 0
        while True:
            raw = hashlib.shake_128(f"{name}/{block}".encode()).digest(1024)
            yield from (int.from_bytes(raw[at : at + 8], "little") for at in range(0, 1024, 8))
            block += 1

    def integer(self, low: int, high: int) -> int:
        """One of low..high, both included; their probabilities differ by less than 1e-15."""
        return low + next(self._words) % (high - low + 1)

    def choice(self, items: Sequence[Item]) -> Item:
        """One of at least one item."""
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.integer(0, last)
            order[last], order[other] = order[other], order[last]
        return order


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape of a picture.

    Attributes:
        shape: One of SHAPES.
        color: One of COLORS.
        mark: One of MARKS: a bar of 5x2 or a dot of 4x4 pixels at the center, or "none".
        radius: Half of its extent in pixels, one of RADII.
        x: Column of its center.
        y: Row of its center.
    """

    shape: str
    color: str
    mark: str
    radius: int
    x: int
    y: int

    @property
    def name(self) -> str:
        """As questions name it: "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture.

    Attributes:
        split: Name of the split.
        index: Number of the picture in the split.
        things: Two to six things; none hides a part of another.
        counted_shape: A shape that 0 to 4 of the things have, each number as often.
        counted_color: The same for a color.
    """

    split: str
    index: int
    things: tuple[Thing, ...]
    counted_shape: str
    counted_color: str

    def __str__(self) -> str:
        return f"scenes/{self.split}/{self.index}"


def describe(split: str, index: int) -> Scene:
    """What is in picture `index` of a split."""
    draws = Draws(f"scenes/{split}/{index}")
    shape, color = draws.choice(SHAPES), draws.choice(COLORS)
    of_shape, of_color = draws.integer(0, MAX_COUNTED), draws.integer(0, MAX_COUNTED)
    count = draws.integer(max(2, of_shape, of_color), MAX_THINGS)
    shapes = _with_exactly(shape, of_shape, SHAPES, count, draws)
    colors = _with_exactly(color, of_color, COLORS, count, draws)
    marks = [draws.choice(MARKS) for _ in range(count)]
    places = _places(count, draws)
    while places is None:
        places = _places(count, draws)
    things = tuple(
        Thing(*looks, *place)
        for looks, place in zip(zip(shapes, colors, marks, strict=True), places, strict=True)
    )
    return Scene(split, index, things, shape, color)


def _with_exactly(
    wanted: str, times: int, words: Sequence[str], count: int, draws: Draws
) -> list[str]:
    """`count` words in random order, `wanted` so many times; the others repeat now and then."""
    others = [word for word in words if word != wanted]
    few = draws.shuffled(others)[: draws.integer(2, len(others))]
    return draws.shuffled([wanted] * times + [draws.choice(few) for _ in range(count - times)])


def _places(count: int, draws: Draws) -> list[tuple[int, int, int]] | None:
    """Radius, x and y of each thing, boxes apart; None where the last one found no place."""
    places: list[tuple[int, int, int]] = []
    for _ in range(count):
        radius = draws.choice(RADII)
        low, high = radius + 1, IMAGE_SIZE - 2 - radius
        for _ in range(30):
            x, y = draws.integer(low, high), draws.integer(low, high)
            if all(
                max(abs(x - other_x), abs(y - other_y)) > radius + other + _GAP
                for other, other_x, other_y in places
            ):
                places.append((radius, x, y))
                break
        else:
            return None
    return places


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture, ``(128, 128, 3)`` in RGB."""
    draws = Draws(f"{scene}/colors")
    canvas = _background(draws)
    for thing in scene.things:
        fill = [min(255, max(0, c + draws.integer(-_JITTER, _JITTER))) for c in RGB[thing.color]]
        ink = 250 if thing.color in _WHITE_MARKS else 6
        _blend(canvas, thing, _SHAPE_TESTS[thing.shape], fill)
        if thing.mark != "none":
            _blend(canvas, thing, _MARK_TESTS[thing.mark], [ink] * 3)
    raw = hashlib.shake_128(f"{scene}/noise".encode()).digest(canvas.size)
    noise = np.frombuffer(raw, np.uint8).astype(np.int64).reshape(canvas.shape)
    canvas += noise * (2 * _NOISE + 1) // 256 - _NOISE
    return canvas.clip(0, 255).astype(np.uint8)


def owners(scene: Scene) -> NDArray[np.int64]:
    """For each pixel, ``(128, 128)``, the number of the thing that covers at least half, or -1."""
    owner = np.full((IMAGE_SIZE, IMAGE_SIZE), -1, dtype=np.int64)
    for number, thing in enumerate(scene.things):
        box, coverage = _coverage(thing, _SHAPE_TESTS[thing.shape])
        owner[box][coverage * 2 >= _SUBSAMPLES**2] = number
    return owner


def _background(draws: Draws) -> Integers:
    """A gradient between four muted colors with soft patches, ``(128, 128, 3)``."""
    corners = np.array([draws.integer(80, 170) for _ in range(12)]).reshape(2, 2, 3)
    cells = IMAGE_SIZE // _PATCH_PITCH + 1
    steps = [draws.integer(-_PATCHES, _PATCHES) for _ in range(cells * cells)]
    patches = np.array(steps).reshape(cells, cells, 1)
    return _stretched(corners, IMAGE_SIZE) + _stretched(patches, _PATCH_PITCH)


def _stretched(grid: Integers, pitch: int) -> Integers:
    """Bilinear interpolation of ``(n, n, channels)`` at the first 128 of n * pitch pixels."""
    for _ in range(2):  # the first axis, then, turned, the other
        cell, offset = np.divmod(np.arange(IMAGE_SIZE), pitch)
        offset = offset[:, None, None]
        grid = (grid[cell] * (pitch - offset) + grid[cell + 1] * offset) // pitch
        grid = grid.swapaxes(0, 1)
    return grid


Box = tuple[slice, slice]
Test = Callable[[Integers, Integers, int], NDArray[np.bool_]]


def _coverage(thing: Thing, test: Test) -> tuple[Box, Integers]:
    """The box of a thing and how many of the 16 subsamples of each of its pixels pass a test."""
    radius = thing.radius + 1
    box = (
        slice(thing.y - radius, thing.y + radius + 1),
        slice(thing.x - radius, thing.x + radius + 1),
    )
    side = 2 * radius + 1
    step = _EIGHTHS // _SUBSAMPLES
    first = -_EIGHTHS * radius - (_EIGHTHS - step) // 2
    at = np.arange(first, first + side * _EIGHTHS, step)
    inside = test(at[None, :], at[:, None], thing.radius * _EIGHTHS)
    counts = inside.reshape(side, _SUBSAMPLES, side, _SUBSAMPLES).sum(axis=(1, 3))
    return box, counts


def _blend(canvas: Integers, thing: Thing, test: Test, fill: Sequence[int]) -> None:
    """Paint what passes a test, antialiased, in place."""
    box, coverage = _coverage(thing, test)
    whole = _SUBSAMPLES**2
    over = coverage[..., None]
    canvas[box] = (canvas[box] * (whole - over) + np.array(fill) * over + whole // 2) // whole


def _in_circle(x: Integers, y: Integers, radius: int) -> NDArray[np.bool_]:
    return x * x + y * y <= radius * radius


def _in_cross(x: Integers, y: Integers, radius: int) -> NDArray[np.bool_]:
    x, y = np.abs(x), np.abs(y)
    return (np.maximum(x, y) <= radius) & (np.minimum(x, y) * 3 <= radius)


def _in_diamond(x: Integers, y: Integers, radius: int) -> NDArray[np.bool_]:
    return np.abs(x) + np.abs(y) <= radius


def _in_square(x: Integers, y: Integers, radius: int) -> NDArray[np.bool_]:
    return np.maximum(np.abs(x), np.abs(y)) * 8 <= radius * 7


def _in_star(x: Integers, y: Integers, radius: int) -> NDArray[np.bool_]:
    # each tip of a pentagram lies outside one of its five lines, everything else outside of more
    lines = np.array([a * x + b * y <= _STAR_WAIST * radius for a, b in _STAR_TIPS])
    return np.asarray(lines.sum(axis=0) >= len(_STAR_TIPS) - 1)


def _in_triangle(x: Integers, y: Integers, radius: int) -> NDArray[np.bool_]:
    return (29 * np.abs(x) <= 16 * (y + radius)) & (16 * y <= 13 * radius)


def _in_bar(x: Integers, y: Integers, _radius: int) -> NDArray[np.bool_]:
    return (np.abs(x) <= 20) & (np.abs(y) <= 8)


def _in_dot(x: Integers, y: Integers, _radius: int) -> NDArray[np.bool_]:
    return x * x + y * y <= 256


# Positions are in eighths of a pixel from the center, y downwards.
_SHAPE_TESTS: dict[str, Test] = {
    "circle": _in_circle,
    "cross": _in_cross,
    "diamond": _in_diamond,
    "square": _in_square,
    "star": _in_star,
    "triangle": _in_triangle,
}
_MARK_TESTS: dict[str, Test] = {"bar": _in_bar, "dot": _in_dot}

Asked = tuple[str, str]


def ask(scene: Scene, kind: str, draws: Draws) -> Asked | None:
    """A question of one of KINDS with its answer; None where the picture allows none."""
    return _ASKERS[kind](scene, draws)


def questions(scene: Scene, times: int = 1) -> list[tuple[str, str, str]]:
    """Kind, question and answer of the questions on a picture, each once.

    Args:
        scene: What is in the picture.
        times: How often each kind is tried.
    """
    draws = Draws(f"{scene}/questions")
    found: dict[str, tuple[str, str, str]] = {}
    for _ in range(times):
        for kind in KINDS:
            asked = ask(scene, kind, draws)
            if asked is not None:
                found.setdefault(asked[0], (kind, *asked))
    return list(found.values())


def _ask_exists(scene: Scene, draws: Draws) -> Asked:
    """An absent thing shares its color or its shape with one in the picture."""
    present = {(thing.color, thing.shape) for thing in scene.things}
    colors = {color for color, _ in present}
    shapes = {shape for _, shape in present}
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    if draws.integer(0, 1):
        answer, chosen = "yes", [pair for pair in pairs if pair in present]
    else:
        answer = "no"
        chosen = [
            (color, shape)
            for color, shape in pairs
            if (color, shape) not in present and (color in colors or shape in shapes)
        ]
    color, shape = draws.choice(chosen)
    article = "an" if color == "orange" else "a"
    return f"is there {article} {color} {shape}?", answer


def _ask_count(scene: Scene, draws: Draws) -> Asked:
    if draws.integer(0, 1):
        number = sum(thing.shape == scene.counted_shape for thing in scene.things)
        return f"how many {plural(scene.counted_shape)} are there?", str(number)
    number = sum(thing.color == scene.counted_color for thing in scene.things)
    return f"how many {scene.counted_color} shapes are there?", str(number)


def _ask_color(scene: Scene, draws: Draws) -> Asked | None:
    single = _singles(scene, lambda thing: thing.shape)
    if not single:
        return None
    thing = draws.choice(single)
    return f"what color is the {thing.shape}?", thing.color


def _ask_shape(scene: Scene, draws: Draws) -> Asked | None:
    single = _singles(scene, lambda thing: thing.color)
    if not single:
        return None
    thing = draws.choice(single)
    return f"what is the {thing.color} shape?", thing.shape


def _ask_mark(scene: Scene, draws: Draws) -> Asked | None:
    single = _singles(scene, lambda thing: thing.name)
    if not single:
        return None
    thing = draws.choice(single)
    return f"what mark has the {thing.name}?", thing.mark


def _ask_relation(scene: Scene, draws: Draws) -> Asked | None:
    single = _singles(scene, lambda thing: thing.name)
    found = [
        (one, other, words)
        for one, other in permutations(single, 2)
        for distance, words in (
            (other.x - one.x, ("left of", "right of")),
            (other.y - one.y, ("above", "below")),
        )
        if distance >= SIDE_MARGIN
    ]
    if not found:
        return None
    one, other, words = draws.choice(found)
    said, holds = draws.integer(0, 1), draws.integer(0, 1)
    if said == holds:  # the first word is true of (one, other), the second of (other, one)
        one, other = other, one
    return f"is the {one.name} {words[said]} the {other.name}?", "yes" if holds else "no"


def _ask_nearest(scene: Scene, draws: Draws) -> Asked | None:
    found = []
    for thing in _singles(scene, lambda thing: thing.shape):
        others = [other for other in scene.things if other is not thing]
        others.sort(key=lambda other: _squared_distance(thing, other))
        first, second = others[0], others[1] if len(others) > 1 else None
        if second is None or _is_clearly_nearer(thing, first, second):
            found.append((thing, first))
    if not found:
        return None
    thing, nearest = draws.choice(found)
    return f"what color is nearest to the {thing.shape}?", nearest.color


def _ask_more(scene: Scene, draws: Draws) -> Asked | None:
    shapes = {shape: sum(thing.shape == shape for thing in scene.things) for shape in SHAPES}
    colors = {color: sum(thing.color == color for thing in scene.things) for color in COLORS}
    unequal = [
        (one, other, counts)
        for counts in (shapes, colors)
        for one, other in combinations(counts, 2)
        if counts[one] != counts[other]
    ]
    in_picture = [(one, other, c) for one, other, c in unequal if c[one] and c[other]]
    if not in_picture and draws.integer(0, 1):
        return None
    one, other, counts = draws.choice(in_picture or unequal)
    if draws.integer(0, 1):
        one, other = other, one
    word = draws.choice(("more", "fewer"))
    answer = "yes" if (counts[one] > counts[other]) == (word == "more") else "no"
    return f"are there {word} {plural(one)} than {plural(other)}?", answer


def _ask_larger(scene: Scene, draws: Draws) -> Asked | None:
    single = _singles(scene, lambda thing: thing.name)
    found = [pair for pair in permutations(single, 2) if pair[0].radius != pair[1].radius]
    if not found:
        return None
    one, other = draws.choice(found)
    word = draws.choice(("larger", "smaller"))
    answer = "yes" if (one.radius > other.radius) == (word == "larger") else "no"
    return f"is the {one.name} {word} than the {other.name}?", answer


def _ask_largest(scene: Scene, draws: Draws) -> Asked | None:
    ranked = sorted(scene.things, key=lambda thing: thing.radius)
    found = []
    if ranked[0].radius != ranked[1].radius:
        found.append(("smallest", ranked[0]))
    if ranked[-1].radius != ranked[-2].radius:
        found.append(("largest", ranked[-1]))
    if not found:
        return None
    word, thing = draws.choice(found)
    if draws.integer(0, 1):
        return f"what color is the {word} shape?", thing.color
    return f"what is the {word} shape?", thing.shape


def _singles(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    """The things whose key no other thing of the picture has."""
    keys = [key(thing) for thing in scene.things]
    return [thing for thing, own in zip(scene.things, keys, strict=True) if keys.count(own) == 1]


def _squared_distance(one: Thing, other: Thing) -> int:
    return (one.x - other.x) ** 2 + (one.y - other.y) ** 2


def _is_clearly_nearer(thing: Thing, first: Thing, second: Thing) -> bool:
    # integers: isqrt rounds the farther distance down, and the nearer one is rounded up
    near = isqrt(_squared_distance(thing, first)) + 1
    farther, nearer = NEAR_MARGIN
    return isqrt(_squared_distance(thing, second)) * nearer >= near * farther


def plural(word: str) -> str:
    """The things of a shape, or of a color, in a question."""
    if word in COLORS:
        return f"{word} shapes"
    return f"{word}es" if word == "cross" else f"{word}s"


_ASKERS: dict[str, Callable[[Scene, Draws], Asked | None]] = {
    "exists": _ask_exists,
    "count": _ask_count,
    "color": _ask_color,
    "shape": _ask_shape,
    "mark": _ask_mark,
    "relation": _ask_relation,
    "nearest": _ask_nearest,
    "more": _ask_more,
    "larger": _ask_larger,
    "largest": _ask_largest,
}
KINDS = tuple(_ASKERS)
