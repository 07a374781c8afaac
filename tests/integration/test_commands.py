"""The commands as a user types them, on a real export of the reference model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.datasets import load_easy_vqa


def command(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", f"bivlm_edge.cli.{name}", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return values


def test_run_answers_a_question_with_and_without_the_library(
    two_bit_export: BundlePaths, tmp_path: Path
) -> None:
    item = next(item for item in load_easy_vqa("test") if item.kind == "color")
    item.image.open().save(tmp_path / "picture.png")
    arguments = (two_bit_export.graph, "--image", "picture.png", item.question)
    fast = command("run", *arguments, cwd=tmp_path)
    stock = command("run", *arguments, "--no-custom-ops", cwd=tmp_path)
    assert (fast.returncode, fast.stdout.strip()) == (0, item.answer), fast.stderr
    assert (stock.returncode, stock.stdout.strip()) == (0, item.answer), stock.stderr


def test_eval_reports_accuracy_of_a_model_that_sees(
    two_bit_export: BundlePaths, tmp_path: Path
) -> None:
    done = command(
        "eval", two_bit_export.graph, "--data", "easy-vqa", "--limit", 300, "--json", cwd=tmp_path
    )
    values = last_json(done)
    assert values["n"] == 300
    assert values["accuracy"] >= 0.9  # question-only: 0.67
    assert values["open_ended_accuracy"] >= 0.8  # question-only: 0.23


def test_inspect_counts_two_bits_from_the_file(two_bit_export: BundlePaths, tmp_path: Path) -> None:
    values = last_json(command("inspect", two_bit_export.graph, "--json", "--verify", cwd=tmp_path))
    assert 1.9 < values["true_bits_per_weight"] <= 2.0
    binary = [layer for layer in values["layers"] if layer["op"] == "BinaryMatMul"]
    assert len(binary) == 54
    assert set(values["skipped"]) == {
        "lm_head",
        "model.language_model.embed_tokens",
        "model.vision_tower.embeddings.patch_embedding",
        "model.vision_tower.embeddings.position_embedding",
    }
    size = sum(path.stat().st_size for path in (two_bit_export.graph, two_bit_export.data))
    assert values["file_bytes"]["graph"] + values["file_bytes"]["data"] == size


def test_two_processes_of_torchrun_write_one_export(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", "2", "-m", "bivlm_edge.cli.export"),
            *("model.onnx", "--calibration-samples", "32", "--json"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    summary = last_json(done)
    assert len(done.stdout.strip().splitlines()) == 1  # the first process alone prints
    values = last_json(command("inspect", "model.onnx", "--json", "--verify", cwd=tmp_path))
    # the summary is rounded to six digits
    assert values["true_bits_per_weight"] == pytest.approx(
        summary["true_bits_per_weight"], abs=1e-6
    )
    assert 1.9 < values["true_bits_per_weight"] <= 2.0


def test_bench_compares_two_models_in_one_run(
    two_bit_export: BundlePaths, float_export: BundlePaths, tmp_path: Path
) -> None:
    done = command(
        "bench", two_bit_export.graph, "--compare", float_export.graph, "--json", cwd=tmp_path
    )
    values = last_json(done)
    models = values["models"]
    assert len(models) == 2
    assert models[0]["weight_bytes"] < models[1]["weight_bytes"] / 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncate", "truncated or belongs to another export"),
        ("alter", "does not have the checksum"),
        ("remove", "is missing"),
    ],
)
def test_a_damaged_data_file_is_exit_code_3_with_what_to_do(
    damage: str, words: str, two_bit_export: BundlePaths, tmp_path: Path
) -> None:
    copy = BundlePaths(tmp_path / "model.onnx")
    shutil.copy(two_bit_export.graph, copy.graph)
    shutil.copytree(two_bit_export.assets, copy.assets)
    content = bytearray(two_bit_export.data.read_bytes())
    if damage == "truncate":
        copy.data.write_bytes(content[:-1000])
    elif damage == "alter":
        content[:] = bytes(255 - byte for byte in content)
        copy.data.write_bytes(content)
    done = command("run", copy.graph, "hello", cwd=tmp_path)
    assert done.returncode == 3
    assert words in done.stderr
    assert "export again" in done.stderr.lower()
