"""bivlm-compare as a user types it, and its numbers against those of the exported file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.calibration.batches import make_batches
from bivlm_edge.compare.evaluation import answer, score
from bivlm_edge.config import ExportConfig, QuantConfig
from bivlm_edge.datasets import VqaItem, load_easy_vqa
from bivlm_edge.export.exporter import export_model
from bivlm_edge.export.validate import QUANTIZED_BOUND
from bivlm_edge.models import VisionLanguageModel, load_checkpoint
from bivlm_edge.quant.quantizer import quantize_model
from bivlm_edge.quant.vocabulary import round_vocabulary
from bivlm_edge.reference import checkpoint_path
from bivlm_edge.runtime import Answerer, Generation, load
from bivlm_edge.runtime.evaluate import evaluate

CONFIGS = (
    QuantConfig(method="rtn", bits=2.0, calibration_samples=16),
    QuantConfig(method="bivlm-edge", bits=1.1, calibration_samples=16),
)


@pytest.fixture(scope="module")
def questions() -> list[VqaItem]:
    """Sixty questions, every kind among them."""
    return load_easy_vqa("test")[::160]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config.method)
def config(request: pytest.FixtureRequest) -> QuantConfig:
    """Coarse enough for some wrong answers."""
    chosen: QuantConfig = request.param
    return chosen


@pytest.fixture(scope="module")
def quantized(config: QuantConfig) -> VisionLanguageModel:
    """The quantized reference model in torch."""
    vlm = load_checkpoint(checkpoint_path())
    samples = config.calibration_samples
    batches = make_batches(vlm.prepare, load_easy_vqa("train"), samples, config.seed)
    quantize_model(vlm, batches, config)
    round_vocabulary(vlm.module)
    return vlm


@pytest.fixture(scope="module")
def coarse_export(config: QuantConfig, tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    """The same as a file."""
    return export_model(
        load_checkpoint(checkpoint_path()),
        load_easy_vqa("train"),
        tmp_path_factory.mktemp("coarse") / "model.onnx",
        ExportConfig(config),
    ).paths


def test_answers_in_torch_are_those_of_the_export(
    quantized: VisionLanguageModel, coarse_export: BundlePaths, questions: list[VqaItem]
) -> None:
    answerer = Answerer(load(str(coarse_export.graph)))
    found = answer(quantized, questions)
    for item, text in zip(questions, found.texts, strict=True):
        generation = answerer.ask(item.question, answerer.picture(item.image.open()))
        assert text == answerer.prompts.decode(generation), item.question
    exported = evaluate(answerer, questions)
    scores = score(questions, found)
    assert (scores.overall, scores.open_ended) == (exported.overall, exported.open_ended)
    assert scores.per_kind == exported.per_kind


def test_perplexity_in_torch_is_that_of_the_export(
    quantized: VisionLanguageModel, coarse_export: BundlePaths, questions: list[VqaItem]
) -> None:
    """Teacher forcing through the file, one token after the other, as its runs see them."""
    answerer = Answerer(load(str(coarse_export.graph)))
    nats = []
    for item in questions[:20]:
        expected = quantized.tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        steps: list[np.ndarray[tuple[int], np.dtype[np.float32]]] = []

        def forced(logits: np.ndarray, steps: list = steps, expected: list = expected) -> int:  # type: ignore[type-arg]
            steps.append(logits)
            return int(expected[len(steps) - 1])

        generation: Generation = answerer.ask(
            item.question,
            answerer.picture(item.image.open()),
            max_new_tokens=len(expected),
            sampler=forced,
        )
        assert list(generation) == expected
        for logits, token in zip(steps, expected, strict=True):
            nats.append(-float(torch.tensor(logits).double().log_softmax(0)[token]))
    likelihood = answer(quantized, questions[:20]).expected
    assert likelihood.tokens == len(nats)
    # int8 activations: the file's logits differ from torch's by up to QUANTIZED_BOUND of theirs
    assert likelihood.nats == pytest.approx(sum(nats), rel=QUANTIZED_BOUND, abs=0.05)


def test_answers_do_not_depend_on_the_batch(
    quantized: VisionLanguageModel, questions: list[VqaItem]
) -> None:
    together = answer(quantized, questions[:12])
    alone = [answer(quantized, [item]) for item in questions[:12]]
    assert together.texts == [text for answers in alone for text in answers.texts]
    total = sum(answers.expected.nats for answers in alone)
    assert together.expected.nats == pytest.approx(total, rel=1e-4)
    assert together.expected.tokens == sum(answers.expected.tokens for answers in alone)


def compare(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "bivlm_edge.cli.compare", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_writes_rows_page_and_picture_and_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--method", "rtn", "--limit", 40, "--calibration-samples", 16, "--json", "r.json")
    done = compare(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(row["method"], row["budget"]) for row in rows] == [("none", None), ("rtn", 2.0)]
    reference, rtn = rows
    assert reference["true_bits"] == 32
    assert 2.0 < rtn["true_bits"] < 2.5
    assert reference["accuracy"] >= 0.95
    assert reference["perplexity"] < 1.2
    assert rtn["questions"] == 40
    assert 100 < rtn["quantization_peak_mb"] <= rtn["peak_mb"]
    assert (tmp_path / "comparison" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "| rtn@2 | " in page
    kept = sorted((tmp_path / "comparison" / "rows").iterdir())
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    again = compare(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "r.json").read_text()) == rows
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_killed_run_goes_on_behind_its_last_finished_layer(tmp_path: Path) -> None:
    arguments = ("--no-plot", "--run", "gptq@2", "--limit", 40, "--calibration-samples", 16)
    whole = tmp_path / "whole"
    assert compare(*arguments, "--output", whole, cwd=tmp_path).returncode == 0
    killed = tmp_path / "killed"
    shutil.copytree(whole / "rows", killed / "rows")
    for row in (killed / "rows").glob("gptq*"):
        row.unlink()
    command = [sys.executable, "-P", "-m", "bivlm_edge.cli.compare", *map(str, arguments)]
    process = subprocess.Popen([*command, "--output", str(killed)], start_new_session=True)
    while process.poll() is None and len(list(killed.glob("work/*/layers.*"))) < 2:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("work/*/layers.*")}
    assert len(kept) >= 2
    again = compare(*arguments, "--output", killed, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert not any((killed / "work").iterdir())
    [_, row] = json.loads((killed / "comparison.json").read_text())
    [_, expected] = json.loads((whole / "comparison.json").read_text())
    assert (expected["resumed"], row["resumed"]) == (False, True)
    for key in ("accuracy", "perplexity", "true_bits", "claimed_bits"):
        assert row[key] == expected[key], key


def test_one_of_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = compare("--no-plot", "--method", "rtn", cwd=tmp_path)
    assert done.returncode == 2
    assert "one of 2 processes (WORLD_SIZE)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (
            ("--method", "rtn", "--calibration-samples", "0"),
            "--calibration-samples 0 is less than 1",
            2,
        ),
        (("--method", "rtn", "--budget", "1.25"), "--bits 1.25 does not go with", 2),
        ((), "nothing to compare", 2),
        (("--method", "rtn", "--data", "sherlock"), "needs questions: easy-vqa, scenes or", 2),
        (("--method", "rtn", "--data", "gone.jsonl"), "--data gone.jsonl does not exist", 3),
        (("--method", "rtn", "--limit", "0"), "--limit 0 is less than 1", 2),
        (("--from", "gone.json"), "gone.json cannot be read", 3),
    ],
)
def test_wrong_request_is_answered_before_anything_runs(
    arguments: tuple[str, ...], message: str, code: int, tmp_path: Path
) -> None:
    done = compare("--no-plot", *arguments, cwd=tmp_path)
    assert message in done.stderr
    assert done.returncode == code
    assert not (tmp_path / "comparison").exists() or not any((tmp_path / "comparison").iterdir())
