"""Resuming: the same bytes as without interruption, damage found, foreign folders refused."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import OutputError, RequestError
from bivlm_edge.quant import work_folder
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.quantizer import QuantizedModel, quantize_model
from bivlm_edge.quant.weights import DenseWeight
from bivlm_edge.quant.work_folder import RUN_FILE, WorkFolder, pack_weight, unpack_weight

CONFIG = QuantConfig(bits=2.5)


class Block(nn.Module):
    """Two layers on the same input, one behind them with a bias to correct."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(64, 80, bias=False)
        self.right = nn.Linear(64, 80)
        self.out = nn.Linear(80, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.left(x).relu() * self.right(x))


class Chain(nn.Module):
    """Three blocks behind a layer that is too narrow to be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return type("Output", (), {"logits": self.head(x)})()


class Part:
    name = "decoder"

    def __init__(self, module: Chain) -> None:
        self.blocks = [(f"blocks.{i}", block) for i, block in enumerate(module.blocks)]


class ChainModel:
    """Stands in for models.VisionLanguageModel."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = Chain().eval().requires_grad_(False)

    def block_sequences(self) -> list[Part]:
        return [Part(self.module)]


def make_batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 8, 64, generator=generator)} for _ in range(count)]


def contents(model: ChainModel, result: QuantizedModel) -> dict[str, bytes]:
    """Everything that a quantization leaves behind."""
    found = {name: value.numpy().tobytes() for name, value in model.module.state_dict().items()}
    for name, weight in result.weights.items():
        values, arrays = pack_weight(name, weight)
        found |= {key: array.tobytes() for key, array in arrays.items()}
        found[f"{name} values"] = repr(values).encode()
    found["reports"] = repr(result.reports).encode()
    found["rest"] = repr((list(result.weights), result.stacked, result.skipped)).encode()
    return found


@functools.cache
def uninterrupted() -> dict[str, bytes]:
    model = ChainModel()
    return contents(model, quantize_model(model, make_batches(), CONFIG))


class Stopped(Exception):  # noqa: N818 - no error
    """What ends a run in the middle."""


def stop_at(layer: str) -> Callable[[str, int, int], None]:
    def progress(name: str, _: int, __: int) -> None:
        if name == layer:
            raise Stopped

    return progress


