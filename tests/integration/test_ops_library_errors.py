"""What the compiled operators refuse, and that the sentence names the operator and the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

import bivlm_edge
from bivlm_edge.errors import OpsLibraryError

Array = NDArray[Any]
REFUSALS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.RuntimeException,
)


@pytest.fixture(scope="session")
def library() -> str:
    try:
        return bivlm_edge.custom_ops_library()
    except OpsLibraryError as error:
        pytest.skip(str(error))


def _uint16(*values: int) -> Array:
    return np.array(values, dtype=np.uint16)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"K": 0}, "K is 0"),
        ({"N": 0}, "N is 0"),
        ({"format": 2}, "format is 2"),
        ({"hadamard_block": 32}, "hadamard_block is 32"),
        ({"hadamard_block": 128}, "hadamard_block is 128, .* 320"),
        ({"hadamard_block": 0}, "signs"),
        ({"plane_columns": [256, 320]}, r"plane_columns is \(256, 320\)"),
        ({"plane_columns": [256, 256]}, "plane_columns .* 320"),
        ({"plane_columns": [320, 100]}, r"plane_columns is \(320, 100\)"),
        ({"plane_columns": [320] * 5}, "plane_columns has 5"),
        ({"codes": np.zeros((2, 10), np.uint8)}, r"codes .*\[2, 10\].*\[2, 1152\]"),
        ({"coefficients": np.zeros((2, 2, 16), np.float16)}, r"\[2, 2, 16\].*\[2, 3, 16\]"),
        ({"coefficients": np.zeros((2, 3, 16), np.float32)}, "coefficients"),
        ({"signs": np.zeros(39, np.uint8)}, r"signs .*\[39\].*\[40\]"),
        ({"order": _uint16(0, 1, 2, 3, 3)}, "not a permutation: element 4 is 3"),
        ({"order": _uint16(0, 1, 2, 3, 9)}, "not a permutation: element 4 is 9"),
        ({"order": _uint16(0, 1, 2)}, r"order .*\[3\].*\[320\] or \[5\]"),
        ({"X": np.zeros((2, 299), np.float32)}, r"\[2, 299\].*K = 300"),
        ({"X": np.zeros((), np.float32)}, "K = 300"),
        ({"X": np.zeros((2, 300), np.float64)}, "expected float32 or float16"),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_binary_matmul_refuses(
    changed: dict[str, Any],
    words: str,
    constant: bool,
    library: str,
    make_packed: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    rng = np.random.default_rng(0)
    packed = make_packed(rng, 17, 300, (320, 256), hadamard_block=64, signs=True, order="chunks")
    inputs = {"X": np.zeros((2, 300), np.float32), **packed.inputs}
    inputs |= {name: value for name, value in changed.items() if name in inputs}
    attributes = packed.attributes | {k: v for k, v in changed.items() if k not in inputs}
    constants = ("codes", "coefficients", "signs", "order") if constant else ()
    model = make_model("BinaryMatMul", inputs, ["Y"], constants=constants, **attributes)
    with pytest.raises(REFUSALS, match="BinaryMatMul") as error:
        run(model, inputs, library=library)
    assert re.search(words, str(error.value)), error.value


def test_huge_pages_are_1_or_0(
    library: str,
    make_packed: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = make_packed(np.random.default_rng(0), 17, 300, (320, 256))
    inputs = {"X": np.zeros((2, 300), np.float32), **packed.inputs}
    constants = ("codes", "coefficients", "signs", "order")
    model = make_model("BinaryMatMul", inputs, ["Y"], constants=constants, **packed.attributes)
    monkeypatch.setenv("BIVLM_HUGE_PAGES", "2")
    with pytest.raises(REFUSALS, match=r"BinaryMatMul.*BIVLM_HUGE_PAGES=2 is neither 0 .* nor 1"):
        run(model, {"X": inputs["X"]}, library=library)


def _floats(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def _int32(*values: int) -> Array:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_heads": 5}, "num_heads is 5 and kv_num_heads 2"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"kv_num_heads": -1}, "kv_num_heads -1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"qkv": _floats(2, 3, 90)}, r"qkv is \[2, 3, 90\].*10 heads.*multiple of 2"),
        ({"qkv": _floats(2, 80)}, r"qkv is \[2, 80\], expected \[B, S, heads \* d\]"),
        ({"cos": _floats(2, 3, 8)}, r"cos is .*\[2, 3, 8\].*\[2, 3, 4\]"),
        ({"sin": _floats(2, 4, 4)}, r"sin is .*\[2, 4, 4\].*\[2, 3, 4\]"),
        ({"past_key": _floats(2, 2, 6, 8)}, r"past_value is .*\[2, 2, 5, 8\].*\[2, 2, 6, 8\]"),
        ({"past_key": _floats(2, 3, 5, 8)}, r"past_key is .*\[2, 3, 5, 8\].*\[2, 2, 5, 8\]"),
        ({"past_value": _floats(1, 2, 5, 8)}, r"past_value is .*\[1, 2, 5, 8\]"),
        ({"seqlens_k": _int32(4)}, r"seqlens_k is .*\[1\].*\[2\]"),
        ({"seqlens_k": _int32(4, 5)}, "seqlens_k is 5 in row 1, expected 2 to 4"),
        ({"seqlens_k": _int32(1, 4)}, "seqlens_k is 1 in row 0, expected 2 to 4"),
        ({"seqlens_k": _int32(-9, 4)}, "seqlens_k is -9 in row 0"),
        (
            {"seqlens_k": _int32(8, 8), "total_sequence_length": _int32(9)},
            "seqlens_k is 8 in row 0, expected 2 to 7",
        ),
        ({"total_sequence_length": _int32(2)}, "total_sequence_length is 2, less than the 3"),
        ({"total_sequence_length": _int32(5, 5)}, r"total_sequence_length is int32 \[2\]"),
    ],
)
def test_attention_refuses(
    changed: dict[str, Any],
    words: str,
    library: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    inputs: dict[str, Any] = {
        "qkv": _floats(2, 3, 80),
        "cos": _floats(2, 3, 4),
        "sin": _floats(2, 3, 4),
        "past_key": _floats(2, 2, 5, 8),
        "past_value": _floats(2, 2, 5, 8),
        "seqlens_k": _int32(4, 4),
        "total_sequence_length": _int32(5),
    }
    attributes: dict[str, Any] = {"num_heads": 6, "kv_num_heads": 2}
    inputs |= {name: value for name, value in changed.items() if name in inputs}
    attributes |= {name: value for name, value in changed.items() if name not in inputs}
    outputs = ["output", "present_key", "present_value"]
    model = make_model("GroupQueryAttention", inputs, outputs, **attributes)
    with pytest.raises(REFUSALS, match="GroupQueryAttention") as error:
        run(model, inputs, library=library)
    assert re.search(words, str(error.value)), error.value


@pytest.mark.parametrize("shape", [(2, 7), ()])
def test_gated_silu_refuses_what_has_no_halves(
    shape: tuple[int, ...], library: str, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    x = np.zeros(shape, np.float32)
    model = make_model("GatedSiLU", {"X": x}, ["Y"])
    with pytest.raises(REFUSALS, match=r"GatedSiLU.*X is \[.*\], expected .* an even last one"):
        run(model, {"X": x}, library=library)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"K": 0}, "K is 0"),
        ({"N": -1}, "N is -1"),
        ({"bits": 2}, "bits is 2, expected 4 or 8"),
        ({"block_size": 8}, "block_size is 8, expected 16, 32 or 64, and a divisor of K = 96"),
        ({"block_size": 64}, "block_size is 64"),
        ({"codes": np.zeros((5, 3, 16), np.uint8)}, r"codes is .*\[5, 3, 16\].*\[5, 3, 32\]"),
        ({"scales": np.zeros((5, 2), np.float16)}, r"scales is .*\[5, 2\].*\[5, 3\]"),
        ({"scales": _floats(5, 3)}, "scales|type"),
        ({"X": _floats(2, 95)}, r"X is \[2, 95\], its last axis must be K = 96"),
        ({"X": _floats()}, "K = 96"),
        ({"X": np.zeros((2, 96), np.float64)}, "expected float32 or float16"),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_group_matmul_refuses(
    changed: dict[str, Any],
    words: str,
    constant: bool,
    library: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    inputs: dict[str, Any] = {
        "X": _floats(2, 96),
        "codes": np.zeros((5, 3, 32), np.uint8),
        "scales": np.zeros((5, 3), np.float16),
    }
    attributes: dict[str, Any] = {"K": 96, "N": 5, "bits": 8, "block_size": 32}
    inputs |= {name: value for name, value in changed.items() if name in inputs}
    attributes |= {name: value for name, value in changed.items() if name not in inputs}
    constants = ("codes", "scales") if constant else ()
    model = make_model("GroupMatMul", inputs, ["Y"], constants=constants, **attributes)
    with pytest.raises(REFUSALS, match="GroupMatMul") as error:
        run(model, inputs, library=library)
    assert re.search(words, str(error.value)), error.value


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mode": "attention"}, "'attention'.*topk_score"),
        ({"mode": "topk_score", "scores": None}, "'topk_score' needs .*scores"),
        ({"mode": "mmr", "scores": None}, "'mmr' needs .*scores"),
        ({"keep": np.array([-1])}, "keep is -1"),
        ({"mode": "maxmin", "first": "max_score", "scores": None}, "first 'max_score' needs"),
        ({"merge": "score_weighted", "mode": "dpp", "scores": None}, "'score_weighted' needs"),
        ({"merge": "sum"}, "merge is 'sum', expected none, mean or score_weighted"),
        ({"order": "x"}, "order is 'x', expected input or score"),
        ({"first": "x"}, "first is 'x', expected auto, max_score, max_norm or farthest"),
        ({"similarity": "l2"}, "similarity is 'l2', expected cosine or dot"),
        ({"score_reduce": "min"}, "score_reduce is 'min', expected mean, sum or max"),
        ({"keep": np.array([1, 2, 3])}, r"keep is int64 \[3\].*per row \[2\]"),
        ({"keep": np.array([[1, 2]])}, r"keep is int64 \[1, 2\].*\[2, segments\]"),
        ({"keep": np.array([2, -4])}, "keep is -4"),
        (
            {"keep": np.full((2, 3), 1), "segments": np.full((2, 6), 4, np.int32)},
            r"keep is \[2, 3\], but row 0 has a token of segment 4",
        ),
        ({"keep_count": -2}, "keep_count is -2"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"keep_ratio": float("nan")}, "keep_ratio is nan"),
        ({"theta": -0.5}, "theta is -0.5"),
        ({"theta": float("nan")}, "theta is nan"),
        ({"hidden": np.zeros((2, 6), np.float32)}, r"\[2, 6\].*\[B, S, D\]"),
        ({"scores": np.zeros((2, 5), np.float32)}, r"scores .*\[2, 5\].*\[2, 6\]"),
        ({"segments": np.zeros((1, 6), np.int32)}, r"segments .*\[1, 6\].*\[2, 6\]"),
        ({"segments": np.full((2, 6), -3, np.int32)}, "segments has -3"),
        ({"metric": np.zeros((2, 5, 3), np.float32)}, r"metric .*\[2, 5, 3\]"),
        ({"scores": np.zeros((2, 3, 5), np.float32)}, r"scores .*\[2, 3, 5\].*\[2, 3, 6\]"),
        ({"scores": np.zeros((2, 0, 6), np.float32)}, "at least one head"),
        # ONNX Runtime itself refuses other types
        ({"metric": np.zeros((2, 6, 3), np.uint8)}, "TokenPrune"),
    ],
)
def test_token_prune_refuses(
    changed: dict[str, Any],
    words: str,
    library: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    inputs: dict[str, Any] = {
        "hidden": np.zeros((2, 6, 4), np.float32),
        "scores": np.zeros((2, 6), np.float32),
        "segments": np.zeros((2, 6), np.int32),
        "keep": np.array([2]),
        "metric": None,
    }
    inputs |= {name: value for name, value in changed.items() if name in inputs}
    attributes = {name: value for name, value in changed.items() if name not in inputs}
    model = make_model("TokenPrune", inputs, ["pruned", "kept_indices"], **attributes)
    with pytest.raises(REFUSALS, match="TokenPrune") as error:
        run(model, inputs, library=library)
    assert re.search(words, str(error.value)), error.value


@pytest.mark.parametrize("given", [{"mode": "mmr"}, {"mode": "dpp", "merge": "score_weighted"}])
def test_token_prune_without_its_scores_does_not_load(
    given: dict[str, str], library: str, make_model: Callable[..., Any]
) -> None:
    inputs = {
        "hidden": np.zeros((2, 6, 4), np.float32),
        "scores": None,
        "segments": np.zeros((2, 6), np.int32),
    }
    model = make_model("TokenPrune", inputs, ["pruned", "kept_indices"], **given)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    with pytest.raises(REFUSALS, match=r"TokenPrune.*needs the input scores"):
        ort.InferenceSession(model.SerializeToString(), options)
