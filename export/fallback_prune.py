"""Model-local functions that compute `TokenPrune` without the operator library; see fallback.py.

Values are [B, S] (rows of the batch, tokens) where nothing else is said. Similarity is computed in
float32, so a row of features whose squares overflow float32 counts as not finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from onnx import FunctionProto, GraphProto, TensorProto, helper

from bivlm_edge.errors import RequestError
from bivlm_edge.export.function_body import FunctionBody
from bivlm_edge.export.schemas import PRUNE_MODES
from bivlm_edge.export.segments import Segments

OPSET = 23
_BOOL, _FLOAT, _DOUBLE, _INT64 = (
    TensorProto.BOOL,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
)
_ZERO, _HALF, _ONE, _INF = np.array([0, 0.5, 1, np.inf], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class TokenPruneConfiguration:
    """What the body depends on: attributes, and which optional inputs and outputs there are."""

    mode: str = "mmr"
    scores: bool = False
    segments: bool = False
    keep: bool = False
    metric: bool = False
    lengths: bool = True
    keep_count: int = -1
    keep_ratio: float = -1.0
    min_keep: int = 1
    theta: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in PRUNE_MODES:
            raise RequestError(f"TokenPrune mode '{self.mode}' is none of {', '.join(PRUNE_MODES)}")
        if self.mode in ("random", "dpp", "coverage"):
            raise RequestError(
                f"TokenPrune mode '{self.mode}' has no fallback in standard operators: run it with "
                "the operator library, or use mode 'uniform'"
            )
        if self.mode in ("topk_score", "mmr") and not self.scores:
            raise RequestError(f"TokenPrune mode '{self.mode}' needs the input 'scores'")
        if self.keep_count < -1:
            raise RequestError(f"TokenPrune keep_count is {self.keep_count}: 0 or more, or -1")
        if not (self.keep_ratio == -1 or 0 <= self.keep_ratio <= 1) or not 0 <= self.theta <= 1:
            raise RequestError(
                f"TokenPrune needs keep_ratio in 0..1 (or -1) and theta in 0..1, not "
                f"{self.keep_ratio} and {self.theta}"
            )

    @property
    def keeps_all(self) -> bool:
        counted = self.keep or self.keep_count != -1 or self.keep_ratio != -1
        return self.mode == "none" or not counted

    @property
    def overload(self) -> str:
        """A short name, the same in every process: mode, inputs, outputs, hash of the numbers."""
        given = (self.scores, self.segments, self.keep, self.metric, self.lengths)
        signature = "".join(name for name, there in zip("sgkml", given, strict=True) if there)
        numbers = repr((self.keep_count, self.keep_ratio, self.min_keep, self.theta))
        return f"{self.mode}_{signature}_{crc32(numbers.encode()):08x}"


def token_prune_function(
    configuration: TokenPruneConfiguration, overload: str, opset: int = OPSET
) -> FunctionProto:
    """Return the function `TokenPrune` for one configuration.

    Args:
        configuration: Attributes and optional inputs of the nodes that call it.
        overload: The `overload` field of these nodes, for instance `configuration.overload`.
        opset: Version of the standard operators, as in the model.
    """
    body = FunctionBody()
    segments = Segments(body, configuration.segments)
    selected = segments.prunable
    if not configuration.keeps_all:
        segments.number_them()
        selected = body("And", selected, _selected(body, configuration, segments))
    _outputs(body, segments, body("Or", selected, body("Equal", segments.ids, -1)))
    return body.function(
        "TokenPrune",
        overload,
        inputs=["hidden", "scores", "segments", "keep", "metric"],
        outputs=["pruned", "kept_indices", "lengths"][: 2 + configuration.lengths],
        defaults=[
            helper.make_attribute("mode", "mmr"),
            helper.make_attribute("keep_count", -1),
            helper.make_attribute("keep_ratio", -1.0),
            helper.make_attribute("min_keep", 1),
            helper.make_attribute("theta", 0.5),
            helper.make_attribute("seed", 0),
        ],
        opset=opset,
        doc=f"fallback of ai.bivlm::TokenPrune for {configuration}",
    )


def _selected(
    body: FunctionBody, configuration: TokenPruneConfiguration, segments: Segments
) -> str:
    """Append the tokens that their segment keeps; what it says of text and padding is void."""
    count = _counts(body, configuration, segments)
    if configuration.mode == "uniform":
        return _uniform(body, segments, count)
    if configuration.mode == "topk_score":
        selected = body("Less", segments.rank(_clean_scores(body)), count)
    else:
        selected = _greedy(body, configuration, segments, count)
    if not configuration.scores:
        return selected
    number = body("Cast", body("Not", body("IsNaN", "scores")), to=_INT64)
    any_number = body("Cast", segments.per_segment(number, 0, "max"), to=_BOOL)
    otherwise = body("And", body("Not", any_number), _uniform(body, segments, count))
    return body("Or", body("And", any_number, selected), otherwise)


def _outputs(body: FunctionBody, segments: Segments, kept: str) -> None:
    """Append the three outputs."""
    lengths = body("ReduceSum", body("Cast", kept, to=_INT64), [1], keepdims=0)
    body("Identity", lengths)
    body.rename_last("lengths")
    longest = body("ReduceMax", body("Concat", lengths, [0], axis=0), keepdims=1)
    marked = body("Where", kept, segments.indices, segments.tokens)
    positions = body.several(2, "TopK", marked, longest, largest=0)[0]
    valid = body("Less", positions, segments.tokens)
    indices = body("Where", valid, positions, 0)
    rows = body("GatherND", "hidden", body("Unsqueeze", indices, [2]), batch_dims=1)
    zero = body("CastLike", _ZERO, "hidden")
    body("Where", body("Unsqueeze", valid, [2]), rows, zero)
    body.rename_last("pruned")
    body("Identity", indices)
    body.rename_last("kept_indices")


def _counts(body: FunctionBody, configuration: TokenPruneConfiguration, segments: Segments) -> str:
    """Append for each token the number of tokens that its segment keeps."""
    if configuration.keep:
        wanted = body("Reshape", "keep", [1])
    elif configuration.keep_count != -1:
        wanted = body.operand(max(configuration.min_keep, configuration.keep_count))
    else:
        ratio = np.array(np.float32(configuration.keep_ratio), dtype=np.float64)
        share = body("Mul", body("Cast", segments.size, to=_DOUBLE), ratio)
        share = body("Ceil", body("Sub", share, np.array(1e-6)))
        wanted = body("Max", body("Cast", share, to=_INT64), configuration.min_keep)
    return body("Min", segments.size, wanted)


def _uniform(body: FunctionBody, segments: Segments, count: str) -> str:
    """Append t = floor((2i + 1) n / 2k) for some i.

    The number of i with (2i + 1) n < x is floor(ceil(x / n) / 2); t is chosen if that number
    grows from x = 2kt to x = 2k (t + 1).
    """
    double = body("Mul", count, 2)
    x = body("Mul", double, segments.rank())
    less_one = body("Sub", segments.size, 1)

    def below(x: str) -> str:
        return body("Div", body("Div", body("Add", x, less_one), segments.size), 2)

    return body("Not", body("Equal", below(x), below(body("Add", x, double))))


def _clean_scores(body: FunctionBody) -> str:
    return body("Where", body("IsNaN", "scores"), -_INF, "scores")


def _relevance(body: FunctionBody, segments: Segments) -> str:
    """Append z of `mmr`."""
    scores = _clean_scores(body)
    finite = body("Less", body("Abs", scores), _INF)
    low = segments.per_segment(body("Where", finite, scores, _INF), _INF, "min")
    high = segments.per_segment(body("Where", finite, scores, -_INF), -_INF, "max")
    z = body("Div", body("Sub", scores, low), body("Sub", high, low))
    z = body("Where", body("Greater", high, low), z, _HALF)
    ends = body("Where", body("Greater", scores, _ZERO), _ONE, _ZERO)
    return body("Where", finite, z, ends)


def _greedy(
    body: FunctionBody, configuration: TokenPruneConfiguration, segments: Segments, count: str
) -> str:
    """Append `maxmin` or `mmr`: a loop that takes one token of each segment per turn."""
    features = "metric" if configuration.metric else "hidden"
    metric = body("Cast", features, to=_FLOAT)
    squares = body("ReduceSum", body("Mul", metric, metric), [2])  # [B, S, 1]
    usable = body("And", body("Greater", squares, _ZERO), body("Less", squares, _INF))
    norms = body("Where", usable, body("Sqrt", squares), _ONE)
    unit = body("Div", body("Where", usable, metric, _ZERO), norms)
    theta = _ZERO
    if configuration.mode == "mmr":
        theta = np.float32(configuration.theta)
        first = _relevance(body, segments)
        bonus = body("Mul", first, theta)
    else:
        bonus = body("Cast", segments.zeros, to=_FLOAT)
        first = body("Squeeze", body("Where", usable, squares, _ZERO), [2])
        if configuration.scores:
            first = _clean_scores(body)
    all_kept = body("GreaterOrEqual", count, segments.size)
    open_ = body("And", segments.prunable, body("Not", all_kept))
    turns = body("Where", open_, count, 0)
    turns = body("ReduceMax", body("Concat", body("Reshape", turns, [-1]), [0], axis=0))
    nearest = body("Expand", -_INF, segments.shape)
    none = body("Cast", segments.zeros, to=_BOOL)
    step = _turn(segments, count, first, bonus, _ONE - theta, unit)
    chosen, _ = body.several(2, "Loop", body("Squeeze", turns), "", none, nearest, body=step)
    return body("Or", chosen, all_kept)


def _turn(
    segments: Segments, count: str, first: str, bonus: str, distance_weight: np.float32, unit: str
) -> GraphProto:
    """Return the loop body: (turn, go on, chosen, nearest) -> (go on, chosen, nearest).

    `nearest` is the largest similarity of a token to the chosen ones of its segment.
    """
    body = FunctionBody(prefix="turn_")
    spread = body("Sub", bonus, body("Mul", "nearest", distance_weight))
    gain = body("Where", body("Equal", "turn", 0), first, spread)
    gain = body("Where", "chosen", -_INF, gain)
    best = segments.per_segment(gain, -_INF, "max", body)
    candidates = body("And", body("Equal", gain, best), body("Not", "chosen"))
    places = body("Where", candidates, segments.indices, segments.tokens)
    pick = segments.per_segment(places, segments.tokens, "min", body)
    picked = body("Equal", segments.indices, pick)
    wanted = body("Less", "turn", count)
    chosen = body("Or", "chosen", body("And", picked, wanted))
    # a segment that is complete may have nothing left to pick: any row serves
    row = body("Min", pick, body("Sub", segments.tokens, 1))
    rows = body("GatherND", unit, body("Unsqueeze", row, [2]), batch_dims=1)
    similarity = body("ReduceSum", body("Mul", unit, rows), [2], keepdims=0)
    nearest = body("Max", "nearest", similarity)
    go_on = body("Identity", "go_on")
    return helper.make_graph(
        body.nodes,
        "one_token_of_each_segment",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", _BOOL, []),
            helper.make_tensor_value_info("chosen", _BOOL, [None, None]),
            helper.make_tensor_value_info("nearest", _FLOAT, [None, None]),
        ],
        [
            helper.make_tensor_value_info(go_on, _BOOL, []),
            helper.make_tensor_value_info(chosen, _BOOL, [None, None]),
            helper.make_tensor_value_info(nearest, _FLOAT, [None, None]),
        ],
    )
