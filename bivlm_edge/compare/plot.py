"""Rows to a picture: accuracy and perplexity against true bits."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bivlm_edge.compare.specification import FLOAT
from bivlm_edge.errors import OutputError, RequestError

Row = Mapping[str, Any]
_MARKERS = "osD^vP*Xph<>"
_LEAST_SPAN = 2.0  # percent: less would show noise as a difference


def require_matplotlib() -> None:
    """Refuse to start hours of runs whose picture could not be drawn.

    Raises:
        RequestError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(
            "the picture needs matplotlib. Run: pip install 'bivlm-edge[plots]', or add --no-plot."
        )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with a panel for each quantity that the rows hold.

    Each series (a method with its options) has a colour; a point says how many true bits it takes
    at which budget. The float model is a line.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (key, title)
        for key, title in (
            ("accuracy", "accuracy, all questions (%)"),
            ("open_ended_accuracy", "accuracy, colour and shape (%)"),
            ("perplexity", "perplexity (lower is better)"),
        )
        if any(row[key] is not None for row in rows)
    ]
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != FLOAT:
            series[row["series"]].append(row)
    floats = [row for row in rows if row["method"] == FLOAT]
    figure = Figure(figsize=(6.4 * len(panels), 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        scale = 1.0 if key == "perplexity" else 100.0
        for number, (name, found) in enumerate(sorted(series.items())):
            points = sorted(
                (row["true_bits"], row[key] * scale) for row in found if row[key] is not None
            )
            if not points:
                continue
            axes.plot(
                *zip(*points, strict=True),
                marker=_MARKERS[number % len(_MARKERS)],
                color=f"C{number % 10}",
                linewidth=1.2,
                markersize=8,
                label=name,
            )
            for order, (bits, value) in enumerate(points):
                axes.annotate(
                    f"{bits:.2f}" if order else f"{name}\n{bits:.2f}",
                    (bits, value),
                    xytext=(0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=f"C{number % 10}",
                )
        for row in floats:
            if row[key] is not None:
                value = row[key] * scale
                label = f"float: {value:.4g}" if key == "perplexity" else f"float: {value:.2f} %"
                axes.axhline(value, color="black", linestyle="--", linewidth=1, label=label)
        axes.margins(x=0.08, y=0.12)
        _scale(axes, key, [row[key] * scale for row in rows if row[key] is not None])
        axes.set_xlabel("true bits per weight (every byte counted)")
        axes.set_ylabel(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=9)
    figure.suptitle(f"{rows[0]['model']} on {rows[0]['data']}")
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror}. Choose another --output."
        ) from error


def _scale(axes: Any, key: str, values: Sequence[float]) -> None:
    """No axis above 100 %; perplexities that differ by decades in plain numbers on a logarithm."""
    if key != "perplexity":
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, min(low, high - _LEAST_SPAN)), min(high, 100.0 + _LEAST_SPAN / 4))
        return
    if max(values) < 2 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator

    def plain(value: float, _: int) -> str:
        return f"{value:,.4g}" if value < 1e5 else f"{value:.0e}"

    decades = math.log10(max(values) / min(values))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
