"""Streamed models: the same bits as in memory, in a fraction of the memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import CheckpointError, RequestError
from bivlm_edge.models import streaming
from bivlm_edge.models.streaming import StreamedBlocks, load_weights
from bivlm_edge.quant.quantizer import QuantizedModel, quantize_model
from bivlm_edge.quant.work_folder import pack_weight
from bivlm_edge.tuning import quantize_and_tune

LAYERS = 2


class Part(NamedTuple):
    name: str
    blocks: list[tuple[str, nn.Module]]


@dataclass
class Model:
    """Stands in for models.LanguageModel."""

    module: Any
    streamed: StreamedBlocks | None

    def block_sequences(self) -> list[Part]:
        layers = self.module.model.layers
        return [Part("decoder", [(f"model.layers.{i}", layer) for i, layer in enumerate(layers)])]


def write_checkpoint(
    folder: Path, hidden: int = 64, layers: int = LAYERS, shard: str = "80KB"
) -> None:
    """A decoder of random weights in bfloat16, several files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=hidden,
        intermediate_size=5 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)


def load(folder: Path, stream: bool | None) -> Model:
    def from_pretrained(more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **more
        )

    config = AutoConfig.from_pretrained(folder)
    module, _, streamed = load_weights(
        from_pretrained,
        lambda: AutoModelForCausalLM.from_config(config),
        lambda skeleton: skeleton.model.layers,
        stream,
    )
    return Model(module.eval().requires_grad_(False), streamed)


def make_batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 100, (2, 20), generator=generator)} for _ in range(count)
    ]


def contents(result: QuantizedModel) -> dict[str, Any]:
    found: dict[str, Any] = {"reports": result.reports, "stacked": result.stacked}
    for name, weight in result.weights.items():
        values, arrays = pack_weight(name, weight)
        found |= {key: array.tobytes() for key, array in arrays.items()} | {name: values}
    return found


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.module(**make_batches(1)[0]).logits
    return output


