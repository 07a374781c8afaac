"""An analysis as a page, a table of CSV and a picture."""

from __future__ import annotations

import csv
import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from known_model import TOKENS, ColourBlind, Known, needs_of, questions_of, report_of
from PIL import Image

from bivlm_edge.redundancy import pages, plot
from bivlm_edge.redundancy.analysis import analyse
from bivlm_edge.redundancy.answering import Cost
from bivlm_edge.redundancy.plan import NO_IMAGE, RANDOM, RARE_TEXT, Run, Setting


def _two_reports() -> list[dict[str, Any]]:
    costs = {
        kept: Cost(1.0 + kept, 1024 * kept, kept + 9) for kept in (64, 32, 16, 8, 7, 4, 2, 1, 0)
    }
    reports = []
    for name, times in (("two_bit", 1), ("float", 2)):
        known = Known(questions_of(3000), needs_of(mmr=times, random=3))
        setting = Setting(("mmr", RANDOM), seeds=2)
        result = analyse(
            known.questions, setting, TOKENS, "mmr", known.ask, lambda numbers: {
                number: costs[number] for number in numbers
            },
        )  # fmt: skip
        reports.append(report_of(result, name))
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


def test_a_kind_of_question_without_a_k_star_is_shown_as_such() -> None:
    known = ColourBlind(questions_of(3000), needs_of(mmr=1, random=2))
    setting = Setting(("mmr", RANDOM), seeds=1)
    report = report_of(analyse(known.questions, setting, TOKENS, "mmr", known.ask), "two_bit")
    (row, _) = pages.needs([report]).rows
    assert row[-2:] == ["-", "11"]
    assert "a kind of question of which that is so has no K* (-)" in pages.markdown(
        [report], None
    ).replace("\n", " ")
    pytest.importorskip("matplotlib")
    figure = plot._figure([report])
    (colour,) = (axes for axes in figure.get_axes() if axes.get_title().startswith("colour"))
    assert colour.get_title().endswith("picture not used: no K*")
    assert [text.get_text() for text in colour.get_legend().get_texts()][:2] == ["mmr", RANDOM]
    figure.draw_without_rendering()


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
    known = Known(questions_of(300), needs_of(mmr=1, random=3, uniform=2, maxmin=1.5))
    setting = Setting(("mmr", RANDOM, "uniform", "maxmin"), seeds=1, tolerance=0.1)
    reports = []
    for tokens in (256, 64):
        result = analyse(
            known.questions, setting, tokens, "mmr", known.ask,
            lambda numbers: {number: Cost(1.0 + number, number, number) for number in numbers},
        )  # fmt: skip
        reports.append(report_of(result, f"of {tokens}"))
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
    known = Known(questions_of(300), {})
    blind = analyse(
        known.questions, Setting(("mmr",)), TOKENS, "mmr",
        lambda run: known.ask(Run(NO_IMAGE, run.kept)),
    )  # fmt: skip
    report = report_of(blind, "blind")
    assert np.asarray(Image.open(io.BytesIO(plot.png([report])))).std() > 5
    page = pages.markdown([report], None)
    assert "**blind: IMAGE_NOT_USED.** The model does not use the image" in page
    assert pages.csv_text([report]).count("\n") == 1
