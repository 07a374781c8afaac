"""An analysis as tables, a Markdown page and CSV. Computes none of the numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bivlm_edge.redundancy.analysis import IMAGE_NOT_USED, SELECTOR_ADDS_NOTHING
from bivlm_edge.redundancy.plan import BASELINES, RARE_TEXT, TEXT
from bivlm_edge.report import human_bytes

Result = Mapping[str, Any]
_CONTROLS = (
    ("full", "all image tokens"),
    ("no_image", "no image token"),
    ("shuffled", "another picture"),
    ("question_only", "majority answer of the question"),
)
QUESTION_TOKENS = {"question_tokens": "at random", "rarest_question_tokens": "commonest first"}
_KIND_NAMES = {"yes_no": "yes/no", "color": "colour"}


class Sheet(NamedTuple):
    """A table for people: title, names of the columns, rows of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def controls(results: Sequence[Result]) -> Sheet:
    """Accuracy with, without and with other pictures, of each model."""
    kinds = list(results[0]["kinds"])
    rows = []
    for result in results:
        for name, words in _CONTROLS:
            accuracy = result[f"accuracy_{name}"]
            if accuracy is None:
                continue
            low, high = result["intervals"][name]
            rows.append(
                [
                    result["model"],
                    words,
                    f"{accuracy:.2%} ({low:.2%}-{high:.2%})",
                    *(f"{result['kinds'][kind][name]:.2%}" for kind in kinds),
                ]
            )
    return Sheet(
        "controls", ["model", "asked with", "accuracy (95 %)", *map(kind_name, kinds)], rows
    )


def needs(results: Sequence[Result]) -> Sheet:
    """How many tokens each selector needs, overall and by kind of question."""
    kinds = list(results[0]["kinds"])
    rows = []
    for result in results:
        for mode, summary in result["modes"].items():
            gains = summary["tokens_for_gain"]
            area = summary["area"]
            rows.append(
                [
                    result["model"],
                    mode,
                    _bracket(summary),
                    f"{summary['redundancy']:.1%}",
                    _against_random(summary),
                    " / ".join(
                        "-" if gains[share] is None else str(gains[share]) for share in gains
                    ),
                    "-" if area is None else f"{area:.3f}",
                    *(_bracket(summary["kinds"][kind]) for kind in kinds),
                ]
            )
    tokens = results[0]["image_tokens"]
    columns = ["model", "selector", f"K* of {tokens}", "redundancy", "random's K* / K*"]
    columns += ["K for 90 / 95 / 99 % of the gain", "area", *(f"K* {kind_name(k)}" for k in kinds)]
    return Sheet("image tokens needed", columns, rows)


def curve(result: Result, name: str, points: Sequence[Mapping[str, Any]]) -> Sheet:
    """One selector of one model, number by number."""
    tokens = result["image_tokens"]
    kinds = list(result["kinds"])
    compared = [
        name for name in BASELINES if any(point[f"minus_{name}"] is not None for point in points)
    ]
    columns = ["kept", "pruned", "accuracy (95 %)", "against all tokens (bound)", "", "changed"]
    columns += ["gain", *(f"minus {name} (95 %)" for name in compared), *map(kind_name, kinds)]
    rows = []
    for point in reversed(points):
        low, high = point["interval"]
        row = [
            str(point["kept"]),
            f"{1 - point['kept'] / tokens:.1%}",
            f"{point['accuracy']:.2%} ({low:.2%}-{high:.2%})",
            f"{_points(point['difference'])} ({_points(point['difference_low'])})",
            "passes" if point["passes"] else "undecided" if point["undecided"] else "fails",
            f"{point['flips']:.1%}",
            "-" if point["gain"] is None else f"{point['gain']:.3f}",
        ]
        row += [_minus(point[f"minus_{name}"]) for name in compared]
        rows.append(row + [f"{point['kinds'][kind]:.1%}" for kind in kinds])
    return Sheet(f"{result['model']}: {name}", columns, rows)


