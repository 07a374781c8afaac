"""What a command raises becomes a message and an exit code."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console

from bivlm_edge import report
from bivlm_edge.cli.common import command_errors, progress, show
from bivlm_edge.errors import BundleError, RequestError, ValidationError


def _raise(error: BaseException, *, debug: bool = False) -> int:
    @command_errors("bivlm-test")
    def command(*, _debug: bool) -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command(_debug=debug)
    return int(caught.value.exit_code)


@pytest.mark.parametrize(
    ("error", "code"),
    [(RequestError("no"), 2), (BundleError("bad"), 3), (ValidationError("differs"), 1)],
)
def test_bivlm_error_is_one_line_with_its_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _raise(error) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"bivlm-test: {error}\n")


def test_unexpected_error_tells_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert _raise(ZeroDivisionError("two\nlines")) == 1
    message = capsys.readouterr().err
    assert message.startswith("bivlm-test: unexpected ZeroDivisionError: two lines.")
    assert "--debug" in message
    assert len(message.splitlines()) == 1


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert _raise(ZeroDivisionError("x"), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_exits_130_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert _raise(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""


def test_exit_of_the_command_itself_passes() -> None:
    assert _raise(typer.Exit(7)) == 7


def test_progress_is_silent_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress("counting", 3) as advance:
        for done in (1, 2, 3):
            advance(done)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_tables_are_not_cut_where_stdout_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = {"n": 1, "correct": 1, "accuracy": 1.0, "interval": [0.2, 1.0]}
    show(report.evaluation_table({**score, "per_kind": {"k" * 60: score}, "open_ended": score}))
    out = capsys.readouterr().out
    assert "k" * 60 in out
    assert "open-ended" in out


def test_json_is_one_line_and_refuses_nan() -> None:
    assert json.loads(report.to_json({"a": [1, "é"]})) == {"a": [1, "é"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        report.to_json({"a": float("nan")})


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "-"), (0, "0 B"), (10_239, "10,239 B"), (10_240, "10.0 KiB"), (3 << 20, "3.0 MiB")],
)
def test_human_bytes(size: int | None, text: str) -> None:
    assert report.human_bytes(size) == text


def test_planes_and_missing_numbers_have_a_form() -> None:
    layer = {
        "name": "a",
        "op": "Gemm",
        "method": "m",
        "n": 1,
        "k": 2,
        "bytes": 3,
        "true_bits": 32.0,
        "reported_bits": 3.39,
    }
    rows = [
        {**layer, "planes": planes, "hadamard_block": 0, "output_error": None}
        for planes in (None, [64], [64, 32])
    ]
    result = {
        "name": "x", "layers": rows, "tables": [], "file_bytes": {"graph": 1}, "skipped": {},
        "true_bits_per_weight": None, "verified": False,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    for table in report.inspection_tables(result):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert "64/32" in console.file.getvalue()
    assert "32.000 (as 3.390)" in console.file.getvalue()


def test_export_table_shows_other_bits_where_reported(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "model": "m", "true_bits_per_weight": 2.0, "file_bytes": {"graph": 1, "data": 2},
        "skipped": {}, "seconds": 1.0, "validation": [],
    }  # fmt: skip
    show(*report.export_tables("a.onnx", {**values, "true_bits_all_linear": None}))
    assert "linear layers" not in capsys.readouterr().out
    other = {"file_bits_per_parameter": 3.125, "true_bits_all_linear": 2.0625}
    show(*report.export_tables("a.onnx", {**values, **other}))
    out = capsys.readouterr().out
    assert "3.1250" in out
    assert "2.0625" in out
