"""The numpy reference against the sentences of FORMAT.md and OPS.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from bivlm_edge.export import reference, reference_prune, torch_ops, transformer_ops

Array = NDArray[Any]


def _one_bit(plane_columns: tuple[int, ...], byte: int, value: int) -> Array:
    """Return the signs of row 0, chunk 0, where one byte of the codes is set."""
    codes = np.zeros((1, 2 * sum(plane_columns)), dtype=np.uint8)
    codes[0, byte] = value
    coefficients = np.zeros((1, len(plane_columns), 16), dtype=np.float16)
    coefficients[0, -1, 0] = 1  # only the last plane counts
    return reference.unpack(codes, coefficients, 1, plane_columns)


def test_worked_example_of_one_plane() -> None:
    weight = _one_bit((64,), byte=1, value=2)
    np.testing.assert_array_equal(np.flatnonzero(weight[0] == 1), [5])
    assert (np.delete(weight[0], 5) == -1).all()


def test_worked_example_of_two_planes() -> None:
    weight = _one_bit((64, 64), byte=65, value=8)
    np.testing.assert_array_equal(np.flatnonzero(weight[0] == 1), [21])


def test_weight_is_the_sum_of_its_planes(packed: Any) -> None:
    n, plane_columns = packed.attributes["N"], packed.attributes["plane_columns"]
    expected = np.zeros((len(packed.codes) * 16, plane_columns[0]))
    for bits, alpha in zip(packed.bits, packed.alpha, strict=True):
        expected[:, : bits.shape[1]] += np.repeat(alpha, 64, axis=1) * (2.0 * bits - 1)
    weight = reference.unpack(packed.codes, packed.coefficients, n, plane_columns)
    np.testing.assert_array_equal(weight, expected[:n])


def test_transform_pads_then_rotates_then_orders() -> None:
    x = np.zeros(65)
    x[64] = 8.0  # alone in block 1, so that all 64 channels of it become +-1
    signs = np.full(16, 255, dtype=np.uint8)
    signs[8] = 0xFE  # channel 64: byte 8, bit 0
    order = np.array([1, 0], dtype=np.uint16)
    v = reference.transform(x, signs, order, 65, 64)
    np.testing.assert_array_equal(v, [-1.0] * 64 + [0.0] * 64)


def test_hadamard_is_the_sylvester_matrix() -> None:
    rows = reference.transform(np.eye(128), None, None, 128, 128) * math.sqrt(128)
    for i, j in [(0, 0), (1, 1), (3, 5), (3, 7), (127, 127), (64, 63)]:
        assert rows[i, j] == pytest.approx((-1) ** (i & j).bit_count(), abs=1e-12)


def test_column_order_reads_the_transformed_channel() -> None:
    order = np.roll(np.arange(64), -1).astype(np.uint16)
    v = reference.transform(np.arange(64.0), None, order, 64, 0)
    np.testing.assert_array_equal(v, order)


def test_order_with_a_repeated_column_is_refused() -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        reference.transform(np.zeros(128), None, np.zeros(2, np.uint16), 128, 0)


def test_token_with_nan_or_infinity_gives_nan_only_there(make_packed: Callable[..., Any]) -> None:
    weight = make_packed(np.random.default_rng(0), 3, 65, (128,), hadamard_block=64)
    x = np.ones((3, 65), dtype=np.float32)
    x[0, 3], x[2, 64] = np.nan, np.inf
    y = reference.binary_matmul(x, *weight.inputs.values(), **weight.attributes)
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), [True, False, True])
    assert np.isfinite(y[1]).all()


def test_classes_run_in_the_evaluator_of_onnx(
    packed: Any, make_model: Callable[..., onnx.ModelProto], prune_case: Callable[..., Any]
) -> None:
    operators = [reference.BinaryMatMul, reference.TokenPrune]
    x = np.random.default_rng(0).standard_normal((2, packed.attributes["K"])).astype(np.float16)
    inputs = {"X": x, **packed.inputs}
    model = make_model("BinaryMatMul", inputs, ["Y"], **packed.attributes)
    feeds = {name: value for name, value in inputs.items() if value is not None}
    results: Any = ReferenceEvaluator(model, new_ops=operators).run(None, feeds)
    (y,) = results
    expected = reference.binary_matmul(x, *packed.inputs.values(), **packed.attributes)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, expected.astype(np.float16))

    inputs, attributes = prune_case(0, "mmr")
    model = make_model("TokenPrune", inputs, ["pruned", "kept_indices"], **attributes)
    feeds = {name: value for name, value in inputs.items() if value is not None}
    outputs = ReferenceEvaluator(model, new_ops=operators).run(None, feeds)
    expected_outputs = reference_prune.token_prune(*inputs.values(), **attributes)
    assert len(outputs) == 2
    for output, wanted in zip(outputs, expected_outputs, strict=False):
        np.testing.assert_array_equal(output, wanted)


@pytest.mark.parametrize("seed", range(12))
def test_attention_is_that_of_torch(seed: int, attention_case: Callable[..., Any]) -> None:
    inputs, attributes = attention_case(seed)
    heads = attributes["num_heads"]
    width = inputs["past_key"].shape[3]
    scale = attributes.get("scale", width**-0.5)
    total = int(inputs["total_sequence_length"][0])
    found = reference.group_query_attention(
        *list(inputs.values())[:6], total, num_heads=heads, scale=attributes.get("scale", 0.0)
    )
    tensors = (torch.from_numpy(array) for array in inputs.values())
    expected = transformer_ops.group_query_attention(*tensors, heads, scale)
    # torch computes in float32 and rounds once to the type
    tolerance = 4e-6 if inputs["qkv"].dtype == np.float32 else 1e-3
    np.testing.assert_allclose(found[0], expected[0].numpy(), rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(mine[:, :, :total], theirs.numpy()[:, :, :total])


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_operator_runs_the_reference(
    seed: int, attention_case: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    inputs, attributes = attention_case(seed)
    model = make_model("GroupQueryAttention", inputs, ["o", "k", "v"], **attributes)
    evaluator = ReferenceEvaluator(model, new_ops=[reference.GroupQueryAttention])
    results = evaluator.run(None, inputs)
    expected = reference.group_query_attention(
        *list(inputs.values())[:6],
        int(inputs["total_sequence_length"][0]),
        num_heads=attributes["num_heads"],
        scale=attributes.get("scale", 0.0),
    )
    for found, wanted in zip(results, expected, strict=True):
        assert found.dtype == inputs["qkv"].dtype
        np.testing.assert_array_equal(found, wanted.astype(found.dtype))


def test_codes_of_four_bits_begin_with_the_low_nibble() -> None:
    codes = np.zeros((1, 2, 8), np.uint8)
    codes[0, 1, 3] = 0xF1  # columns 16 + 6 and 16 + 7
    scales = np.array([[0.0, 2.0]], np.float16)
    columns = {"K": 32, "N": 1, "bits": 4, "block_size": 16}
    found = reference.group_matmul(np.eye(32), codes, scales, **columns)[:, 0]
    np.testing.assert_array_equal(found, [0.0] * 16 + [-16.0] * 6 + [-14.0, 14.0] + [-16.0] * 8)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_group_matmul_is_that_of_torch_and_runs_as_an_operator(
    bits: int, block: int, group_matmul_case: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    tensors, attributes = group_matmul_case(0, bits, block)
    x = np.random.default_rng(1).standard_normal((2, 3, attributes["K"])).astype(np.float32)
    found = reference.group_matmul(x, *tensors.values(), **attributes)
    expected = torch_ops.group_matmul(
        torch.from_numpy(x),
        *(torch.from_numpy(tensor) for tensor in tensors.values()),
        *attributes.values(),
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-4)
    model = make_model("GroupMatMul", {"X": x, **tensors}, ["Y"], **attributes)
    evaluator = ReferenceEvaluator(model, new_ops=[reference.GroupMatMul])
    (y,) = evaluator.run(None, {"X": x, **tensors})
    np.testing.assert_array_equal(y, found.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gated_silu_is_that_of_torch_and_runs_as_an_operator(
    dtype: type[Any], make_model: Callable[..., Any]
) -> None:
    x = (4 * np.random.default_rng(0).standard_normal((2, 3, 34))).astype(dtype)
    found = reference.gated_silu(x)
    tolerance = 1e-6 if dtype == np.float32 else 1e-3
    expected = transformer_ops.gated_silu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    evaluator = ReferenceEvaluator(
        make_model("GatedSiLU", {"X": x}, ["Y"]), new_ops=[reference.GatedSiLU]
    )
    np.testing.assert_array_equal(evaluator.run(None, {"X": x})[0], found.astype(dtype))
