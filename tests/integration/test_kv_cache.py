"""The KV cache of real exports: written in place, returned anew, batched, and grown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from random_checkpoints import save_checkpoint

import bivlm_edge
from bivlm_edge.bundle import BundlePaths, read_manifest
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import load_checkpoint
from bivlm_edge.runtime import KvCache, load
from bivlm_edge.runtime.generate import run_step

STEPS = 6
Feed = dict[str, NDArray[Any]]


class Graph:
    """A session and what to feed; the cache is fed as tensors or bound in place."""

    def __init__(self, paths: BundlePaths, *, library: bool) -> None:
        options = ort.SessionOptions()
        if library:
            options.register_custom_ops_library(bivlm_edge.custom_ops_library())
        self.session = ort.InferenceSession(str(paths.graph), options)
        self.manifest = read_manifest(paths)
        self.dtype = np.float16 if self.manifest.dtype == "fp16" else np.float32
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        is_half = kinds["past_key_values.0.key"] == "tensor(float16)"
        self.cache_dtype = np.float16 if is_half else np.float32

    def prompt(self, batch: int = 1, seed: int = 0) -> Feed:
        """A picture of noise per row, then five tokens."""
        rng = np.random.default_rng(seed)
        pixels = rng.normal(size=(batch, *self.manifest.pixel_shape))
        image = np.full((batch, self.manifest.image_tokens), self.manifest.image_token_id)
        ids = np.concatenate([image, rng.integers(20, 90, (batch, 5))], axis=1)
        return {"input_ids": ids, "pixel_values": pixels.astype(self.dtype)}

    def empty(self, batch: int, room: int) -> Feed:
        manifest = self.manifest
        shape = (batch, manifest.kv_heads, room, manifest.head_dim)
        names = [f"{i}.{part}" for i in range(manifest.layers) for part in ("key", "value")]
        return {f"past_key_values.{name}": np.zeros(shape, self.cache_dtype) for name in names}

    def tokens(self, step: int, batch: int) -> NDArray[np.int64]:
        return np.full((batch, 1), 30 + step)

    def feeds(self, prompt: Feed) -> list[Feed]:
        """The prompt, then single tokens."""
        batch, length = prompt["input_ids"].shape
        feeds = [prompt]
        for step in range(STEPS):
            ids = self.tokens(step, batch)
            feeds.append({"input_ids": ids, "pixel_values": prompt["pixel_values"][:0]})
        for feed, start in zip(feeds, [0, *range(length, length + STEPS)], strict=True):
            positions = np.arange(start, start + feed["input_ids"].shape[1])
            feed["position_ids"] = np.tile(positions, (batch, 1))
        return feeds

    def anew(self, prompt: Feed) -> tuple[NDArray[Any], Feed]:
        """Logits of all steps and the last present tensors, every run returning new ones."""
        names = [output.name for output in self.session.get_outputs()]
        past = self.empty(len(prompt["input_ids"]), 0)
        logits = []
        for feed in self.feeds(prompt):
            found = dict(zip(names, self.session.run(None, {**feed, **past}), strict=True))
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            logits.append(found["logits"][:, 0])
        return np.stack(logits, axis=1), past

    def in_place(self, prompt: Feed, room: int) -> tuple[NDArray[Any], Feed]:
        """The same in buffers of `room` positions that hold NaN where nothing was written."""
        past = self.empty(len(prompt["input_ids"]), room)
        for buffer in past.values():
            buffer.fill(np.nan)
        bound = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in past.items()}
        logits, filled = [], 0
        for feed in self.feeds(prompt):
            binding = self.session.io_binding()
            given = {
                name: ort.OrtValue.ortvalue_from_numpy(array)
                for name, array in {**feed, "past_length": np.array(filled)}.items()
            }
            for name, value in {**given, **bound}.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in bound.items():
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
            binding.bind_output("logits")
            binding.bind_output("kept_indices")
            self.session.run_with_iobinding(binding)
            *_, found, kept = binding.get_outputs()
            logits.append(found.numpy()[:, 0])
            filled += kept.shape()[1]
        return np.stack(logits, axis=1), past


@pytest.fixture(scope="module")
def small_fp16(tmp_path_factory: pytest.TempPathFactory, pictures: list[VqaItem]) -> BundlePaths:
    """Two bits, half of the image tokens, float16, opset 22, biases in q, k and v."""
    folder = tmp_path_factory.mktemp("small_fp16")
    vlm = load_checkpoint(save_checkpoint("llava, SigLIP and Qwen2", folder / "checkpoint"))
    quant = QuantConfig(bits=3.0, calibration_samples=8)
    config = ExportConfig(quant, PruneConfig(keep_ratio=0.5), dtype="fp16", opset=22)
    return export_model(vlm, pictures, folder / "model.onnx", config).paths


@pytest.fixture(scope="module")
def small_pruned(tmp_path_factory: pytest.TempPathFactory, pictures: list[VqaItem]) -> BundlePaths:
    """Float weights, a third of the image tokens: other ones in every picture."""
    folder = tmp_path_factory.mktemp("small_pruned")
    vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", folder / "checkpoint"))
    config = ExportConfig(QuantConfig(method="none"), PruneConfig(keep_ratio=0.34))
    return export_model(vlm, pictures, folder / "model.onnx", config).paths


EXPORTS = ["float_export", "pruned_export", "two_bit_export", "small_fp16"]


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", EXPORTS)
def test_in_place_gives_what_concatenation_gives(
    name: str, library: bool, request: pytest.FixtureRequest
) -> None:
    graph = Graph(request.getfixturevalue(name), library=library)
    prompt = graph.prompt()
    logits, present = graph.anew(prompt)
    room = prompt["input_ids"].shape[1] + STEPS + 9
    logits_in_place, buffers = graph.in_place(prompt, room)
    np.testing.assert_allclose(logits_in_place, logits, rtol=1e-5, atol=1e-5)
    for key, tensor in present.items():
        filled = tensor.shape[2]
        np.testing.assert_allclose(buffers[key][:, :, :filled], tensor, rtol=1e-5, atol=1e-5)
        assert np.isnan(buffers[key][:, :, filled:]).all(), "written behind the tokens"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["float_export", "small_pruned"])
def test_rows_of_a_batch_are_independent(
    name: str, in_place: bool, request: pytest.FixtureRequest
) -> None:
    graph = Graph(request.getfixturevalue(name), library=True)
    both = graph.prompt(batch=2)
    alone = [{key: array[row : row + 1] for key, array in both.items()} for row in (0, 1)]
    room = both["input_ids"].shape[1] + STEPS

    def run(prompt: Feed) -> NDArray[Any]:
        return (graph.in_place(prompt, room) if in_place else graph.anew(prompt))[0]

    expected = np.concatenate([run(prompt) for prompt in alone])
    difference = np.abs(expected[0] - expected[1]).max()
    np.testing.assert_allclose(run(both), expected, rtol=0, atol=1e-3 * difference)


def test_keeping_every_token_gives_the_logits_of_the_unpruned_graph_to_the_bit(
    pictures: list[VqaItem], tmp_path: Path
) -> None:
    logits = []
    for ratio in (1.0, 0.999):  # of 16 tokens: all, with and without a TokenPrune node
        vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", tmp_path / f"{ratio}"))
        config = ExportConfig(QuantConfig(method="none"), PruneConfig(keep_ratio=ratio))
        paths = export_model(vlm, pictures, tmp_path / f"m{ratio}.onnx", config).paths
        graph = Graph(paths, library=True)
        assert (b"TokenPrune" in paths.graph.read_bytes()) == (ratio < 1)
        logits.append(graph.anew(graph.prompt())[0])
    np.testing.assert_array_equal(logits[1], logits[0])


@pytest.mark.parametrize("in_place", [False, True])
def test_positions_with_gaps_are_not_numbered_anew(
    float_export: BundlePaths, in_place: bool
) -> None:
    """Rotary embedding sees distances only: a shift changes nothing, a gap does."""
    graph = Graph(float_export, library=True)
    prompt = graph.prompt()
    length = prompt["input_ids"].shape[1]
    names = ["logits"]
    room = length if in_place else 0
    past = graph.empty(1, room)
    if in_place:
        past["past_length"] = np.array(0)

    def logits(positions: NDArray[np.int64]) -> NDArray[Any]:
        found: NDArray[Any] = graph.session.run(
            names, {**prompt, **past, "position_ids": positions[None]}
        )[0]
        return found

    straight = np.arange(length)
    gap = straight + 40 * (straight >= length // 2)
    np.testing.assert_allclose(logits(straight + 7), logits(straight), rtol=1e-3, atol=1e-3)
    assert np.abs(logits(gap) - logits(straight)).max() > 0.05


def test_past_length_beyond_the_buffers_counts_as_all_of_them(float_export: BundlePaths) -> None:
    graph = Graph(float_export, library=True)
    prompt = graph.prompt()
    _, past = graph.anew(prompt)
    feed = {"input_ids": np.array([[40]]), "position_ids": np.array([[90]]), **past}
    feed["pixel_values"] = prompt["pixel_values"][:0]
    names = ["logits", "present.0.key"]
    wanted = graph.session.run(names, feed)
    for length in (-1, -5, past["past_key_values.0.key"].shape[2], 1 << 40):
        found = graph.session.run(names, {**feed, "past_length": np.array(length)})
        np.testing.assert_array_equal(found[0], wanted[0])
        assert found[1].shape == wanted[1].shape


def _shrunk(cache: KvCache) -> KvCache:
    """The same cache in buffers with room for two more tokens."""
    tight = KvCache(cache.session, cache.tokens + 2)
    for mine, theirs in zip(tight.tensors, cache.tensors, strict=True):
        mine.numpy()[:] = theirs.numpy()[:, :, : cache.tokens + 2]
    tight.advance(cache.tokens, cache.position)
    return tight


def test_runtime_gives_the_logits_of_the_plain_graph_while_the_cache_grows(
    pruned_export: BundlePaths,
) -> None:
    graph = Graph(pruned_export, library=True)
    prompt = graph.prompt()
    expected, _ = graph.anew(prompt)
    session = load(pruned_export.graph)
    ids = prompt["input_ids"][0]
    cache = KvCache(session, capacity=len(ids))
    first = run_step(session, ids, cache, prompt["pixel_values"])
    assert cache.tokens < cache.capacity == len(ids)
    cache = _shrunk(cache)
    steps = [run_step(session, np.array([30 + step]), cache) for step in range(STEPS)]
    assert cache.capacity > len(ids)
    found = np.stack([step.logits for step in (first, *steps)])
    np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("float_export", np.float32), ("two_bit_export", np.float16), ("small_fp16", np.float16)],
)
def test_cache_is_float16_behind_quantized_weights(
    name: str, kind: type[Any], request: pytest.FixtureRequest
) -> None:
    session = load(request.getfixturevalue(name).graph)
    manifest = session.manifest
    values = 2 * manifest.layers * manifest.kv_heads * manifest.head_dim
    assert session.cache_dtype is kind
    assert KvCache.bytes_per_token(session) == values * np.dtype(kind).itemsize
    assert {tensor.data_type() for tensor in KvCache(session, 3).tensors} == {
        "tensor(float16)" if kind is np.float16 else "tensor(float)"
    }


@pytest.mark.parametrize(
    ("method", "asked", "kind", "bound"),
    [("nbits4", "fp32", "tensor(float)", 0.15), ("none", "fp16", "tensor(float16)", 5e-2)],
)
def test_type_of_the_cache_can_be_asked_for(
    method: Any, asked: Any, kind: str, bound: float, pictures: list[VqaItem], tmp_path: Path
) -> None:
    vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", tmp_path / "checkpoint"))
    config = ExportConfig(QuantConfig(method=method), kv_cache_dtype=asked)
    result = export_model(vlm, pictures, tmp_path / "m.onnx", config)
    kinds = {v.name: v.type for v in load(result.paths.graph).ort.get_inputs()}
    assert kinds["past_key_values.0.value"] == kind
    assert kinds["pixel_values"] == "tensor(float)"
    assert [row["bound"] for row in result.report["validation"]] == [bound] * 2


def test_cache_wider_than_the_activations_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--kv-cache fp32 is wider than .* --dtype fp16"):
        ExportConfig(dtype="fp16", kv_cache_dtype="fp32")
    with pytest.raises(RequestError, match="--kv-cache"):
        ExportConfig(kv_cache_dtype="int8")  # type: ignore[arg-type]


def test_decoder_layers_hold_no_node_that_only_moves_data(two_bit_export: BundlePaths) -> None:
    graph = onnx.load(two_bit_export.graph, load_external_data=False).graph
    layers = read_manifest(two_bit_export).layers
    found = Counter(node.op_type for node in graph.node)
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [node.domain for node in attention] == ["ai.bivlm"] * layers
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers + 1
    assert found["GatedSiLU"] == layers
    assert found["Mul"] == 1  # positions and frequencies, once for all layers
    assert not {"Concat", "RotaryEmbedding", "Split", "Transpose", "Pow"} & set(found)
    others = sum(found.values()) - found["BinaryMatMul"] - found["Constant"] - 4 * layers
    assert others < 40, found
