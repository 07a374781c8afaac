"""An analysis as a picture: accuracy, gain and cost against kept image tokens."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bivlm_edge.redundancy.pages import QUESTION_TOKENS, kind_name
from bivlm_edge.redundancy.plan import RANDOM

Result = Mapping[str, Any]
_MARKERS = "osD^vP*X"
_KINDS_PER_ROW = 4
_UPPER_HEIGHT, _LOWER_HEIGHT = 6.2, 4.9  # inches of a row of panels, with their legends
_LEGEND_BELOW = 0.62  # inches under the axes: tick texts and the axis's name are in between
_MOST_TICKS = 8
_NO_TOKEN = -2.0  # a step of its own to the left of one token
_LEAST_GAIN = -0.3  # what is further below no image would flatten the rest
_LINES = (
    ("accuracy_full", "all tokens - tolerance", "black", "--"),
    ("accuracy_no_image", "no image", "tab:red", ":"),
    ("accuracy_shuffled", "another picture", "tab:purple", ":"),
    ("accuracy_question_only", "question alone", "tab:brown", ":"),
)


def png(results: Sequence[Result]) -> bytes:
    """Return a PNG with a row of panels for each model and one of its kinds of question."""
    stream = io.BytesIO()
    _figure(results).savefig(stream, format="png")
    return stream.getvalue()


def _figure(results: Sequence[Result]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(results[0]["kinds"]) / _KINDS_PER_ROW)
    height = _UPPER_HEIGHT + _LOWER_HEIGHT * rows
    figure = Figure(figsize=(17, height * len(results)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for result, part in zip(
        results, figure.subfigures(len(results), 1, squeeze=False)[:, 0], strict=True
    ):
        part.suptitle(
            f"{result['model']} on {result['data']}: {result['verdict']}\n"
            + _wrapped(result["message"]),
            fontsize=12,
        )
        _draw(result, part)
    return figure


def _draw(result: Result, part: Any) -> None:
    if not result["curves"]:
        _draw_controls(result, part.subplots())
        return
    kinds = list(result["kinds"])
    rows = math.ceil(len(kinds) / _KINDS_PER_ROW)
    upper, lower = part, None
    if kinds:
        ratios = (_UPPER_HEIGHT, _LOWER_HEIGHT * rows)
        upper, lower = part.subfigures(2, 1, height_ratios=ratios)
    accuracy, gain, cost = upper.subplots(1, 3, width_ratios=(1.7, 1.1, 0.9))
    _accuracy(result, accuracy)
    _gain(result, gain)
    _cost(result, cost)
    if lower is not None:
        columns = min(len(kinds), _KINDS_PER_ROW)
        panels = lower.subplots(rows, columns, squeeze=False).ravel()
        for kind, axes in zip(kinds, panels, strict=False):
            _kind(result, kind, axes)
        for axes in panels[len(kinds) :]:
            axes.set_visible(False)


def _draw_controls(result: Result, axes: Any) -> None:
    """Bars: without use of the image there is no curve to show."""
    names = ("full", "no_image", "shuffled", "question_only")
    words = ("right picture", "no image", "another picture", "question alone")
    shown = [
        (w, n) for w, n in zip(words, names, strict=True) if result[f"accuracy_{n}"] is not None
    ]
    values = [100 * result[f"accuracy_{name}"] for _, name in shown]
    ends = [result["intervals"][name] for _, name in shown]
    errors = [
        [max(0.0, value - 100 * low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, 100 * high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]
    bars = axes.barh([word for word, _ in shown], values, xerr=errors, color="tab:gray", capsize=4)
    axes.bar_label(bars, fmt="%.2f %%", padding=14)
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xlabel("accuracy (%), 95 % intervals")


def _accuracy(result: Result, axes: Any) -> None:
    for number, (mode, points) in enumerate(result["curves"].items()):
        places = [_place(point["kept"]) for point in points]
        color = f"C{number % 10}"
        style = "--" if mode == RANDOM else "-"
        axes.plot(
            places,
            [100 * point["accuracy"] for point in points],
            style + _MARKERS[number % len(_MARKERS)],
            color=color,
            label=f"{mode}: K* = {result['modes'][mode]['k_star']}",
        )
        ends = [point["interval"] for point in points]
        axes.fill_between(
            places,
            [100 * low for low, _ in ends],
            [100 * high for _, high in ends],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
        axes.axvline(
            _place(result["modes"][mode]["k_star"]), color=color, linestyle=style, linewidth=0.8
        )
    for key, words, color, style in _LINES:
        if result[key] is None:
            continue
        value = result[key] - (result["tolerance"] if key == "accuracy_full" else 0.0)
        label = f"{words}: {value:.2%}"
        axes.axhline(100 * value, color=color, linestyle=style, linewidth=1.1, label=label)
    axes.set_ylabel("accuracy (%), 95 % bands")
    axes.set_title("how many image tokens are needed (vertical: K*)")
    _legend(axes, columns=2)
    _ticks(result, axes)


def _gain(result: Result, axes: Any) -> None:
    for number, (mode, points) in enumerate(result["curves"].items()):
        color = f"C{number % 10}"
        with_gain = [point for point in points if point["gain"] is not None]
        axes.plot(
            [_place(point["kept"]) for point in with_gain],
            [point["gain"] for point in with_gain],
            "-" + _MARKERS[number % len(_MARKERS)],
            color=color,
            markersize=5,
            label=mode,
        )
        axes.plot(
            [_place(point["kept"]) for point in points],
            [point["flips"] for point in points],
            ":",
            color=color,
        )
    for (name, words), marker in zip(QUESTION_TOKENS.items(), "x+", strict=True):
        text = [point for point in result[name] if point["gain"] is not None]
        axes.plot(
            [_place(point["kept"]) for point in text],
            [point["gain"] for point in text],
            f"-{marker}",
            color="tab:gray" if marker == "x" else "black",
            label=f"question tokens dropped, {words}",
        )
    axes.set_ylabel("share of the gain; dotted: share of changed answers")
    axes.set_title("what the image's gain keeps")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], _LEAST_GAIN))
    _legend(axes, columns=2)
    _ticks(result, axes)


def _cost(result: Result, axes: Any) -> None:
    costs = result["costs"]
    places = [_place(cost["kept"]) for cost in costs]
    axes.plot(places, [cost["prefill_ms"] for cost in costs], "-o", color="tab:blue")
    axes.set_ylabel("prefill with vision (ms)", color="tab:blue")
    axes.set_ylim(bottom=0)
    memory = axes.twinx()
    memory.plot(places, [cost["kv_bytes"] / 1024 for cost in costs], "-s", color="tab:orange")
    memory.set_ylabel("KV cache of the prompt (KiB)", color="tab:orange")
    memory.set_ylim(bottom=0)
    axes.set_title("what a prompt costs")
    _ticks(result, axes)


def _kind(result: Result, kind: str, axes: Any) -> None:
    for number, (mode, points) in enumerate(result["curves"].items()):
        color = f"C{number % 10}"
        k_star = result["modes"][mode]["kinds"][kind]["k_star"]
        style = "--" if mode == RANDOM else "-"
        axes.plot(
            [_place(point["kept"]) for point in points],
            [100 * point["kinds"][kind] for point in points],
            style + _MARKERS[number % len(_MARKERS)],
            color=color,
            markersize=5,
            label=mode if k_star is None else f"{mode}: K* = {k_star}",
        )
        if k_star is not None:
            axes.axvline(_place(k_star), color=color, linestyle=style, linewidth=0.8)
    own = result["kinds"][kind]
    for name, words, color, style in _LINES:
        value = own.get(name.removeprefix("accuracy_"))
        if value is not None and name != "accuracy_full":
            axes.axhline(100 * value, color=color, linestyle=style, linewidth=1, label=words)
    title = f"{kind_name(kind)}: {own['questions']:,} questions"
    axes.set_title(title if own["image_used"] else f"{title}\npicture not used: no K*")
    axes.set_ylabel("accuracy (%)")
    _legend(axes, columns=2)
    _ticks(result, axes)


def _place(kept: int) -> float:
    """Log2, with a place of its own for no token."""
    return _NO_TOKEN if kept == 0 else math.log2(kept)


def _legend(axes: Any, columns: int) -> None:
    """Put it under the axes, where it hides no curve."""
    from matplotlib.transforms import ScaledTranslation

    below = ScaledTranslation(0, -_LEGEND_BELOW, axes.figure.dpi_scale_trans)
    axes.legend(
        fontsize=8,
        ncols=columns,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + below,
        borderaxespad=0,
        frameon=False,
    )


def _ticks(result: Result, axes: Any) -> None:
    tokens = result["image_tokens"]
    shown = [0]
    kept = tokens
    while kept > 0:
        shown.append(kept)
        kept //= 2
    if len(shown) > _MOST_TICKS:  # large pictures: every other number
        shown = [0, *shown[1::2]]
    axes.set_xticks(
        [_place(kept) for kept in shown],
        [f"{kept}\n{_pruned(kept, tokens)}" for kept in shown],
        fontsize=8,
    )
    axes.set_xlabel("kept image tokens; below: share pruned")
    axes.grid(visible=True, alpha=0.3)


def _pruned(kept: int, tokens: int) -> str:
    """The share that is dropped; all of it is said of no token alone."""
    share = f"{100 * (1 - kept / tokens):.1f}".removesuffix(".0")
    return ">99.9%" if share == "100" and kept else f"{share}%"


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 150))