def costs(results: Sequence[Result]) -> Sheet:
    """Time and memory of a prompt by number of tokens."""
    rows = [
        [
            result["model"],
            str(cost["kept"]),
            str(cost["prompt_tokens"]),
            f"{cost['prefill_ms']:.2f}",
            human_bytes(cost["kv_bytes"]),
        ]
        for result in results
        for cost in reversed(result["costs"])
    ]
    return Sheet(
        "one picture and question",
        ["model", "kept", "tokens cached", "prefill, ms", "KV cache"],
        rows,
    )


def markdown(results: Sequence[Result], picture: str | None) -> str:
    """Return the page.

    Args:
        results: Of the model and those that it is compared with; at least one.
        picture: Name of the PNG beside the page, or None.
    """
    first = results[0]
    names = " and ".join(result["model"] for result in results)
    parts = [f"# Redundancy of image tokens: {names} on {first['data']}"]
    parts += [
        f"**{result['model']}: {result['verdict']}.** {result['message']}" for result in results
    ]
    parts += [
        _delta(first, other) for other in results[1:] if other["delta_redundancy"] is not None
    ]
    if picture is not None:
        parts.append(f"![accuracy against kept image tokens]({picture})")
    parts.append(_asked(first))
    sheets = [controls(results)]
    if any(result["modes"] for result in results):
        sheets += [needs(results), costs(results)]
    parts += [
        f"## {sheet.title[0].upper()}{sheet.title[1:]}\n\n{_table(sheet)}" for sheet in sheets
    ]
    for result in results:
        for sheet in curves(result):
            parts.append(f"## {sheet.title}\n\n{_table(sheet)}")
    parts.append(_EXPLANATION)
    return "\n\n".join(parts) + "\n"


def curves(result: Result) -> Iterator[Sheet]:
    """The sheets of all selectors and of dropped question tokens."""
    for mode, points in result["curves"].items():
        yield curve(result, mode, points)
    for name, words in QUESTION_TOKENS.items():
        if result[name]:
            title = f"question tokens dropped in the same shares, {words}"
            yield curve(result, title, result[name])


def csv_text(results: Sequence[Result]) -> str:
    """Return one line per model, selector and number of tokens."""
    kinds = list(results[0]["kinds"])
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        [
            *("model", "selector", "kept", "image_tokens", "accuracy", "low", "high"),
            *("difference", "difference_low", "passes", "changed", "gain"),
            *(f"minus_{name}" for name in BASELINES),
            *("prompt_tokens", "seeds", "prefill_ms", "kv_bytes"),
            *(f"accuracy_{kind}" for kind in kinds),
        ]
    )
    for result in results:
        of_cost = {cost["kept"]: cost for cost in result["costs"]}
        series = {
            **result["curves"],
            TEXT: result["question_tokens"],
            RARE_TEXT: result["rarest_question_tokens"],
        }
        for name, points in series.items():
            for point in points:
                # the costs are those of the file's own selector
                cost = of_cost.get(point["kept"]) if name == result["own_mode"] else None
                minus = [point[f"minus_{name}"] for name in BASELINES]
                writer.writerow(
                    [
                        *(result["model"], name, point["kept"], result["image_tokens"]),
                        *(point["accuracy"], *point["interval"]),
                        *(point["difference"], point["difference_low"], int(point["passes"])),
                        *(point["flips"], point["gain"]),
                        *(of and of["mean"] for of in minus),
                        *(point["prompt_tokens"], point["seeds"]),
                        *((cost["prefill_ms"], cost["kv_bytes"]) if cost else (None, None)),
                        *(point["kinds"][kind] for kind in kinds),
                    ]
                )
    return stream.getvalue()


def kind_name(kind: str) -> str:
    """Return the name of a kind of question for people."""
    return _KIND_NAMES.get(kind, kind)


