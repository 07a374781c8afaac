"""Exports that must fail: a clear sentence, nothing at the target, an old file untouched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from random_checkpoints import save_checkpoint  # type: ignore[import-not-found]
from typer.testing import CliRunner

from bivlm_edge.cli.export import app as export_app
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import (
    CheckpointError,
    OutputError,
    RequestError,
    UnsupportedModelError,
    ValidationError,
)
from bivlm_edge.export import data_file, exporter, validate
from bivlm_edge.models import load_checkpoint

FLOAT = ExportConfig(QuantConfig(method="none"))


@pytest.mark.parametrize(
    ("arguments", "expected"), [((), None), (("--stream",), True), (("--no-stream",), False)]
)
def test_streaming_is_chosen_or_left_to_the_memory(
    arguments: tuple[str, ...],
    expected: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool | None] = []

    def load(_: object, stream: bool | None) -> None:
        seen.append(stream)
        raise CheckpointError("enough seen")

    monkeypatch.setattr("bivlm_edge.models.load_checkpoint", load)
    done = CliRunner().invoke(export_app, [str(tmp_path / "model.onnx"), *arguments])
    assert done.exit_code == CheckpointError("").exit_code
    assert seen == [expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "nbits4", "--bits", "2"), "--bits 2 does not go with --method nbits4"),
        (("--method", "none", "--bits", "2"), "--bits 2 does not go with --method none"),
        (("--tune-samples", "4"), "--tune-samples has no effect with --tune none"),
    ],
)
def test_option_that_nothing_would_read_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(export_app, [str(tmp_path / "model.onnx"), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava, CLIP and Llama", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("bits", [0.3, 0.99, 4.1, float("nan")])
def test_bits_outside_the_format_are_refused_with_the_range(bits: float) -> None:
    with pytest.raises(RequestError, match="outside 1 to 4"):
        QuantConfig(bits=bits)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, float("nan")])
def test_keep_tokens_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(RequestError, match="not a fraction"):
        PruneConfig(keep_ratio=ratio)


def test_bits_0_3_on_the_command_line_is_exit_code_2_before_anything_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "bivlm_edge.cli.export", "model.onnx", "--bits", "0.3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--bits 0.3 is outside 1 to 4" in done.stderr
    assert listing(tmp_path) == []


def test_random_pruning_with_a_fallback_is_refused() -> None:
    with pytest.raises(RequestError, match="--fallback none"):
        ExportConfig(prune=PruneConfig(mode="random", keep_ratio=0.5))


def test_a_target_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"Try 'model\.onnx'"):
        exporter.check_target(tmp_path / "model.bin", overwrite=False)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        exporter.check_target(tmp_path / "none" / "model.onnx", overwrite=False)


def test_an_unwritable_folder_is_refused() -> None:
    with pytest.raises(OutputError, match="cannot write into '/proc'"):
        exporter.check_target(Path("/proc/model.onnx"), overwrite=False)


def test_an_existing_file_is_refused_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"old")
    with pytest.raises(OutputError, match="--overwrite"):
        exporter.check_target(tmp_path / "model.onnx", overwrite=False)
    exporter.check_target(tmp_path / "model.onnx", overwrite=True)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path)


def test_an_unknown_model_type_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(
        UnsupportedModelError,
        match=r"'blip'.*Supported: idefics3, llava, llava_onevision, qwen2_5_vl, smolvlm",
    ):
        load_checkpoint(tmp_path)


def test_a_checkpoint_without_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_checkpoint(tmp_path)


def test_a_graph_that_computes_something_else_is_not_written(
    checkpoint: Path, pictures: list[VqaItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = data_file.save

    def save_damaged(model: ir.Model, path: Path, data_name: str) -> None:
        node = next(n for n in model.graph if n.name.endswith("layers.0.mlp.down_proj/MatMul"))
        value = node.inputs[1]
        assert value is not None
        assert value.const_value is not None
        value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=value.name)
        save(model, path, data_name)

    monkeypatch.setattr(data_file, "save", save_damaged)
    with pytest.raises(ValidationError, match="differ from torch by"):
        exporter.export_model(load_checkpoint(checkpoint), pictures, tmp_path / "m.onnx", FLOAT)
    assert listing(tmp_path) == []


def test_a_graph_that_keeps_one_corner_of_the_picture_is_not_written(
    checkpoint: Path, pictures: list[VqaItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = data_file.save

    def save_without_places(model: ir.Model, path: Path, data_name: str) -> None:
        (prune,) = (node for node in model.graph.all_nodes() if node.op_type == "TokenPrune")
        metric = prune.inputs[4]
        assert metric is not None
        gather = metric.producer()
        assert gather is not None
        table = gather.inputs[0]
        assert table is not None
        assert table.const_value is not None
        rows = table.const_value.numpy()
        # far from the last row all others seem to be one place
        rows = np.concatenate([np.repeat(rows[:1], len(rows) - 1, 0), rows[-1:]])
        table.const_value = ir.tensor(rows, name=table.name)
        save(model, path, data_name)

    monkeypatch.setattr(data_file, "save", save_without_places)
    config = ExportConfig(QuantConfig(method="none"), PruneConfig(keep_ratio=0.25))
    with pytest.raises(ValidationError, match="of the picture uncovered"):
        exporter.export_model(load_checkpoint(checkpoint), pictures, tmp_path / "m.onnx", config)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()]
)
def test_a_full_disk_or_an_interrupt_leaves_the_old_export_as_it_was(
    failure: BaseException,
    checkpoint: Path,
    pictures: list[VqaItem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old graph")
    (tmp_path / "m.onnx.data").write_bytes(b"old data")

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(validate, "OnnxRunner", fail)
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        exporter.export_model(load_checkpoint(checkpoint), pictures, target, FLOAT, overwrite=True)
    assert listing(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert target.read_bytes() == b"old graph"
    assert (tmp_path / "m.onnx.data").read_bytes() == b"old data"


def test_a_failing_rename_puts_the_old_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = exporter.BundlePaths(tmp_path / "m.onnx")
    for path in (paths.graph, paths.data):
        path.write_text("old")
    rename = Path.rename

    def fail_for_new_graph(self: Path, target: Path) -> Path:
        if target == paths.graph and self.read_text() == "new":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new_graph)
    with pytest.raises(OutputError):
        write_new(paths)
    assert listing(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert paths.graph.read_text() == paths.data.read_text() == "old"


def write_new(paths: exporter.BundlePaths) -> None:
    with exporter.staging(paths, overwrite=True) as staged:
        staged.assets.mkdir()
        staged.graph.write_text("new")
        staged.data.write_text("new")
