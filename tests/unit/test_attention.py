"""The decoder's operators against their eager forms, and these against `transformers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.siglip import modeling_siglip

from bivlm_edge.errors import UnsupportedModelError
from bivlm_edge.export import attention, transformer_ops

HEADS, KV_HEADS, WIDTH = 6, 2, 16
# float32 sums of up to 20 terms in another order; float16 rounds inputs and outputs to 11 bits
TOLERANCE: dict[type[Any], dict[str, float]] = {
    np.float32: {"rtol": 1e-5, "atol": 2e-6},
    np.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def _session(op: str, inputs: dict[str, NDArray[Any]], outputs: int, **attributes: Any) -> Any:
    names = [f"out{index}" for index in range(outputs)]
    node = helper.make_node(op, list(inputs), names, domain="com.microsoft", **attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    first = next(iter(kinds.values()))
    types = [first, TensorProto.FLOAT, TensorProto.FLOAT, first] if outputs == 4 else [first] * 3
    if op == "SkipSimplifiedLayerNormalization":
        names = [names[0], "", "", names[3]]
        node.output[:] = names
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in zip(names, types, strict=False)
            if name
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options)


def _tensors(arrays: dict[str, NDArray[Any]]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays.values()]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_full_attention_is_that_of_the_formula(dtype: type[Any]) -> None:
    rng = np.random.default_rng(0)
    shape = (2, 20, HEADS * WIDTH)
    inputs = {name: rng.normal(size=shape).astype(dtype) for name in ("query", "key", "value")}
    expected = transformer_ops.multi_head_attention(*_tensors(inputs), HEADS, 0.2).numpy()
    session = _session("MultiHeadAttention", inputs, 1, num_heads=HEADS, scale=0.2)
    np.testing.assert_allclose(session.run(None, inputs)[0], expected, **TOLERANCE[dtype])


@torch.no_grad()
def test_vision_module_computes_what_transformers_computes() -> None:
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=96, num_attention_heads=HEADS, attn_implementation="sdpa"
    )
    theirs = modeling_siglip.SiglipAttention(config).eval()
    assert attention.FullAttention.fits(theirs)
    assert not attention.FullAttention.fits(None)
    hidden = torch.randn(2, 9, 96)
    found, _ = attention.FullAttention(theirs)(hidden, attention_mask=None)
    torch.testing.assert_close(found, theirs(hidden)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_skip_norm_adds_first_and_returns_the_sum(dtype: type[Any]) -> None:
    rng = np.random.default_rng(0)
    inputs = {name: rng.normal(size=(2, 3, 64)).astype(dtype) for name in ("x", "skip")}
    inputs["weight"] = rng.normal(size=64).astype(dtype)
    expected = transformer_ops.skip_rms_norm(*_tensors(inputs), 1e-3)
    session = _session("SkipSimplifiedLayerNormalization", inputs, 4, epsilon=1e-3)
    for found, wanted in zip(session.run(None, inputs), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), **TOLERANCE[dtype])


def _config(kind: Any, **options: Any) -> Any:
    return kind(
        hidden_size=96,
        intermediate_size=128,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        max_position_embeddings=64,
        attn_implementation="sdpa",
        **options,
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN["original_max_position_embeddings"] = 16


@pytest.mark.parametrize("rope", [None, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_module_computes_what_transformers_computes_with_gaps_in_the_positions(
    family: str, rope: dict[str, Any] | None
) -> None:
    torch.manual_seed(0)
    options = {"rope_parameters": rope} if rope else {}
    if family == "llama":
        config = _config(transformers.LlamaConfig, attention_bias=True, **options)
        theirs = modeling_llama.LlamaAttention(config, 0).eval()
        embedding: Any = modeling_llama.LlamaRotaryEmbedding(config)
    else:
        config = _config(transformers.Qwen2Config, **options)
        theirs = modeling_qwen2.Qwen2Attention(config, 0).eval()
        embedding = modeling_qwen2.Qwen2RotaryEmbedding(config)
    attention.check_rotary(embedding, WIDTH)
    ours = attention.GroupedAttention(theirs)
    positions = torch.tensor([[0, 1, 5, 6, 30], [0, 2, 3, 9, 31]])
    hidden = torch.randn(2, 5, 96)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected, _ = theirs(hidden, embedding(hidden, positions), mask)
    rotation = attention.rotary(embedding, positions, torch.float32)
    empty = torch.zeros(2, KV_HEADS, 0, WIDTH)
    last, total = torch.full((2,), 4, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    found, _, _ = ours(hidden, rotation, (empty, empty), last, total)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    last_only, _, _ = ours(hidden, rotation, (empty, empty), last, total, last_only=True)
    torch.testing.assert_close(last_only, expected[:, -1:], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_mlp_computes_what_transformers_computes() -> None:
    torch.manual_seed(0)
    theirs = modeling_llama.LlamaMLP(_config(transformers.LlamaConfig)).eval()
    assert attention.GatedMlp.fits(theirs)
    hidden = torch.randn(2, 5, 96)
    found = attention.GatedMlp(theirs)(hidden)
    torch.testing.assert_close(found, theirs(hidden), rtol=1e-5, atol=1e-6)
    theirs = modeling_llama.LlamaMLP(_config(transformers.LlamaConfig, hidden_act="gelu"))
    assert not attention.GatedMlp.fits(theirs)


@torch.no_grad()
def test_norm_with_and_without_an_update_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    theirs = modeling_llama.LlamaRMSNorm(64, eps=1e-2)
    theirs.weight.data = torch.randn(64)
    ours = attention.ResidualNorm(theirs)
    update, residual = torch.randn(2, 3, 64) / 8, torch.randn(2, 3, 64) / 8
    for given in (update, None):
        normed, total = ours(given, residual)
        expected = residual if given is None else update + residual
        torch.testing.assert_close(total, expected, rtol=0, atol=0)
        torch.testing.assert_close(normed, theirs(expected), rtol=1e-6, atol=1e-6)


def test_frequencies_that_follow_the_prompt_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = _config(transformers.LlamaConfig, rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match=r"type 'dynamic'.*default, linear"):
        attention.check_rotary(modeling_llama.LlamaRotaryEmbedding(config), WIDTH)


def test_rotation_of_a_part_of_the_head_is_refused() -> None:
    embedding = modeling_llama.LlamaRotaryEmbedding(_config(transformers.LlamaConfig))
    with pytest.raises(UnsupportedModelError, match=r"turns 16 of the 32 channels"):
        attention.check_rotary(embedding, 32)
