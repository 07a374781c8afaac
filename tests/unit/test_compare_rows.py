"""Finished runs on disk, and the pages made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bivlm_edge.cli.compare import _setting
from bivlm_edge.compare import job, plot, runner, tables
from bivlm_edge.compare.rows import (
    REQUIRED,
    RowFolder,
    fingerprint,
    read_rows,
    rows_text,
)
from bivlm_edge.compare.runner import Setting, run_all
from bivlm_edge.compare.specification import Run, parse_run
from bivlm_edge.datasets import calibrating_data
from bivlm_edge.errors import DataError, OutputError, RequestError
from bivlm_edge.files import write_text
from bivlm_edge.quant.quantizer import LayerReport, QuantizedModel


def row(run: str, true_bits: float, **values: Any) -> dict[str, Any]:
    parsed = parse_run(run)
    base: dict[str, Any] = {
        "method": parsed.config.method,
        "budget": parsed.budget,
        "claimed_bits": 1.014,
        "true_bits": true_bits,
        "accuracy": 0.5,
        "open_ended_accuracy": None,
        "perplexity": 8.0,
        "seconds": 12.3,
        "peak_mb": 456.7,
        "run": run,
        "series": parsed.series,
        "seed": 0,
        "options": {"calibration_samples": 16},
        "questions": 1000,
        "model": "toy",
        "data": "easy-vqa",
        "calibration": "pictures",
        "threads": 1,
        "machine": "abacus",
        "code": "0123",
        "libraries": {"torch": "2"},
    }
    return {**base, **values}


ROWS = [
    row("none", 32.0, perplexity=4.0, accuracy=0.75),
    row("bivlm-edge@2", 1.9984),
    row("bivlm-edge@1.25", 1.2491, perplexity=1e6),
    row("bivlm-paper", 3.39, perplexity=None, peak_mb=None),
]


def test_row_is_found_again_only_under_the_same_identity(tmp_path: Path) -> None:
    folder = RowFolder(tmp_path / "rows")
    identity = {"seed": 0, "without": frozenset({"b", "a"})}
    assert folder.load("rtn@2", identity) is None
    folder.save("rtn@2", identity, ROWS[0])
    assert folder.load("rtn@2", {"without": frozenset({"a", "b"}), "seed": 0}) == ROWS[0]
    assert folder.load("rtn@2", {**identity, "seed": 1}) is None


@pytest.mark.parametrize("damage", ["", "{}", '{"identity": {"seed": 0}, "row": {"method": "x"}}'])
def test_damaged_row_is_refused_with_advice(damage: str, tmp_path: Path) -> None:
    folder = RowFolder(tmp_path)
    folder.save("rtn@2", {"seed": 0}, ROWS[0])
    [path] = tmp_path.glob("*.json")
    path.write_text(damage)
    with pytest.raises(DataError, match=r"row of run 'rtn@2' .* is damaged\. Delete this file"):
        folder.load("rtn@2", {"seed": 0})


def test_fingerprint_changes_with_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == first
    (tmp_path / "a.txt").write_text("two")
    second = fingerprint(str(tmp_path))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, fingerprint(str(tmp_path))}) == 3
    assert fingerprint("org/model") == "org/model"


def test_fingerprint_of_questions_changes_with_their_pictures(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures" / "a.png"
    picture.write_bytes(b"one")
    (tmp_path / "lists").mkdir()
    list_file = tmp_path / "lists" / "q.jsonl"
    list_file.write_text('{"image": "../pictures/a.png", "question": "q", "answer": "a"}\n')
    first, folder = fingerprint(str(list_file)), fingerprint(str(list_file.parent))
    picture.write_bytes(b"two")
    assert fingerprint(str(list_file)) != first
    assert fingerprint(str(list_file.parent)) != folder
    picture.unlink()
    with pytest.raises(DataError, match=r"a\.png"):
        fingerprint(str(list_file))


def test_rows_file_has_a_row_per_line_with_the_required_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_text(path, rows_text(ROWS))
    assert read_rows(path) == ROWS
    lines = path.read_text().splitlines()[1:-1]
    assert [json.loads(line.rstrip(",")) for line in lines] == ROWS
    assert {
        "method", "budget", "claimed_bits", "true_bits", "accuracy", "open_ended_accuracy",
        "perplexity", "seconds", "peak_mb",
    } == REQUIRED  # fmt: skip


@pytest.mark.parametrize("content", ["[]", "{", '[{"method": "rtn"}]', "[1]"])
def test_file_without_rows_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"rows\.json (cannot be read|holds no rows)"):
        read_rows(path)


def test_page_has_the_table_and_what_it_was_measured_on() -> None:
    page = tables.markdown(ROWS, "picture.png")
    lines = page.splitlines()
    assert (
        "| run | claimed bits | true bits | accuracy | perplexity | x float | seconds | peak MB |"
        in lines
    )
    assert "| float | 1.014 | 32 | 75.00% | 4.0000 | 1.000 | 12 | 457 |" in lines
    assert "| bivlm-edge@2 | 1.014 | 1.9984 | 50.00% | 8.0000 | 2.000 | 12 | 457 |" in lines
    assert "| bivlm-edge@1.25 | 1.014 | 1.2491 | 50.00% | 1e+06 | 2.5e+05 | 12 | 457 |" in lines
    assert "| bivlm-paper | 1.014 | 3.39 | 50.00% | not finite | - | 12 | - |" in lines
    assert "1,000 questions" in page
    assert "pictures, 16 samples; seed 0" in page
    assert "abacus, 1 thread" in page


def test_page_says_which_seconds_are_those_of_the_last_start() -> None:
    page = tables.markdown([ROWS[0], {**ROWS[1], "resumed": True}])
    assert "| 2.000 | > 12 | 457 |" in page
    assert "went on where it had been" in page
    assert "went on where it had been" not in tables.markdown(ROWS)


def test_page_of_a_language_model_has_no_accuracy() -> None:
    rows = [{**r, "accuracy": None, "questions": None, "windows": [128, 512]} for r in ROWS]
    page = tables.markdown(rows)
    assert "accuracy" not in page
    assert "128 windows of 512 tokens" in page
    assert "![" not in page


def test_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.draw(ROWS, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="cannot write"):
        plot.draw(ROWS, tmp_path / "absent" / "a.png")


def test_missing_matplotlib_is_noticed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RequestError, match=r"pip install 'bivlm-edge\[plots\]', or add --no-plot"):
        plot.require_matplotlib()


SETTING = Setting("model", "data", None, None, "pictures", 1)
MEASURED = {key: value for key, value in ROWS[0].items() if key in REQUIRED - {"method", "budget"}}


def test_second_start_runs_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure(run: Run, *_: Any) -> dict[str, Any]:
        asked.append(run.name)
        if run.name == "rtn@4" and asked.count("rtn@4") == 1:
            raise runner._RunFailed("no memory", 1)
        return MEASURED

    monkeypatch.setattr(runner, "_measure", measure)
    runs = [parse_run("none"), parse_run("rtn@4"), parse_run("rtn@2")]
    rows, failures = run_all(runs, SETTING, "toy", tmp_path, lambda *_: None)
    assert [row["run"] for row in rows] == ["none", "rtn@2"]
    assert [(failure.run, failure.reason) for failure in failures] == [("rtn@4", "no memory")]
    again, failures = run_all(runs, SETTING, "toy", tmp_path, lambda *_: None)
    assert (again[0], again[2], failures) == (rows[0], rows[1], [])
    assert asked == ["none", "rtn@4", "rtn@2", "rtn@4"]
    monkeypatch.setattr(runner, "code_version", lambda: "other")
    run_all(runs, SETTING, "toy", tmp_path, lambda *_: None)
    assert asked[4:] == ["none", "rtn@4", "rtn@2"]


def test_work_of_a_run_is_kept_until_its_row_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def measure(_run: Run, _setting: Setting, _logs: Path, work: Path, _tell: Any) -> Any:
        seen.append(work)
        work.mkdir(parents=True, exist_ok=True)
        if len(seen) == 1:
            raise runner._RunFailed("killed", 1)
        return MEASURED

    monkeypatch.setattr(runner, "_measure", measure)
    run_all([parse_run("rtn@4")], SETTING, "toy", tmp_path, lambda *_: None)
    assert seen[0].is_dir()
    run_all([parse_run("rtn@4"), parse_run("rtn@2")], SETTING, "toy", tmp_path, lambda *_: None)
    assert seen[1] == seen[0] != seen[2]
    assert not any((tmp_path / "work").iterdir())


def test_method_that_claims_nothing_claims_its_true_bits() -> None:
    def report(true_bits: float, claimed_bits: float) -> LayerReport:
        return LayerReport("q", 64, 64, "m", None, 0, true_bits, claimed_bits, None, False)

    class Shared(QuantizedModel):
        true_bits = 1.9  # type: ignore[assignment]  # less than any layer alone

    weights: Any = {"q": None}
    plain = Shared(weights, [report(2.0, 2.0), report(2.1, 2.1)])
    assert job._bits(plain) == {"claimed_bits": 1.9, "true_bits": 1.9}
    paper = Shared(weights, [report(2.0, 1.0), report(2.1, 1.1)])
    assert job._bits(paper) == {"claimed_bits": pytest.approx(1.05), "true_bits": 1.9}


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9", 1),
        ("import sys; sys.exit('Boom')", "Boom", 1),
        ("""print('{"error": "bad layer", "exit_code": 3}')""", "bad layer", 3),
    ],
)
def test_process_that_dies_is_a_failure_with_its_reason(
    script: str, reason: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner.subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return real([command[0], "-c", script], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    _, failures = run_all([parse_run("rtn@2")], SETTING, "toy", tmp_path, lambda *_: None)
    assert reason in failures[0].reason
    assert failures[0].exit_code == code


@pytest.mark.parametrize(
    ("data", "calibration", "expected"),
    [
        (None, None, ("easy-vqa", None, "easy-vqa training pictures")),
        ("scenes", None, ("scenes", None, "scenes training pictures")),
        ("easy-vqa", Path("scenes"), ("easy-vqa", "scenes", "scenes")),
    ],
)
def test_named_questions_calibrate_on_their_own_train_split(
    data: str | None, calibration: Path | None, expected: tuple[str, str | None, str]
) -> None:
    setting = _setting(None, data, calibration, None, 1, reads_text=False)
    assert (setting.data, setting.calibration, setting.calibration_name) == expected
    assert calibrating_data(setting.data) == setting.data
