"""Cases for the tests of the operators: packed weights, tokens to prune, one-node models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]


@dataclass(frozen=True)
class Packed:
    """A packed weight, and the bits and coefficients that it was made of.

    `bits[p]` is `[Np, n_p]`; `alpha[p]` is `[Np, n_p / 64]`, float64, per chunk.
    """

    attributes: dict[str, Any]
    codes: Array
    coefficients: Array
    signs: Array | None
    order: Array | None
    bits: list[Array]
    alpha: list[Array]

    @property
    def inputs(self) -> dict[str, Array | None]:
        return {
            "codes": self.codes,
            "coefficients": self.coefficients,
            "signs": self.signs,
            "order": self.order,
        }


def pack(
    rng: np.random.Generator,
    n: int,
    k: int,
    plane_columns: Sequence[int],
    *,
    hadamard_block: int = 0,
    signs: bool = False,
    order: Literal["none", "columns", "chunks"] = "none",
) -> Packed:
    """Draw a weight and write it byte by byte as FORMAT.md says."""
    padded_k, padded_n = -(-k // 64) * 64, -(-n // 16) * 16
    panels, chunks = padded_n // 16, padded_k // 64
    order_values = {
        "none": None,
        "columns": rng.permutation(padded_k).astype(np.uint16),
        "chunks": rng.permutation(chunks).astype(np.uint16),
    }[order]
    width = padded_k if order_values is None else padded_k // len(order_values)
    firsts = [0] if order_values is None else order_values
    channels = np.concatenate([np.arange(width) + int(first) * width for first in firsts])

    bits = [rng.integers(0, 2, (padded_n, columns), dtype=np.uint8) for columns in plane_columns]
    for plane in bits:
        plane[n:] = 0
        if not hadamard_block:
            plane[:, channels[: plane.shape[1]] >= k] = 0
    codes = np.zeros((panels, 2 * sum(plane_columns)), dtype=np.uint8)
    slots: dict[tuple[int, int], Array] = {}
    alpha = [np.zeros((padded_n, columns // 64)) for columns in plane_columns]
    start = 0
    for chunk in range(chunks):
        planes = sum(columns > 64 * chunk for columns in plane_columns)
        for p in range(planes):
            if (planes, p) not in slots:
                drawn = (rng.uniform(0.01, 0.1, padded_n) / (1 << p)).astype(np.float16)
                drawn[n:] = 0
                slots[planes, p] = drawn
            alpha[p][:, chunk] = slots[planes, p]
            pair = p + 1 < planes or p % 2 == 1
            for column in range(64):
                t, rest = divmod(column, 16 if pair else 32)
                i, e = divmod(rest, 4)
                byte = start + p // 2 * 256 + 64 * t + e
                shift = 2 * i + p % 2 if pair else i
                rows = bits[p][:, 64 * chunk + column].reshape(panels, 16)
                codes[:, byte : byte + 64 : 4] |= rows << shift
        start += 128 * planes
    attributes: dict[str, Any] = {"K": k, "N": n, "plane_columns": list(plane_columns)}
    if hadamard_block:
        attributes["hadamard_block"] = hadamard_block
    return Packed(
        attributes,
        codes,
        np.stack([value.reshape(panels, 16) for value in slots.values()], axis=1),
        rng.integers(0, 256, padded_k // 8, dtype=np.uint8) if signs else None,
        order_values,
        bits,
        alpha,
    )


def single_node_model(
    operator: str,
    inputs: dict[str, Array | None],
    outputs: Sequence[str],
    *,
    constants: Sequence[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """Return a model of one node of our domain; shapes of inputs and outputs stay open.

    Args:
        operator: Name of the operator.
        inputs: Its inputs in order; None for one that is absent. Only types are read, and the
            values of those in `constants`, which become initializers.
        outputs: Names; the first has the type of the first input, the others int64 (those
            of GroupQueryAttention that of its past).
        constants: Inputs that become initializers.
        functions: Model-local functions; the first one's overload is the node's.
        attributes: Of the node.
    """
    given = {name: array for name, array in inputs.items() if array is not None}
    names = [name if name in given else "" for name in inputs]
    overload = functions[0].overload if functions else ""
    node = helper.make_node(
        operator, names, list(outputs), domain="ai.bivlm", overload=overload, **attributes
    )
    element = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()}
    first = element[next(iter(inputs))]
    types = [first] + [TensorProto.INT64] * (len(outputs) - 1)
    ranks = [given[next(iter(inputs))].ndim, 2, 1, 2]
    if operator == "GroupQueryAttention":
        types, ranks = [first, element["past_key"], element["past_value"]], [3, 4, 4]
    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info(name, element[name], [None] * array.ndim)
            for name, array in given.items()
            if name not in constants
        ],
        [
            helper.make_tensor_value_info(name, kind, [None] * rank)
            for name, kind, rank in zip(outputs, types, ranks, strict=False)
        ],
        [numpy_helper.from_array(given[name], name) for name in constants if name in given],
    )
    return helper.make_model(
        graph,
        functions=list(functions),
        opset_imports=[
            helper.make_opsetid("", 23),
            helper.make_opsetid("ai.bivlm", 1),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )


def draw_prune_case(seed: int, mode: str) -> tuple[dict[str, Array | None], dict[str, Any]]:
    """Return inputs and attributes of TokenPrune for which float32 arithmetic is exact.

    Features are +-2^i in 16 or 4 channels, so that norms are powers of two, or integers from -3 to
    3 in any number of channels, whose norms are not; scores are eighths. Two of three cases have
    heads of scores, counts per segment, merging and the like.
    """
    rng = np.random.default_rng([seed, *mode.encode()])
    batch = int(rng.choice([1, 2, 3, 0], p=[0.4, 0.4, 0.15, 0.05]))
    tokens = int(rng.choice([0, 1, 5, 17, 40]))
    dtype = np.float32 if rng.random() < 0.5 else np.float16

    def features(width: int) -> Array:
        scaled: Array
        if rng.random() < 0.5:
            width = int(rng.choice([1, 3, 8, 17, 64]))
            scaled = rng.integers(-3, 4, (batch, tokens, width)).astype(np.float64)
        else:
            signs = rng.choice([-1.0, 1.0], (batch, tokens, width))
            scaled = signs * 2.0 ** rng.integers(-2, 3, (batch, tokens, 1))
        if tokens > 5 and rng.random() < 0.5:  # duplicates
            scaled[:, tokens // 2 :] = scaled[:, : tokens - tokens // 2]
        if batch and tokens and rng.random() < 0.3:
            scaled[0, 0] = 0
            scaled[-1, -1, 0] = np.nan
        return scaled.astype(dtype)

    inputs: dict[str, Array | None] = dict.fromkeys(("hidden", "scores", "segments", "keep"))
    inputs["hidden"] = features(16)
    if mode in ("topk_score", "mmr") or rng.random() < 0.5:
        scores = (rng.integers(0, 9, (batch, tokens)) / 8).astype(np.float32)
        special = [(slice(1), np.nan), (slice(None), 0.5), (slice(None, None, 3), np.nan)]
        if batch and rng.random() < 0.5:
            rows, value = special[int(rng.integers(3))]
            scores.T[rows] = value
            scores[0] = np.nan if rng.random() < 0.3 else scores[0]
        if tokens > 1 and rng.random() < 0.3:
            scores[:, 0], scores[:, -1] = np.inf, -np.inf
        inputs["scores"] = scores
    if rng.random() < 0.7:
        share = [0.1, 0.2, 0.3, 0.3, 0.1] if rng.random() < 0.9 else [0, 1, 0, 0, 0]
        ids = rng.choice([-2, -1, 0, 1, 7], (batch, tokens), p=share)
        inputs["segments"] = ids.astype(np.int32)
    if rng.random() < 0.4:
        shape = () if rng.random() < 0.5 else (1,)
        inputs["keep"] = np.full(shape, rng.integers(0, 12), dtype=np.int64)
    inputs["metric"] = features(4) if rng.random() < 0.3 else None
    attributes: dict[str, Any] = {"mode": mode}
    if (kind := rng.integers(0, 3)) == 0:
        attributes["keep_count"] = int(rng.integers(0, 8))
    elif kind == 1:
        attributes["keep_ratio"] = float(np.float32(rng.choice([0, 0.1, 0.25, 0.3, 0.5, 1])))
    if rng.random() < 0.5:
        attributes["min_keep"] = int(rng.integers(0, 4))
    if mode == "mmr":
        attributes["theta"] = float(rng.choice([0, 0.25, 0.5, 1]))
    if mode == "random":
        attributes["seed"] = int(rng.integers(-(1 << 62), 1 << 62))
    if mode == "dpp":
        attributes["theta"] = float(rng.choice([0, 0.25, 0.5, 1]))
    if seed % 3:
        _draw_choices(rng, inputs, attributes)
    return inputs, attributes


def _draw_choices(
    rng: np.random.Generator, inputs: dict[str, Array | None], attributes: dict[str, Any]
) -> None:
    """Add heads of scores, counts per row or segment, other metrics, and words, in place."""
    hidden, scores, keep = inputs["hidden"], inputs["scores"], inputs["keep"]
    assert hidden is not None
    batch, tokens, _ = hidden.shape
    if scores is not None and rng.random() < 0.4:
        heads = [scores] + [np.roll(scores, shift, axis=1) for shift in range(rng.integers(0, 3))]
        inputs["scores"] = np.stack(heads, axis=1)
        attributes["score_reduce"] = str(rng.choice(["mean", "sum", "max"]))
    if keep is not None and rng.random() < 0.6:
        shape = (batch,) if rng.random() < 0.5 else (batch, 8)
        inputs["keep"] = rng.integers(0, 12, shape)
    if rng.random() < 0.4:
        if rng.random() < 0.5:
            width = int(rng.integers(1, 20))
            metric = rng.integers(-3, 4, (batch, tokens, width)).astype(np.float64)
        else:
            signs = rng.choice([-1.0, 1.0], (batch, tokens, 4))
            metric = signs * 2.0 ** rng.integers(0, 3, (batch, tokens, 1))
        inputs["metric"] = metric.astype(rng.choice([np.float32, np.float16, np.int8]))
    if rng.random() < 0.4:
        attributes["similarity"] = str(rng.choice(["cosine", "dot"]))
    merges = ["none", "mean", "mean", "score_weighted"][: 3 + (scores is not None)]
    attributes["merge"] = str(rng.choice(merges))
    if attributes["mode"] == "maxmin":
        firsts = ["auto", "max_norm", "farthest", "max_score"][: 3 + (scores is not None)]
        attributes["first"] = str(rng.choice(firsts))
    if rng.random() < 0.3:
        attributes["order"] = "score"


def draw_attention_case(seed: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return inputs and attributes of GroupQueryAttention; the past behind its tokens is NaN.

    The cases are those that ONNX Runtime's operator computes, too: behind a past several tokens
    take a batch of one, and the rows of a batch have equal lengths.
    """
    rng = np.random.default_rng(seed)
    dtype = np.float32 if seed % 2 else np.float16
    cache_dtype = np.float32 if seed % 4 == 1 else np.float16
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    width = 8 * int(rng.integers(1, 10))
    kind = seed // 2 % 3
    batch = int(rng.integers(1, 4)) if kind else 1
    new = 1 if kind == 1 else int(rng.integers(1, 80))
    past = 0 if kind == 2 else int(rng.integers(0, 150))
    capacity = past + (new if rng.random() < 0.5 else int(rng.integers(0, 3)))

    def draw(*shape: int) -> Array:
        return rng.normal(size=shape).astype(dtype)

    def turns() -> Array:
        return (rng.integers(-4, 5, (batch, new, width // 2)) / 4).astype(dtype)

    inputs = {
        # so few bits that rotations are exact in float16
        "qkv": (draw(batch, new, (group + 2) * kv_heads * width) * 16).clip(-63, 63).round() / 16,
        "cos": turns(),
        "sin": turns(),
        "past_key": draw(batch, kv_heads, capacity, width).astype(cache_dtype),
        "past_value": draw(batch, kv_heads, capacity, width).astype(cache_dtype),
        "seqlens_k": np.full(batch, past + new - 1, np.int32),
        "total_sequence_length": np.array([past + new], np.int32),
    }
    for name in ("past_key", "past_value"):
        inputs[name][:, :, past:] = np.nan  # must not be read
    attributes: dict[str, Any] = {"num_heads": group * kv_heads, "kv_num_heads": kv_heads}
    if rng.random() < 0.7:
        attributes["scale"] = float(np.float32(rng.uniform(0.05, 0.5)))
    return inputs, attributes


def run_model(
    model: onnx.ModelProto,
    inputs: dict[str, Array | None],
    *,
    library: str | None = None,
    threads: int = 1,
    optimized: str | None = None,
) -> list[Array]:
    """Run a model in ONNX Runtime; inputs that it does not have are ignored."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(library)
    if optimized is not None:
        options.optimized_model_filepath = optimized
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = {value.name for value in session.get_inputs()}
    outputs: list[Array] = session.run(
        None, {name: value for name, value in inputs.items() if name in wanted}
    )
    return outputs


WEIGHTS: dict[str, tuple[int, int, tuple[int, ...], dict[str, Any]]] = {
    "one plane": (1, 65, (128,), {}),
    "one chunk": (16, 64, (64, 64), {"hadamard_block": 64}),
    "two classes": (15, 192, (192, 128), {"order": "chunks"}),
    "two planes": (17, 256, (256, 256), {"hadamard_block": 64, "signs": True, "order": "columns"}),
    "padding in front": (16, 300, (320, 128), {"order": "columns"}),
    "three classes": (17, 300, (320, 256, 128), {"hadamard_block": 64, "order": "chunks"}),
    "no class with two": (33, 192, (192, 128, 128), {"hadamard_block": 64, "signs": True}),
    "four classes": (
        100,
        704,
        (704, 640, 384, 64),
        {"hadamard_block": 64, "signs": True, "order": "chunks"},
    ),
    "four planes": (100, 256, (256,) * 4, {"hadamard_block": 128, "signs": True}),
    "large block, columns": (15, 65, (128, 64), {"hadamard_block": 128, "order": "columns"}),
}


@pytest.fixture(params=WEIGHTS)
def packed(request: pytest.FixtureRequest) -> Packed:
    """Every case of WEIGHTS in turn."""
    n, k, plane_columns, transform = WEIGHTS[request.param]
    return pack(np.random.default_rng([n, k]), n, k, plane_columns, **transform)


@pytest.fixture(scope="session")
def make_packed() -> Callable[..., Packed]:
    return pack


@pytest.fixture(scope="session")
def make_model() -> Callable[..., onnx.ModelProto]:
    return single_node_model


def draw_group_matmul(
    seed: int, bits: int, block: int, n: int = 33, blocks: int = 5
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return codes and scales of GroupMatMul, and the attributes."""
    rng = np.random.default_rng(seed)
    tensors = {
        "codes": rng.integers(0, 256, (n, blocks, block * bits // 8), np.uint8),
        "scales": (0.05 * rng.standard_normal((n, blocks))).astype(np.float16),
    }
    return tensors, {"K": blocks * block, "N": n, "bits": bits, "block_size": block}


@pytest.fixture(scope="session")
def group_matmul_case() -> Callable[..., tuple[dict[str, Array], dict[str, Any]]]:
    return draw_group_matmul


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Array]]:
    return run_model


@pytest.fixture(scope="session")
def attention_case() -> Callable[[int], tuple[dict[str, Array], dict[str, Any]]]:
    return draw_attention_case


@pytest.fixture(scope="session")
def prune_case() -> Callable[[int, str], tuple[dict[str, Array | None], dict[str, Any]]]:
    return draw_prune_case
