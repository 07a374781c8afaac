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

from bivlm_edge.export import reference, transformer_ops

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
    expected_outputs = reference.token_prune(*inputs.values(), **attributes)
    assert len(outputs) == 2
    for output, wanted in zip(outputs, expected_outputs, strict=False):
        np.testing.assert_array_equal(output, wanted)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123, kat_vectors
        ([0] * 4, [0] * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: tuple[int, ...]) -> None:
    assert reference.philox4x32_10(counter, key) == words


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


# TokenPrune: the table of edge cases


def _tokens(count: int, batch: int = 1) -> Array:
    rows = np.arange(batch * count * 2, dtype=np.float32)
    return rows.reshape(batch, count, 2) + 1


def _kept(scores: list[float], segments: list[int] | None = None, **given: Any) -> list[int]:
    """Return the kept indices of one row."""
    keep = given.pop("keep", None)
    given = {"mode": "topk_score"} | given
    _, indices, lengths = reference.token_prune(
        given.pop("hidden", _tokens(len(scores))),
        np.array([scores], dtype=np.float32),
        None if segments is None else np.array([segments], dtype=np.int32),
        None if keep is None else np.array(keep),
        **given,
    )
    assert lengths.tolist() == [indices.shape[1]]
    row: list[int] = indices[0].tolist()
    return row


NAN, INF = math.nan, math.inf


def test_row_without_prunable_tokens_is_the_identity() -> None:
    assert _kept([1, 2, 3], [-1, -1, -1], keep=0) == [0, 1, 2]
    assert _kept([1], [-1], keep_count=1, mode="mmr") == [0]


def test_keep_zero_drops_every_image_token() -> None:
    assert _kept([1, 2, 3], keep=0) == []
    assert _kept([1, 2, 3], [0, -1, 0], keep=0) == [1]
    assert _kept([1, 2, 3], keep_count=0, min_keep=0) == []


def test_min_keep_bounds_the_attributes_but_not_the_input() -> None:
    assert len(_kept([1, 2, 3], keep_count=0)) == 1
    assert len(_kept([1, 2, 3, 4], keep_ratio=0.25, min_keep=2)) == 2
    assert len(_kept([1, 2, 3, 4], keep=1, min_keep=2)) == 1


def test_ratio_rounds_up_but_not_for_the_float32_of_a_tenth() -> None:
    assert len(_kept([0.0] * 30, keep_ratio=0.1)) == 3
    assert len(_kept([0.0] * 31, keep_ratio=0.1)) == 4


def test_keep_of_n_or_more_and_no_request_are_the_identity() -> None:
    for given in ({"keep": 3}, {"keep": 99}, {"keep_count": 3}, {"keep_ratio": 1.0}, {}):
        for mode in ("topk_score", "maxmin", "mmr", "uniform", "random"):
            assert _kept([NAN, 1, 2], mode=mode, **given) == [0, 1, 2]
    assert _kept([1, 2, 3], [0, -2, 0], keep=1, mode="none") == [0, 2]


def test_nan_scores_go_first_and_infinity_stays() -> None:
    assert _kept([NAN, 1, NAN, INF, -INF], keep=2) == [1, 3]
    assert _kept([NAN, -INF, 0], keep=2) == [0, 2]
    assert _kept([NAN] * 6, keep=2) == [1, 4]
    assert _kept([NAN] * 6, keep=2) == _kept([1.0] * 6, keep=2, mode="uniform")


def test_minus_zero_equals_zero_and_ties_go_to_the_lower_index() -> None:
    assert _kept([-0.0, 0.0, 0.0], keep=2) == [0, 1]


def test_uniform_takes_the_middle_of_equal_parts() -> None:
    assert _kept([0] * 10, keep=3, mode="uniform") == [1, 5, 8]


def test_maxmin_starts_with_the_best_score_or_the_longest_row() -> None:
    hidden = np.array([[[1, 0], [0, 1], [4, 0], [-1, 0]]], dtype=np.float32)
    assert _kept([0, 9, 1, 2], hidden=hidden, mode="maxmin", keep=1) == [1]
    _, indices, _ = reference.token_prune(hidden, keep=np.array(2), mode="maxmin")
    assert indices.tolist() == [[2, 3]]


def test_mmr_weighs_score_against_similarity() -> None:
    hidden = np.array([[[1, 0], [1, 0], [0, 1]]], dtype=np.float32)
    given: dict[str, Any] = {"hidden": hidden, "mode": "mmr", "keep": 2}
    assert _kept([1.0, 0.9, 0.0], theta=0.5, **given) == [0, 2]
    assert _kept([1.0, 0.9, 0.0], theta=1.0, **given) == [0, 1]


@pytest.mark.parametrize("mode", ["maxmin", "mmr"])
def test_rows_without_direction_resemble_nothing(mode: str) -> None:
    hidden = np.array([[[2, 0], [1, 0], [NAN, 0], [0, 0]]], dtype=np.float32)
    assert _kept([1, 1, 1, 1], hidden=hidden, mode=mode, keep=3) == [0, 2, 3]


@pytest.mark.parametrize("mode", ["maxmin", "mmr"])
def test_duplicates_are_not_chosen_twice(mode: str) -> None:
    hidden = np.tile(np.eye(5, dtype=np.float32), (4, 1))[None]
    assert len(set(_kept([1.0] * 20, hidden=hidden, mode=mode, keep=10))) == 10


def test_random_depends_on_seed_and_segment_only() -> None:
    def draw(seed: int, segment: int) -> list[int]:
        given = {"mode": "random", "keep": 10, "seed": seed}
        return _kept([0] * 100, [segment] * 100, **given)

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, group)) for seed in (0, 1, 1 << 32) for group in (0, 1)}) == 6


def test_rows_of_a_batch_are_padded_on_the_right() -> None:
    hidden = _tokens(4, batch=2)
    segments = np.array([[0, 0, -2, -1], [-1, 3, 3, 5]], dtype=np.int32)
    scores = np.array([[1, 2, 9, 0], [0, 1, 2, 0]], dtype=np.float32)
    pruned, indices, lengths = reference.token_prune(
        hidden, scores, segments, np.array([1]), mode="topk_score"
    )
    assert lengths.tolist() == [2, 3]
    assert indices.tolist() == [[1, 3, 0], [0, 2, 3]]
    np.testing.assert_array_equal(pruned[0], [hidden[0, 1], hidden[0, 3], [0, 0]])
    np.testing.assert_array_equal(pruned[1], hidden[1, [0, 2, 3]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "attention"},
        {"keep": -1},
        {"keep_count": -2},
        {"keep_ratio": 1.5},
        {"keep_ratio": NAN},
        {"theta": -0.1},
        {"segments": [0, -3, 0]},
    ],
)
def test_requests_outside_the_contract_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="TokenPrune"):
        _kept([1, 2, 3], **wrong)


@pytest.mark.parametrize("mode", ["topk_score", "mmr"])
def test_modes_without_their_scores_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="needs scores"):
        reference.token_prune(_tokens(3), mode=mode, keep_count=1)
