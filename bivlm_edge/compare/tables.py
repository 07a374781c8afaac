"""Rows to a Markdown page. Computes none of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bivlm_edge.compare.specification import FLOAT

Row = Mapping[str, Any]
_RESUMED = (
    " A run marked > was interrupted and went on where it had been: seconds and memory are those "
    "of its last start."
)


def markdown(rows: Sequence[Row], picture: str | None = None) -> str:
    """Return a page: what was measured, the table, how to read it.

    Args:
        rows: At least one, of one comparison.
        picture: Name of the PNG beside the page, or None.
    """
    first = rows[0]
    parts = [f"# {first['model']} on {first['data']}", _measured_on(rows)]
    if picture is not None:
        parts.append(f"![accuracy and perplexity against true bits]({picture})")
    parts += [table(rows), _explanation(rows)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; columns that no row fills are left out."""
    reference = next((row for row in rows if row["method"] == FLOAT), None)
    columns = columns_of(rows, reference)
    lines = [
        "| " + " | ".join(title for title, _ in columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines)


def columns_of(
    rows: Sequence[Row], reference: Row | None
) -> list[tuple[str, Callable[[Row], str]]]:
    """Return title and text of each column, for tables of any kind."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("run", lambda row: "float" if row["method"] == FLOAT else str(row["run"])),
        ("claimed bits", lambda row: f"{row['claimed_bits']:.4g}"),
        ("true bits", lambda row: f"{row['true_bits']:.4f}".rstrip("0").rstrip(".")),
    ]
    if any(row["accuracy"] is not None for row in rows):
        columns.append(("accuracy", lambda row: _percent(row["accuracy"])))
    if any(row["open_ended_accuracy"] is not None for row in rows):
        columns.append(("colour, shape", lambda row: _percent(row["open_ended_accuracy"])))
    columns.append(("perplexity", _perplexity))
    if reference is not None and reference["perplexity"]:
        base = reference["perplexity"]
        columns.append(("x float", lambda row: _times(row, base)))
    return [
        *columns,
        ("seconds", _seconds),
        ("peak MB", lambda row: "-" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"),
    ]


def _measured_on(rows: Sequence[Row]) -> str:
    first = rows[0]
    if first.get("questions") is not None:
        what = f"{first['questions']:,} questions"
    else:
        count, length = first["windows"]
        what = f"{count} windows of {length} tokens, each by itself"
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    samples = sorted(
        {row["options"]["calibration_samples"] for row in rows if row["method"] != FLOAT}
    )
    libraries = ", ".join(f"{name} {number}" for name, number in first["libraries"].items())
    lines = [
        f"- Evaluated on {what}, in torch, float32 activations.",
        f"- Calibrated on {first['calibration']}"
        + (f", {' or '.join(map(str, samples))} samples" if samples else "")
        + f"; seed {seeds}.",
        f"- {first['machine']}, {first['threads']} thread{'s' * (first['threads'] != 1)}; "
        f"{libraries}; code {first['code']}.",
    ]
    return "\n".join(lines)


def _explanation(rows: Sequence[Row]) -> str:
    is_questions = rows[0].get("questions") is not None
    perplexity = "the expected answers' tokens" if is_questions else "the text"
    return (
        "True bits count every byte of the quantized linear layers in the exported file; claimed "
        "bits are what the method's paper would count. The vocabulary is rounded to 8 bits beside "
        f"them, as in an export, and counted in neither. Perplexity is that of {perplexity}. "
        "Seconds are calibration, quantization and fine-tuning, without loading and evaluating; "
        "peak MB (10^6 bytes) is the highest resident memory of the run's process, evaluation "
        "included." + (_RESUMED if any(row.get("resumed") for row in rows) else "")
    )


def _seconds(row: Row) -> str:
    return f"{'> ' if row.get('resumed') else ''}{row['seconds']:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _perplexity(row: Row) -> str:
    value = row["perplexity"]
    if value is None:
        return "not finite"
    return f"{value:.4f}" if value < 10 else f"{value:,.2f}" if value < 1e5 else f"{value:.3g}"


def _times(row: Row, base: float) -> str:
    value = row["perplexity"]
    if value is None:
        return "-"
    return f"{value / base:.3f}" if value < 1000 * base else f"{value / base:.3g}"
