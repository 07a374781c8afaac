"""The function fallbacks, run by ONNX Runtime without the operator library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from bivlm_edge.errors import RequestError
from bivlm_edge.export import reference, reference_prune, schemas
from bivlm_edge.export.fallback import (
    BinaryMatMulConfiguration,
    Kind,
    Order,
    binary_matmul_function,
)
from bivlm_edge.export.fallback_attention import group_query_attention_function
from bivlm_edge.export.fallback_gated_silu import gated_silu_function
from bivlm_edge.export.fallback_group_matmul import group_matmul_function
from bivlm_edge.export.fallback_prune import token_prune_function
from bivlm_edge.export.prune_configuration import TokenPruneConfiguration

Array = NDArray[Any]
CONSTANTS = ("codes", "coefficients", "signs", "order")
LEADING = [(), (5,), (2, 3), (0,), (2, 0, 1)]
MODES = tuple(mode for mode in schemas.PRUNE_MODES if mode != "random")


def _configuration(packed: Any) -> BinaryMatMulConfiguration:
    order: Order = "none"
    if packed.order is not None:
        by_column = packed.order.size == packed.attributes["plane_columns"][0]
        order = "columns" if by_column else "chunks"
    return BinaryMatMulConfiguration(
        k=packed.attributes["K"],
        n=packed.attributes["N"],
        plane_columns=tuple(packed.attributes["plane_columns"]),
        hadamard_block=packed.attributes.get("hadamard_block", 0),
        signs=packed.signs is not None,
        order=order,
    )


def _model(make_model: Callable[..., Any], packed: Any, x: Array, kind: Kind) -> onnx.ModelProto:
    configuration = _configuration(packed)
    function = binary_matmul_function(configuration, kind, configuration.overload)
    model: onnx.ModelProto = make_model(
        "BinaryMatMul",
        {"X": x, **packed.inputs},
        ["Y"],
        constants=CONSTANTS,
        functions=[function],
        **packed.attributes,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _bound(packed: Any, x: Array, kind: Kind) -> Array:
    """Return the largest error that the roundings of a body can add up to, per element of y."""
    k, padded_k = packed.attributes["K"], packed.attributes["plane_columns"][0]
    block = packed.attributes.get("hadamard_block", 0)
    # |v|, where a Hadamard block's roundings count against the sum of its |terms|
    u = np.zeros((*x.shape[:-1], padded_k))
    u[..., :k] = np.abs(x)
    if block:
        sums = u.reshape(*x.shape[:-1], padded_k // block, block).sum(axis=-1)
        u = np.repeat(sums / np.sqrt(block), block, axis=-1)
    v = reference.transform(u, None, packed.order, padded_k, 0)
    alpha = np.zeros((len(packed.codes) * 16, padded_k))
    for part in packed.alpha:
        alpha[:, : 64 * part.shape[1]] += np.repeat(part, 64, axis=1)
    alpha = alpha[: packed.attributes["N"]]
    magnitude = v @ alpha.T
    bound: Array = 2 * padded_k * 2.0**-23 * magnitude
    if x.dtype == np.float16:
        # each rounded to float16 at most once: entries of the Hadamard matrix, its scale, v, the
        # weight or a plane's scale, a plane's product, three sums, y
        bound += 9 * 2.0**-11 * magnitude + 2.0**-24
    if kind == "nbits":
        # half a step of the int8 activations for each column of a chunk and plane; the step of the
        # rounded v is up to 1 % wider
        true_v = reference.transform(x, packed.signs, packed.order, k, block)
        chunks = true_v.reshape(*x.shape[:-1], padded_k // 64, 64)
        step = 1.01 * np.abs(chunks).max(axis=-1) / 127
        bound += np.repeat(step / 2, 64, axis=-1) @ alpha.T
    return bound


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["dense", "nbits"])
def test_body_equals_the_reference_within_its_roundings(
    packed: Any, kind: Kind, dtype: type, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    for seed, leading in enumerate(LEADING):
        x = np.random.default_rng(seed).standard_normal((*leading, packed.attributes["K"]))
        x = x.astype(dtype)
        (y,) = run(_model(make_model, packed, x, kind), {"X": x})
        expected = reference.binary_matmul(x, *packed.inputs.values(), **packed.attributes)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        error = np.abs(y - expected)
        assert (error <= _bound(packed, x, kind)).all(), (leading, seed, error.max())
        if kind == "nbits" and y.size > 100:
            # int8 steps are about 2.6 / 127 of the rms: an rms error of 0.6 %, with room for noise
            assert np.linalg.norm(error) <= 0.015 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["dense", "nbits"])
def test_unpacking_is_folded_when_the_session_loads(
    packed: Any,
    kind: Kind,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    x = np.ones((1, packed.attributes["K"]), dtype=np.float32)
    optimized = str(tmp_path / "optimized.onnx")
    run(_model(make_model, packed, x, kind), {"X": x}, optimized=optimized)
    nodes = [node.op_type for node in onnx.load(optimized).graph.node]
    left = {"Pad", "Mul", "Reshape", "Shape", "Gather", "Slice", "MatMul", "MatMulNBits", "Add"}
    # to the type of X: nothing to do for float32, but it makes the graph's output here
    casts = {"Cast"} if kind == "nbits" else set()
    assert set(nodes) <= left | casts, nodes
    assert nodes.count("Cast") <= 1
    planes = len(packed.attributes["plane_columns"])
    assert nodes.count("MatMulNBits") == (planes if kind == "nbits" else 0)


def test_two_configurations_live_in_one_model(
    make_packed: Callable[..., Any], make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(3)
    first = make_packed(rng, 65, 64, (64,))
    second = make_packed(rng, 5, 65, (128, 64), hadamard_block=64)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    model = _model(make_model, first, x, "dense")
    other = _model(make_model, second, np.zeros((4, 65), np.float32), "dense")
    onnx.compose.add_prefix(other, "second_", inplace=True, rename_functions=False)
    other.graph.node[0].input[0] = "Y"
    model.graph.node.extend(other.graph.node)
    model.graph.initializer.extend(other.graph.initializer)
    model.functions.extend(other.functions)
    model.graph.output[0].name = other.graph.output[0].name
    (y,) = run(model, {"X": x})
    middle = reference.binary_matmul(x, *first.inputs.values(), **first.attributes)
    expected = reference.binary_matmul(middle, *second.inputs.values(), **second.attributes)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2 * 128 * 2.0**-23 * np.abs(middle).sum())


def test_overloads_tell_configurations_apart() -> None:
    configurations = [
        BinaryMatMulConfiguration(k, n, planes, block, signs, order)
        for k, n, planes in ((128, 12, (128,)), (128, 1, (128,)), (128, 1, (128, 64)))
        for block in (0, 64, 128)
        for signs in (False, bool(block))
        for order in ("none", "columns", "chunks")
    ]
    assert len({c.overload for c in configurations}) == len(set(configurations))
    named = BinaryMatMulConfiguration(300, 17, (320, 256), 64, True, "chunks")
    assert named.overload == "k300n17p5_4h64sc"
    prunes = [
        TokenPruneConfiguration(
            "maxmin", scores, metric=metric, keep_count=count, theta=theta, merge=merge
        )
        for scores in (False, True)
        for metric in (False, True)
        for count in (-1, 3)
        for theta in (0.5, 0.25)
        for merge in ("none", "mean")
    ]
    assert len({c.overload for c in prunes}) == len(prunes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0},
        {"n": 0},
        {"plane_columns": ()},
        {"plane_columns": (128,)},
        {"plane_columns": (320, 100)},
        {"plane_columns": (320, 64, 128)},
        {"plane_columns": (320,) * 5},
        {"hadamard_block": 32},
        {"hadamard_block": 128},
        {"signs": True},
    ],
)
def test_configuration_outside_the_format_is_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"k": 300, "n": 17, "plane_columns": (320, 64)}
    with pytest.raises(RequestError):
        BinaryMatMulConfiguration(**right | wrong)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(24))
def test_token_prune_equals_the_reference_exactly(
    seed: int,
    mode: str,
    prune_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    inputs, attributes = prune_case(seed, mode)
    attributes.pop("order", None)
    outputs = ["pruned", "kept_indices", "lengths", "token_map"][: 2 + seed % 3]
    given: dict[str, Any] = {
        name: value is not None for name, value in inputs.items() if name != "hidden"
    }
    given |= {name: name in outputs for name in ("lengths", "token_map")}
    configuration = TokenPruneConfiguration(**given, **attributes)
    function = token_prune_function(configuration, configuration.overload)
    model = make_model("TokenPrune", inputs, outputs, functions=[function], **attributes)
    onnx.checker.check_model(model, full_check=True)
    expected = reference_prune.token_prune(*inputs.values(), **attributes)
    for output, wanted in zip(run(model, inputs), expected, strict=False):
        assert output.dtype == wanted.dtype
        np.testing.assert_array_equal(output, wanted)


@pytest.mark.parametrize("mode", ["maxmin", "mmr"])
def test_integers_that_are_as_similar_stay_so(
    mode: str, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    """Norms of small integers are no float32 numbers: rows must not be divided by them."""
    rng = np.random.default_rng(0)
    cases = [([[2, -3, -2], [1, 3, -3], [-1, 1, 0], [2, 2, -1], [1, -1, -1]], [3, 1, 2, 5, 5])]
    for _ in range(400):
        tokens, width = rng.integers(4, 40), rng.choice([3, 8, 17])
        cases.append((rng.integers(-3, 4, (tokens, width)), rng.integers(0, 9, tokens)))
    # the batch is of one length; the rest is padding
    hidden = np.zeros((len(cases), 40, 17), np.float32)
    scores = np.zeros((len(cases), 40), np.float32)
    segments = np.full((len(cases), 40), -2, np.int32)
    for row, (features, eighths) in enumerate(cases):
        tokens, width = np.shape(features)
        hidden[row, :tokens, :width] = features
        scores[row, :tokens] = np.divide(eighths, 8)
        segments[row, :tokens] = 0
    keep = np.array([2, *(rng.integers(1, len(scores)) for _, scores in cases[1:])])
    inputs = {"hidden": hidden, "scores": scores, "segments": segments, "keep": keep}
    _compare_kept(mode, inputs, make_model, run)


@pytest.mark.parametrize("mode", ["topk_score", "maxmin", "mmr", "dpp", "coverage"])
@pytest.mark.parametrize("score", [[-0.0, 0.0, 0.0, -0.0, 0, -1], [0.0, -0.0, -0.0, 0, -1, -1]])
def test_minus_zero_equals_zero(
    mode: str, score: list[float], make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    hidden = np.random.default_rng(0).integers(-3, 4, (1, 6, 8)).astype(np.float32)
    inputs = {"hidden": hidden, "scores": np.array([score], np.float32), "segments": None}
    _compare_kept(mode, {**inputs, "keep": np.array([2])}, make_model, run)


def _compare_kept(
    mode: str,
    inputs: dict[str, Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    given = {name: value is not None for name, value in inputs.items() if name != "hidden"}
    configuration = TokenPruneConfiguration(mode, **given, lengths=False)
    function = token_prune_function(configuration, configuration.overload)
    model = make_model(
        "TokenPrune", inputs, ["pruned", "kept_indices"], functions=[function], mode=mode
    )
    expected = reference_prune.token_prune(*inputs.values(), mode=mode)
    np.testing.assert_array_equal(run(model, inputs)[1], expected.kept_indices)


@pytest.mark.parametrize("first", ["max_norm", "farthest"])
@pytest.mark.parametrize("seed", range(3))
def test_first_token_of_maxmin_without_scores(
    seed: int, first: str, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(seed)
    hidden = rng.choice([-1.0, 1.0], (2, 30, 16)) * 2.0 ** rng.integers(0, 3, (2, 30, 1))
    segments = rng.integers(-1, 2, (2, 30)).astype(np.int32)
    attributes: dict[str, Any] = {"mode": "maxmin", "first": first, "keep_count": 1}
    configuration = TokenPruneConfiguration(segments=True, lengths=False, **attributes)
    function = token_prune_function(configuration, configuration.overload)
    inputs = {"hidden": hidden.astype(np.float32), "scores": None, "segments": segments}
    outputs = ["pruned", "kept_indices"]
    model = make_model("TokenPrune", inputs, outputs, functions=[function], **attributes)
    expected = reference_prune.token_prune(*inputs.values(), **attributes)
    np.testing.assert_array_equal(run(model, inputs)[1], expected.kept_indices)


@pytest.mark.parametrize(("tokens", "kept"), [(30, 3), (31, 4)])
def test_ratio_rounds_up_but_not_for_the_float32_of_a_tenth(
    tokens: int, kept: int, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    configuration = TokenPruneConfiguration("uniform", keep_ratio=0.1)
    function = token_prune_function(configuration, configuration.overload)
    inputs = {"hidden": np.ones((1, tokens, 2), dtype=np.float32)}
    outputs = ["pruned", "kept_indices", "lengths"]
    attributes = {"mode": "uniform", "keep_ratio": 0.1}
    model = make_model("TokenPrune", inputs, outputs, functions=[function], **attributes)
    assert run(model, inputs)[2].tolist() == [kept]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "random"}, "no fallback"),
        ({"mode": "maxmin", "order": "score"}, "order 'score' has no fallback"),
        ({"mode": "attention"}, "none of topk_score"),
        ({"mode": "dpp", "merge": "sum"}, "merge 'sum' is none of none, mean"),
        ({"mode": "dpp", "merge": "score_weighted"}, "'score_weighted' needs the input 'scores'"),
        ({"mode": "maxmin", "first": "max_score"}, "'max_score' needs the input 'scores'"),
        ({"mode": "mmr"}, "needs the input 'scores'"),
        ({"mode": "maxmin", "keep_ratio": 2.0}, "keep_ratio"),
        ({"mode": "maxmin", "keep_count": -2}, "keep_count"),
    ],
)
def test_token_prune_that_no_body_can_do_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TokenPruneConfiguration(**wrong)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gated_silu_function_equals_the_reference(
    dtype: type[Any], make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    schemas.register()
    x = (4 * np.random.default_rng(0).standard_normal((2, 3, 34))).astype(dtype)
    model = make_model("GatedSiLU", {"X": x}, ["Y"], functions=[gated_silu_function(21)])
    onnx.checker.check_model(model, full_check=True)
    # ONNX Runtime's Sigmoid is off by up to 1e-6
    tolerance = 1e-5 if dtype == np.float32 else 4e-3
    expected = reference.gated_silu(x)
    np.testing.assert_allclose(run(model, {"X": x})[0], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["dense", "nbits"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_group_matmul_function_equals_the_reference(
    bits: int,
    block: int,
    kind: Kind,
    dtype: type[Any],
    group_matmul_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    schemas.register()
    tensors, attributes = group_matmul_case(0, bits, block)
    x = np.random.default_rng(1).standard_normal((2, 3, attributes["K"])).astype(dtype)
    model = make_model(
        "GroupMatMul",
        {"X": x, **tensors},
        ["Y"],
        constants=tuple(tensors),
        functions=[group_matmul_function(kind, bits, 23)],
        **attributes,
    )
    onnx.checker.check_model(model, full_check=True)
    (y,) = run(model, {"X": x})
    expected = reference.group_matmul(x, *tensors.values(), **attributes)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    # int8 steps are an rms error of 0.6 %, float16 rounds to 11 bits
    tolerance = 0.015 if kind == "nbits" else 1e-5 if dtype == np.float32 else 2e-3
    assert np.linalg.norm(y - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("seed", range(12))
def test_attention_function_equals_the_reference(
    seed: int,
    attention_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    schemas.register()
    inputs, attributes = attention_case(seed)
    expected = reference.group_query_attention(
        *list(inputs.values())[:6],
        int(inputs["total_sequence_length"][0]),
        num_heads=attributes["num_heads"],
        scale=attributes.get("scale", 0.0),
    )
    function = group_query_attention_function(23)
    model = make_model(
        "GroupQueryAttention",
        inputs,
        list(schemas.ATTENTION_OUTPUTS),
        functions=[function],
        **attributes,
    )
    onnx.checker.check_model(model, full_check=True)
    results = run(model, inputs)
    tokens = int(inputs["total_sequence_length"][0])
    # sums of up to 240 terms in float32; a float16 cache rounds queries and output to 11 bits
    assert results[0].dtype == inputs["qkv"].dtype
    tolerance = 4e-6 if results[1].dtype == np.float32 else 4e-3
    np.testing.assert_allclose(results[0], expected[0], rtol=tolerance, atol=tolerance)
    for found, wanted in zip(results[1:], expected[1:], strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(found[:, :, :tokens], wanted[:, :, :tokens])
