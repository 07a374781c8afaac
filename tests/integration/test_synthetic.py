"""A tiny architecture with random weights, from `bivlm-bench --synthetic` to the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from random_checkpoints import ARCHITECTURES as TINY  # type: ignore[import-not-found]

from bivlm_edge import synthetic
from bivlm_edge.bundle import BundlePaths, read_manifest
from bivlm_edge.cli import bench
from bivlm_edge.errors import ValidationError
from bivlm_edge.runtime.inspection import inspect_bundle
from bivlm_edge.synthetic import architectures, build

NAME = "tiny"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, in which the tiny SmolVLM of the tests counts as a published architecture."""
    model = architectures.ARCHITECTURES["smolvlm-256m"]
    vocabulary = 384
    tiny = dataclasses.replace(
        model,
        module=lambda: TINY["idefics3"]()[0],
        image_processor=lambda: TINY["idefics3"]()[1],
        vocabulary=vocabulary,
        special_tokens={
            "<pad>": 0,
            "<|im_start|>": 1,
            "<end_of_utterance>": 2,
            "<image>": 3,
            "<fake_token_around_image>": 4,
            "<global-img>": 5,
        },
        pad="<pad>",
    )
    monkeypatch.setitem(architectures.ARCHITECTURES, NAME, tiny)
    monkeypatch.setattr(synthetic, "NAMES", (NAME,))
    monkeypatch.setattr(build, "NAMES", (NAME,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bivlm-edge" / "synthetic"


def _bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    options = ["--synthetic", NAME, "--new-tokens", "2", "--repeats", "1", "--warmups", "0"]
    with pytest.raises(SystemExit) as leave:
        bench.app([*options, *arguments])
    captured = capsys.readouterr()
    assert not leave.value.code, captured.err
    found: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return found


def test_bench_builds_once_and_compares_two_with_four_bits(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _bench(capsys, "--json")
    assert [model["label"] for model in result["models"]] == ["tiny-bivlm-edge", "tiny-nbits4"]
    assert [model["operators"] for model in result["models"]] == ["library", "library"]
    two, four = (synthetic.cached(NAME, method) for method in synthetic.METHODS)
    assert two.is_relative_to(tiny)
    written = two.stat().st_mtime_ns
    _bench(capsys)
    assert two.stat().st_mtime_ns == written
    found = inspect_bundle(two, verify=True)
    assert found.verified
    _check_report(two, "bivlm-edge")
    _check_report(four, "nbits4")
    _check_shared_transforms(two)
    calls: list[bool] = []
    monkeypatch.setattr(build, "build", lambda *_, overwrite, **__: calls.append(overwrite))
    _bench(capsys, "--refresh")
    assert calls == [True, True]
    assert sorted(path.name for path in two.parent.iterdir() if path.name.startswith(".")) == []


def test_bench_measures_fractions_of_a_pruned_export(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _bench(capsys, "--keep-tokens", "1", "--keep-tokens", "0.25", "--json")
    whole, quarter = result["models"]
    pruned = synthetic.cached(NAME, "bivlm-edge", pruned=True)
    assert [path.name for path in pruned.parent.glob("*.onnx")] == [pruned.name]
    assert pruned.is_relative_to(tiny)
    image_tokens = read_manifest(BundlePaths(pruned)).image_tokens
    assert whole["kept_tokens"] == whole["prompt_tokens"]
    assert whole["kept_tokens"] - quarter["kept_tokens"] == image_tokens * 3 // 4
    (ratio,) = result["ratios"]
    assert ratio["label"] == "tiny-bivlm-edge-pruned (0.25 kept)"


def test_bench_takes_a_vocabulary_at_4_bits(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for bits in ("8", "4"):
        result = _bench(capsys, "--vocabulary-bits", bits, "--json")
        sizes[bits] = [model["weight_bytes"] for model in result["models"]]
    assert all(four < eight for four, eight in zip(sizes["4"], sizes["8"], strict=True))
    built = {path.stem for path in tiny.rglob("*.onnx")}
    methods = {f"{NAME}-{method}" for method in synthetic.METHODS}
    assert built == methods | {f"{method}-vocabulary4" for method in methods}


def _check_report(path: Path, method: str) -> None:
    report = json.loads((BundlePaths(path).assets / "export_report.json").read_text())
    assert "the weights are random" in report["note"]
    assert report["config"]["quant"]["method"] == method
    layers = [layer for layer in report["layers"] if layer["name"].endswith("_proj")]
    assert len(layers) == 2 * 7 + 3 * 4
    assert {layer["method"] for layer in layers} == {method}
    assert {layer["output_error"] for layer in layers} == {None}
    if method == "bivlm-edge":
        assert 1.9 < report["true_bits_per_weight"] <= 2.0
    assert read_manifest(BundlePaths(path)).uses_custom_ops
    assert "random" in (BundlePaths(path).assets / "README.md").read_text()


def _check_shared_transforms(path: Path) -> None:
    """Layers that read one input have the same planes, signs and order: they are one operator."""
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "BinaryMatMul"]
    assert len(nodes) == 2 * 4, "q/k/v, o, gate/up and down of two decoder layers"
    assert len({node.input[0] for node in nodes}) == len(nodes)


@pytest.mark.usefixtures("tiny")
def test_parameters_take_no_memory_and_buffers_have_their_values() -> None:
    with build.NoMemory():
        module = architectures.ARCHITECTURES[NAME].module()
    real = architectures.ARCHITECTURES[NAME].module()
    linear = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
    assert all(part.weight.is_meta for part in linear)
    for (name, buffer), (_, wanted) in zip(
        module.named_buffers(), real.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, wanted), name


@pytest.mark.usefixtures("tiny")
def test_logits_that_are_not_finite_leave_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_FLOAT_SPREAD", float("nan"))
    with pytest.raises(ValidationError, match="not finite"):
        build.build(NAME, "bivlm-edge", tmp_path / "model.onnx")
    assert list(tmp_path.glob("*.onnx*")) == []