def resume(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Contents after another run, and the layers that it quantized itself."""
    model = ChainModel()
    done: list[str] = []
    result = quantize_model(
        model, make_batches(), CONFIG, lambda name, _, __: done.append(name), folder
    )
    return contents(model, result), done


@pytest.mark.parametrize(
    ("layer", "left"),
    [
        ("blocks.0.left", 9),
        ("blocks.1.out", 4),
        ("blocks.2.out", 1),
    ],
)
def test_interrupted_run_goes_on_behind_the_last_finished_layer(
    tmp_path: Path, layer: str, left: int
) -> None:
    with pytest.raises(Stopped):
        quantize_model(ChainModel(), make_batches(), CONFIG, stop_at(layer), tmp_path / "work")
    found, done = resume(tmp_path / "work")
    assert found == uninterrupted()
    assert len(done) == left
    assert done[0] == layer
    again, none = resume(tmp_path / "work")
    assert again == found
    assert not none


def test_planning_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bivlm_edge.quant import planning

    planned: list[str] = []
    plan = planning.group_plans

    def stop_at_third(layers: Any, *rest: Any) -> Any:
        if len(planned) == 2:
            raise Stopped
        planned.append(layers[0].name)
        return plan(layers, *rest)

    monkeypatch.setattr(planning, "group_plans", stop_at_third)
    with pytest.raises(Stopped):
        quantize_model(ChainModel(), make_batches(), CONFIG, work_folder=tmp_path)
    planned.clear()
    monkeypatch.setattr(
        planning, "group_plans", lambda *a: planned.append(a[0][0].name) or plan(*a)
    )
    found, _ = resume(tmp_path)
    assert planned == ["blocks.1.left", "blocks.1.out", "blocks.2.left", "blocks.2.out"]
    assert found == uninterrupted()


def test_killed_process_goes_on(tmp_path: Path) -> None:
    script = (
        "import importlib.util, os, pathlib, signal, sys\n"
        f"spec = importlib.util.spec_from_file_location('chain', {str(Path(__file__))!r})\n"
        "chain = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(chain)\n"
        "def kill(name, done, total):\n"
        "    if name == 'blocks.1.out': os.kill(os.getpid(), signal.SIGKILL)\n"
        "chain.quantize_model(chain.ChainModel(), chain.make_batches(), chain.CONFIG, kill,\n"
        f"    pathlib.Path({str(tmp_path / 'work')!r}))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    found, done = resume(tmp_path / "work")
    assert done[0] == "blocks.1.out"
    assert found == uninterrupted()


@pytest.mark.parametrize(
    ("step", "damage"),
    [
        ("layers.blocks.1.left", "flip"),
        ("layers.blocks.2.out", "truncate"),
        ("importance", "truncate"),
        ("plans", "empty"),
    ],
)
def test_damaged_steps_are_found_and_done_again(
    tmp_path: Path, step: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    resume(tmp_path)
    file = tmp_path / f"{step}.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-40] ^= 1
    else:
        data.clear()
    file.write_bytes(data)
    found, done = resume(tmp_path)
    assert found == uninterrupted()
    redone = {
        "layers.blocks.1.left": ["blocks.1.left", "blocks.1.right"],
        "layers.blocks.2.out": ["blocks.2.out"],
    }
    assert done == redone.get(step, [])
    assert f"'{file}' is damaged" in caplog.text
    assert WorkFolder(None).load(step) is None


@pytest.mark.parametrize(
    ("config", "samples", "scale", "named"),
    [
        (QuantConfig(bits=2.25), 3, 1.0, r"option bits \(was 2.5, is 2.25\)\."),
        (QuantConfig(bits=2.5, seed=3), 3, 1.0, r"option seed \(was 0, is 3\)\."),
        (CONFIG, 2, 1.0, r"differs: calibration data\."),
        (CONFIG, 3, 2.0, r"differs: weights of the checkpoint\."),
    ],
)
def test_folder_of_another_run_is_refused_with_what_differs(
    tmp_path: Path, config: QuantConfig, samples: int, scale: float, named: str
) -> None:
    resume(tmp_path)
    model = ChainModel()
    model.module.blocks[2].out.weight.mul_(scale)
    with pytest.raises(RequestError, match=named):
        quantize_model(model, make_batches(samples), config, work_folder=tmp_path)


class Settings:
    """Stands in for a `transformers` configuration."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return self.values


def test_folder_of_other_code_libraries_or_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(theta: float, name: str = "a") -> dict[str, Any]:
        settings = Settings(_name_or_path=name, rope={"theta": theta})
        return work_folder.describe_run([], [], CONFIG, model_config=settings)

    WorkFolder(tmp_path, describe(1e4))
    WorkFolder(tmp_path, describe(1e4, "moved"))
    with pytest.raises(RequestError, match=r"differs: configuration of the model\."):
        WorkFolder(tmp_path, describe(1e5))
    monkeypatch.setattr(work_folder, "library_versions", lambda: {"scipy": "0.1"})
    with pytest.raises(RequestError, match=r"version of scipy \(was .*, is 0\.1\)"):
        WorkFolder(tmp_path, describe(1e4))
    monkeypatch.undo()
    monkeypatch.setattr(work_folder, "code_version", lambda: "other")
    with pytest.raises(RequestError, match=r"version of bivlm-edge \(was \w{12}, is other\)"):
        WorkFolder(tmp_path, describe(1e4))


def test_options_of_tuning_and_names_of_defaults_make_no_other_run() -> None:
    same = work_folder.describe_run([], [], QuantConfig())
    assert same == work_folder.describe_run([], [], QuantConfig(importance="loss"))
    tuned = QuantConfig(
        tune="both", tune_signs=True, tune_epochs=1, tune_steps=3, tune_samples=9, tune_rate=2.0
    )
    assert same == work_folder.describe_run([], [], tuned)
    assert same != work_folder.describe_run([], [], QuantConfig(importance="none"))


def test_folders_that_are_no_work_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is no work folder"):
        WorkFolder(tmp_path, {})
    with pytest.raises(OutputError, match="cannot be made"):
        WorkFolder(tmp_path / "letter.txt", {})
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        WorkFolder(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt", RUN_FILE]


def test_run_file_that_was_half_written_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".{RUN_FILE}.x1").write_text("{")
    WorkFolder(tmp_path, {"a": 1})
    assert (tmp_path / RUN_FILE).is_file()


def test_full_disk_is_said_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder(tmp_path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        work.save("step", {}, {"x": np.zeros(4)})
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize_model(ChainModel(), make_batches(), CONFIG)
    assert not list(tmp_path.iterdir())


def test_weights_of_all_kinds_come_back() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed, arrays = pack_weight("a", DenseWeight(values, 1.0, 3.4))
    back = unpack_weight("a", packed, arrays)
    assert isinstance(back, DenseWeight)
    assert back.true_bits == 3.4
    np.testing.assert_array_equal(back.values, values)
    result = quantize_model(ChainModel(), make_batches(), CONFIG)
    weight = result.weights["blocks.0.left"]
    assert isinstance(weight, BinaryWeight)
    back = unpack_weight("x", *pack_weight("x", weight))
    assert isinstance(back, BinaryWeight)
    assert back.plane_columns == weight.plane_columns
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())