def _bracket(summary: Mapping[str, Any]) -> str:
    """K*, and what failed where it was not tested one by one; "-" where none is claimed."""
    if summary["k_star"] is None:
        return "-"
    failed = summary["k_failed"]
    text = str(summary["k_star"])
    if failed is not None and failed < summary["k_star"] - 1:
        text += f" ({failed} fails)"
    return text


def _against_random(summary: Mapping[str, Any]) -> str:
    if summary["beats_random"] is None:
        return "-"
    value = summary["method_value"]
    text = "-" if value is None else f"{value:.2f}"
    return text if summary["beats_random"] else f"{text} (no fewer)"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _minus(minus: Mapping[str, Any] | None) -> str:
    if minus is None:
        return "-"
    low, high = minus["interval"]
    return f"{_points(minus['mean'])} ({_points(low)} to {_points(high)})"


def _delta(first: Result, other: Result) -> str:
    by_mode = ", ".join(
        f"{mode} {_points(delta)} ({first['modes'][mode]['k_star']} against "
        f"{other['modes'][mode]['k_star']})"
        for mode, delta in other["delta_by_mode"].items()
    )
    return (
        f"Redundancy of {first['model']} minus that of {other['model']}, in points (tokens needed "
        f"of {first['image_tokens']}): {by_mode}; the best of each "
        f"{_points(other['delta_redundancy'])}."
    )


def _asked(first: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    tolerance = 100 * first["tolerance"]
    lines = [
        f"- {first['questions']:,} questions on {first['pictures']:,} pictures of {first['data']}; "
        f"answers greedy, compared stripped and in lower case.",
        f"- A number of tokens passes if accuracy is at most {tolerance:g} points lower than with "
        f"all of them, by the one-sided 95 % bound of the paired difference; needs about "
        f"{first['questions_needed']:,} questions.",
        f"- Seed {first['seed']}, {first['seeds']} runs of random per number of tokens; code "
        f"{first['code']}; {versions}.",
    ]
    loose = sorted(
        {
            f"{kind_name(kind)} {100 * of['tolerance']:.2f}"
            for summary in first["modes"].values()
            for kind, of in summary["kinds"].items()
            if of["tolerance"] > first["tolerance"]
        }
    )
    if loose:
        lines.append(
            f"- Kinds of question with too few questions for that have the tolerance that they "
            f"resolve, in points: {', '.join(loose)}."
        )
    return "\n".join(lines)


def _table(sheet: Sheet) -> str:
    lines = [
        "| " + " | ".join(sheet.columns) + " |",
        "|---|" + "---:|" * (len(sheet.columns) - 1),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in sheet.rows]
    return "\n".join(lines)


_EXPLANATION = f"""\
K* is the smallest number of image tokens such that it and every larger tested number pass; its \
neighbours were tested down to 2 % of all tokens. Gain is (accuracy - accuracy without image) / \
(accuracy with all tokens - accuracy without image), area its mean over log2 of 1 to all tokens. \
"Changed" are answers other than those with all tokens. Question tokens are dropped at random, or \
those first that most of the questions asked have (the smallest inverse document frequency), with \
all image tokens. `random` draws other tokens for every \
picture and seed. A selector is judged by `random` and `uniform`: it beats one of them if its K* \
is no more than a number of tokens that this one failed with, or if at a tenth of all tokens the \
95 % interval of its accuracy minus that of this one lies above 0. If it beats neither either way, \
the verdict is {SELECTOR_ADDS_NOTHING}. The verdict {IMAGE_NOT_USED} means that the gain over no \
image and over another picture, whichever is better, is not above 0 (one-sided 95 % bootstrap over \
pictures); a kind of question of which that is so has no K* (-). Margins are the larger of \
sqrt(share of discordant questions / n) and that with pictures as clusters, times 1.645, and never \
below that of no failure in n trials."""
