"""The schemas: registered once, with the defaults of OPS.md, and shapes inferred or refused."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, defs, helper
from onnx.shape_inference import InferenceError

from bivlm_edge.export import schemas


@pytest.fixture(autouse=True)
def _registered() -> None:
    schemas.register()


def _inferred(
    operator: str,
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: list[str],
    domain: str = schemas.DOMAIN,
    **attributes: Any,
) -> dict[str, tuple[int, list[Any]]]:
    """Return type and shape of each output; `inputs` in order, "" for one that is absent."""
    names = [name if not name.startswith("absent") else "" for name in inputs]
    node = helper.make_node(operator, names, outputs, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, *inputs[name]) for name in names if name],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    opsets = [helper.make_opsetid(name, 1) for name in (schemas.DOMAIN, schemas.MICROSOFT_DOMAIN)]
    model = helper.make_model(graph, opset_imports=opsets)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in inferred.graph.output
    }


def _binary_matmul(**changed: tuple[int, list[Any]]) -> dict[str, tuple[int, list[Any]]]:
    inputs: dict[str, tuple[int, list[Any]]] = {
        "X": (TensorProto.FLOAT, ["batch", 7, 300]),
        "codes": (TensorProto.UINT8, [2, 1152]),
        "coefficients": (TensorProto.FLOAT16, [2, 3, 16]),
        "signs": (TensorProto.UINT8, [40]),
        "order": (TensorProto.UINT16, [5]),
    }
    return _inferred(
        "BinaryMatMul",
        inputs | changed,
        ["Y"],
        K=300,
        N=17,
        plane_columns=[320, 256],
        hadamard_block=64,
    )


def test_register_twice_is_allowed() -> None:
    schemas.register()
    for name, domain in (
        ("BinaryMatMul", schemas.DOMAIN),
        ("GroupMatMul", schemas.DOMAIN),
        ("GroupQueryAttention", schemas.DOMAIN),
        ("TokenPrune", schemas.DOMAIN),
        ("MatMulNBits", schemas.MICROSOFT_DOMAIN),
    ):
        assert defs.get_schema(name, domain=domain).since_version == 1


def test_defaults_are_those_of_the_contract() -> None:
    def defaults(operator: str) -> dict[str, Any]:
        attributes = defs.get_schema(operator, domain=schemas.DOMAIN).attributes
        return {
            name: helper.get_attribute_value(attribute.default_value)
            for name, attribute in attributes.items()
            if not attribute.required
        }

    assert defaults("BinaryMatMul") == {"hadamard_block": 0, "format": 1}
    assert defaults("GroupQueryAttention") == {"scale": 0.0}
    assert defaults("TokenPrune") == {
        "mode": b"mmr",
        "keep_count": -1,
        "keep_ratio": -1.0,
        "min_keep": 1,
        "theta": 0.5,
        "seed": 0,
        "score_reduce": b"mean",
        "first": b"auto",
        "similarity": b"cosine",
        "merge": b"none",
        "order": b"input",
    }


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_binary_matmul_replaces_the_last_axis(element: int) -> None:
    assert _binary_matmul(X=(element, ["batch", 7, 300])) == {"Y": (element, ["batch", 7, 17])}
    assert _binary_matmul(X=(element, [300])) == {"Y": (element, [17])}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X": (TensorProto.FLOAT, [2, 299])}, "last axis of its first input is 299; K = 300"),
        ({"X": (TensorProto.FLOAT, [])}, "is a scalar"),
        ({"codes": (TensorProto.UINT8, [2, 1024])}, r"codes \[2, 1024\].*needs 1152"),
        ({"coefficients": (TensorProto.FLOAT16, [2, 2, 16])}, "coefficients.*needs 3"),
        ({"coefficients": (TensorProto.FLOAT16, [2, 48])}, r"coefficients has shape \[2, 48\]"),
        ({"signs": (TensorProto.UINT8, [38])}, "signs.*needs 40"),
    ],
)
def test_binary_matmul_shapes_that_disagree_are_refused(
    changed: dict[str, tuple[int, list[Any]]], message: str
) -> None:
    with pytest.raises(InferenceError, match=f"BinaryMatMul: .*{message}"):
        _binary_matmul(**changed)


def test_binary_matmul_of_float64_is_refused() -> None:
    with pytest.raises(InferenceError, match="BinaryMatMul"):
        _binary_matmul(X=(TensorProto.DOUBLE, [2, 300]))


def test_token_prune_keeps_batch_width_and_type() -> None:
    outputs = _inferred(
        "TokenPrune",
        {
            "hidden": (TensorProto.FLOAT16, ["batch", "tokens", 48]),
            "scores": (TensorProto.FLOAT, ["batch", "tokens"]),
        },
        ["pruned", "kept_indices", "lengths", "token_map"],
    )
    element, shape = outputs["pruned"]
    assert (element, shape[0], shape[2]) == (TensorProto.FLOAT16, "batch", 48)
    assert shape[1] not in ("tokens", 0)
    assert outputs["kept_indices"][0] == TensorProto.INT64
    assert outputs["lengths"] == (TensorProto.INT64, ["batch"])
    assert outputs["token_map"] == (TensorProto.INT64, ["batch", "tokens"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "mmr"}, "mode 'mmr' needs the input 'scores'"),
        ({"mode": "attention"}, "'attention' is none of topk_score"),
        ({"mode": "maxmin", "first": "max_score"}, "first 'max_score' needs the input 'scores'"),
        ({"mode": "dpp", "merge": "score_weighted"}, "merge 'score_weighted' needs the input"),
        ({"mode": "dpp", "merge": "sum"}, "merge 'sum' is none of none, mean, score_weighted"),
        ({"mode": "dpp", "order": "rising"}, "order 'rising' is none of input, score"),
    ],
)
def test_token_prune_attributes_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceError, match=f"TokenPrune: .*{message}"):
        _inferred(
            "TokenPrune",
            {"hidden": (TensorProto.FLOAT, [1, 2, 3])},
            ["pruned", "kept_indices"],
            **given,
        )


def _attention(heads: int, **changed: list[Any]) -> dict[str, tuple[int, list[Any]]]:
    shapes = {
        "qkv": ["batch", "tokens", 80],
        "cos": ["batch", "tokens", 4],
        "sin": ["batch", "tokens", 4],
        "past_key": ["batch", 2, "past", 8],
        "past_value": ["batch", 2, "past", 8],
    } | changed
    kinds = dict.fromkeys(shapes, int(TensorProto.FLOAT))
    kinds |= dict.fromkeys(("past_key", "past_value"), int(TensorProto.FLOAT16))
    inputs = {name: (kinds[name], shape) for name, shape in shapes.items()}
    inputs["seqlens_k"] = (int(TensorProto.INT32), ["batch"])
    inputs["total_sequence_length"] = (int(TensorProto.INT32), [1])
    outputs = list(schemas.ATTENTION_OUTPUTS)
    return _inferred("GroupQueryAttention", inputs, outputs, num_heads=heads, kv_num_heads=2)


def test_attention_gives_the_heads_of_the_queries_and_grows_the_past() -> None:
    outputs = _attention(6)
    assert outputs["output"] == (TensorProto.FLOAT, ["batch", "tokens", 48])
    for name in ("present_key", "present_value"):
        element, shape = outputs[name]
        assert (element, shape[0], shape[1], shape[3]) == (TensorProto.FLOAT16, "batch", 2, 8)
        assert shape[2] not in ("past", 0)


@pytest.mark.parametrize(
    ("heads", "changed", "message"),
    [
        (5, {}, "num_heads = 5 is no multiple of kv_num_heads = 2"),
        (6, {"qkv": ["batch", 80]}, r"qkv has shape \['batch', 80\]"),
        (6, {"qkv": ["batch", "tokens", 90]}, "last axis of qkv is 90; it needs 10 heads of even"),
        (6, {"past_key": ["batch", 2, 8]}, "past_key has shape"),
        (6, {"past_value": ["batch", 3, 7, 8]}, "is 3; kv_num_heads = 2 needs 2"),
    ],
)
def test_attention_shapes_that_disagree_are_refused(
    heads: int, changed: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(InferenceError, match=f"GroupQueryAttention: .*{message}"):
        _attention(heads, **changed)


def test_gated_silu_halves_the_last_axis() -> None:
    element = int(TensorProto.FLOAT16)
    outputs = _inferred("GatedSiLU", {"X": (element, ["batch", 3, 34])}, ["Y"])
    assert outputs == {"Y": (element, ["batch", 3, 17])}
    with pytest.raises(InferenceError, match=r"GatedSiLU: X has shape \[3, 33\].*even"):
        _inferred("GatedSiLU", {"X": (element, [3, 33])}, ["Y"])


def _group_matmul(bits: int = 4, **changed: list[Any]) -> dict[str, tuple[int, list[Any]]]:
    shapes = {"X": ["batch", 7, 96], "codes": [5, 3, 16], "scales": [5, 3]} | changed
    kinds = (TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.FLOAT16)
    inputs = {name: (kind, shapes[name]) for name, kind in zip(shapes, kinds, strict=True)}
    return _inferred("GroupMatMul", inputs, ["Y"], K=96, N=5, bits=bits, block_size=32)


def test_group_matmul_replaces_the_last_axis() -> None:
    assert _group_matmul() == {"Y": (TensorProto.FLOAT16, ["batch", 7, 5])}


@pytest.mark.parametrize(
    ("bits", "changed", "message"),
    [
        (4, {"X": [2, 95]}, "last axis of its first input is 95; K = 96"),
        (4, {"codes": [5, 3, 32]}, r"codes \[5, 3, 32\].*needs 16"),
        (4, {"codes": [5, 48]}, r"codes has shape \[5, 48\]; K, N, bits and block_size need"),
        (4, {"scales": [5, 6]}, "scales.*needs 3"),
        (2, {}, "bits = 2, block_size = 32 and K = 96; bits must be 4 or 8"),
    ],
)
def test_group_matmul_shapes_that_disagree_are_refused(
    bits: int, changed: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(InferenceError, match=f"GroupMatMul: .*{message}"):
        _group_matmul(bits, **changed)


def test_matmul_nbits_has_the_shape_of_a_product() -> None:
    outputs = _inferred(
        "MatMulNBits",
        {
            "A": (TensorProto.FLOAT, ["tokens", 128]),
            "B": (TensorProto.UINT8, [5, 2, 16]),
            "scales": (TensorProto.FLOAT, [5, 2]),
        },
        ["Y"],
        schemas.MICROSOFT_DOMAIN,
        K=128,
        N=5,
        bits=2,
        block_size=64,
    )
    assert outputs == {"Y": (TensorProto.FLOAT, ["tokens", 5])}