def in_memory(model: Model) -> set[str]:
    return {name for name, value in model.module.named_parameters() if not value.is_meta}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming") / "checkpoint"
    write_checkpoint(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("method", ["bivlm-edge", "gptq", "bivlm-paper"])
def test_streamed_model_is_quantized_to_the_same_bits(checkpoint: Path, method: str) -> None:
    config = QuantConfig(method=method, bits=2.5 if method == "bivlm-edge" else 2.0)
    memory, disk = load(checkpoint, stream=False), load(checkpoint, stream=True)
    assert memory.streamed is None
    assert not any(".layers." in name for name in in_memory(disk))
    assert torch.equal(logits(memory), logits(disk))
    expected = quantize_model(memory, make_batches(), config)
    result = quantize_model(disk, make_batches(), config)
    assert contents(result) == contents(expected)
    assert torch.equal(logits(memory), logits(disk))
    packed = {f"{name}.weight" for name in result.weights}
    expected_names = {name for name, _ in memory.module.named_parameters()}
    if method != "bivlm-paper":  # its weights have no packed form
        expected_names -= packed
    assert in_memory(disk) == expected_names


def test_run_may_begin_streamed_and_end_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    class Stopped(Exception):  # noqa: N818 - no error
        pass

    def stop(name: str, _: int, __: int) -> None:
        if name.startswith("model.layers.1.mlp"):
            raise Stopped

    config = QuantConfig(bits=2.5)
    with pytest.raises(Stopped):
        quantize_model(load(checkpoint, True), make_batches(), config, stop, tmp_path)
    memory = load(checkpoint, stream=False)
    result = quantize_model(memory, make_batches(), config, work_folder=tmp_path)
    untouched = quantize_model(load(checkpoint, False), make_batches(), config)
    assert contents(result) == contents(untouched)
    disk = load(checkpoint, stream=True)
    again = quantize_model(disk, make_batches(), config, work_folder=tmp_path)
    assert contents(again) == contents(untouched)
    assert torch.equal(logits(disk), logits(memory))


def test_held_block_is_dropped_again_even_after_an_error(checkpoint: Path) -> None:
    model = load(checkpoint, stream=True)
    assert model.streamed is not None
    outside = in_memory(model)
    block = {name for name, _ in model.module.named_parameters() if ".layers.1." in name}

    def fail() -> None:
        assert model.streamed is not None
        with model.streamed.held("model.layers.1"):
            assert in_memory(model) - outside == block
            logits(model)
            assert in_memory(model) - outside == block
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert in_memory(model) == outside
    with model.streamed.paused():
        assert not model.module.model.layers[0]._forward_pre_hooks


def test_broken_weights_on_disk_are_named(checkpoint: Path, tmp_path: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "model.layers.1.mlp.up_proj"
    file = tmp_path / index[f"{name}.weight"]
    tensors = load_file(file)
    tensors[f"{name}.weight"][3, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"weight of '{name}' holds 1 NaN"):
        quantize_model(load(tmp_path, True), make_batches(), QuantConfig(method="rtn"))


def test_tuning_a_streamed_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="needs the whole model in memory"):
        quantize_and_tune(load(checkpoint, True), make_batches(), QuantConfig(tune="blocks"))


def test_models_are_streamed_by_themselves_where_memory_is_short(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(checkpoint, None).streamed is None
    parameters = sum(value.numel() for value in load(checkpoint, False).module.parameters())
    monkeypatch.setattr(streaming, "available_memory", lambda: 8 * parameters)
    assert load(checkpoint, None).streamed is None
    assert not caplog.text
    monkeypatch.setattr(streaming, "available_memory", lambda: 8 * parameters - 1)
    assert load(checkpoint, None).streamed is not None
    assert "read from disk one at a time" in caplog.text


def test_missing_accelerate_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "accelerate" else find(name, *a),
    )
    with pytest.raises(RequestError, match="pip install accelerate"):
        load(checkpoint, stream=True)
    monkeypatch.setattr(streaming, "available_memory", lambda: 1000)
    assert load(checkpoint, None).streamed is None
    assert "with accelerate installed" in caplog.text


MEASURE = """
import importlib.util, json, pathlib, sys
spec = importlib.util.spec_from_file_location("streaming_test", sys.argv[1])
test = importlib.util.module_from_spec(spec)
sys.modules["streaming_test"] = test
spec.loader.exec_module(test)
from bivlm_edge.runtime.process_memory import memory_bytes
small, large, stream = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4] == "True"
options = json.loads(sys.argv[5])

def quantize(folder):
    found = [["start", memory_bytes()["rss_anon"]]]
    model = test.load(folder, stream)
    tell = lambda name, *_: found.append([name, memory_bytes()["rss_anon"]])
    test.quantize_model(model, test.make_batches(2), test.QuantConfig(**options), tell)
    return found

quantize(small)  # libraries and buffers that stay are in memory now
print(json.dumps(quantize(large)))
"""


def memory_at_layers(
    small: Path, large: Path, stream: bool, options: dict[str, Any]
) -> dict[str, int]:
    """Bytes above those before the model was loaded, when the quantizer comes to each layer."""
    # what is freed goes back to the system, so that memory in use is what is measured
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = [__file__, str(small), str(large), str(stream), json.dumps(options)]
    process = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    (_, start), *found = json.loads(process.stdout.splitlines()[-1])
    return {name: bytes_ - start for name, bytes_ in found}


# per method: hidden size, blocks, bytes per weight of a finished layer, and Hessians of the widest
# layer held at once (those of bivlm-edge: fitted and held out, plain and weighted, with and without
# the float model's inputs)
BOUNDS = {"rtn": (384, 14, 1, 2), "bivlm-edge": (192, 6, 2.2 / 8, 8)}
LIBRARIES = 8e6  # what they keep for shapes that are new to them


@pytest.mark.parametrize("method", BOUNDS)
def test_peak_memory_is_that_of_a_few_blocks_and_grows_by_codes_alone(
    checkpoint: Path, tmp_path: Path, method: str
) -> None:
    hidden, layers, code, hessians = BOUNDS[method]
    write_checkpoint(tmp_path, hidden, layers, shard="20MB")
    weights = 10 * hidden * hidden  # of a block, whose widest layer has 2.5 * hidden inputs
    block, hessian = 4 * weights, 8 * (5 * hidden // 2) ** 2
    options: dict[str, Any] = {"method": method, "bits": 2}
    if method == "bivlm-edge":  # stages that take time, but keep nothing from block to block
        options |= {"bits": 2.2, "without": ["hadamard", "prefix", "descent"]}
    found = memory_at_layers(checkpoint, tmp_path, True, options)
    assert len(found) == 7 * layers
    codes = code * weights
    bound = layers * codes + 4 * block + hessians * hessian + LIBRARIES
    assert max(found.values()) < bound
    first, last = (found[f"model.layers.{i}.mlp.down_proj"] for i in (1, layers - 1))
    assert last - first < (layers - 2) * (codes + 0.1 * block)
    if method == "rtn":  # where the whole model is more than the bound
        assert max(memory_at_layers(checkpoint, tmp_path, False, options).values()) > bound
