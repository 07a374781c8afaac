"""`bivlm-export --keep-tokens auto` from the command line to the file's default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bivlm_edge.bundle import BundlePaths, check_files
from bivlm_edge.cli import export
from bivlm_edge.datasets import VqaItem
from bivlm_edge.runtime import Answerer, load

CHEAP = ["--method", "rtn", "--bits", "8", "--calibration-samples", "8"]


def test_the_chosen_number_is_the_default_of_the_file(
    tmp_path: Path, pictures: list[VqaItem]
) -> None:
    target = tmp_path / "model.onnx"
    auto = ["--keep-tokens", "auto", "--tolerance", "25", "--validation-questions", "60", "--json"]
    found = CliRunner().invoke(export.app, [str(target), *CHEAP, *auto])
    assert found.exit_code == 0, found.output
    choice = json.loads(found.stdout)["keep_tokens"]
    kept = choice["kept"]
    assert 1 <= kept < 64
    assert choice["questions"] == 60
    assert choice["data"] == "easy-vqa, validation"
    assert choice["message"].startswith(f"mmr keeps {kept} of 64")
    assert {point["kept"] for point in choice["tested"]} >= {64, 32, kept, 0}
    report = json.loads((tmp_path / "model.assets/export_report.json").read_text())
    assert report["keep_tokens"] == choice
    session = load(target, threads=1)
    check_files(BundlePaths(target), session.manifest, whole=True)
    prune = session.manifest.config["prune"]
    assert (prune["keep_ratio"], prune["tolerance"]) == (kept / 64, 25)
    for session_kept, wanted in ((session, kept), (session.keeping(40), 40)):
        answerer = Answerer(session_kept)
        asked = answerer.ask("what color is this?", answerer.picture(pictures[0].image.open()))
        next(asked)
        assert asked.prompt_tokens - asked.kept_tokens == 64 - wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tolerance", "2"], "--tolerance 2.0 is read with --keep-tokens auto alone"),
        (["--validation", "scenes"], "--validation scenes is read with --keep-tokens auto alone"),
        (["--keep-tokens", "auto", "--tolerance", "0"], "--tolerance 0 is not between 0 and 100"),
        (["--keep-tokens", "half"], "--keep-tokens 'half' is neither a fraction in"),
        (["--keep-tokens", "auto", "--validation-questions", "0"], "leaves no question to ask"),
    ],
)
def test_options_that_cannot_hold_are_refused(
    options: list[str], message: str, tmp_path: Path
) -> None:
    found = CliRunner().invoke(export.app, [str(tmp_path / "model.onnx"), *options])
    assert found.exit_code == 2
    assert message in found.stderr


def test_calibration_pictures_without_answers_choose_nothing(
    tmp_path: Path, pictures: list[VqaItem]
) -> None:
    folder = str(pictures[0].image.path.parent)
    arguments = [str(tmp_path / "model.onnx"), *CHEAP, "--calibration", folder]
    found = CliRunner().invoke(export.app, [*arguments, "--keep-tokens", "auto"])
    assert found.exit_code == 2
    assert "auto needs questions with known answers; there are none" in found.stderr
    assert not list(tmp_path.glob("*.onnx"))
