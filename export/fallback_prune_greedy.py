"""The loops of `TokenPrune`'s function bodies: one token of each segment per turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, TensorProto, ValueInfoProto, helper

from bivlm_edge.export.fallback_prune_values import PruneValues
from bivlm_edge.export.function_body import FunctionBody
from bivlm_edge.export.prune_configuration import TokenPruneConfiguration

_BOOL, _FLOAT, _DOUBLE, _INT64 = (
    TensorProto.BOOL,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
)
_ZERO = np.float32(0)
_LARGEST = np.float32(np.finfo(np.float32).max)
_D_ZERO, _D_ONE, _D_INF = np.array([0, 1, np.inf])


def greedy(body: FunctionBody, configuration: TokenPruneConfiguration, values: PruneValues) -> str:
    """Append a loop that takes one token of each segment per turn."""
    segments = values.segments
    all_kept = body("GreaterOrEqual", values.count, segments.size)
    open_ = body("And", segments.prunable, body("Not", all_kept))
    turns = body("Where", open_, values.count, 0)
    turns = body("ReduceMax", body("Concat", body("Reshape", turns, [-1]), [0], axis=0))
    none = body("Cast", segments.zeros, to=_BOOL)
    if configuration.mode == "coverage":
        step, state = _turn_of_coverage(body, values)
    elif configuration.mode == "dpp":
        step, state = _turn_of_dpp(body, values, configuration.theta)
    else:
        step, state = _turn_of_maxmin_or_mmr(body, values)
    chosen = body.several(
        1 + len(state), "Loop", body("Squeeze", turns), "", none, *state, body=step
    )[0]
    return body("Or", chosen, all_kept)


def _turn_of_maxmin_or_mmr(body: FunctionBody, values: PruneValues) -> tuple[GraphProto, list[str]]:
    """State: `nearest`, the largest similarity of a token to the chosen ones of its segment."""
    configuration, segments = values.configuration, values.segments
    theta = _D_ZERO
    bonus = body("Expand", _D_ZERO, segments.shape)
    if configuration.mode == "mmr":
        theta = np.float64(np.float32(configuration.theta))
        first = values.relevance()
        bonus = body("Mul", first, theta)
    elif configuration.selects_by_scores:
        first = body("Cast", values.clean_scores(), to=_DOUBLE)
    elif configuration.first == "farthest":
        others = body("And", values.same_segment(), body("Not", values.is_self()))
        first = body("Cast", body("Neg", values.largest(values.matrix(), others)[0]), to=_DOUBLE)
    else:
        first = values.squares()

    turn = FunctionBody(prefix="turn_")
    nearest = turn("Cast", "nearest", to=_DOUBLE)
    gain = turn("Sub", bonus, turn("Mul", nearest, _D_ONE - theta))
    gain = turn("Where", turn("Equal", "turn", 0), first, gain)
    pick, chosen = _take(turn, values, gain)
    similarity = values.to_pick(turn, pick)
    state = [("nearest", _FLOAT, 2, turn("Max", "nearest", similarity))]
    return _loop_body(turn, chosen, state), [body("Expand", -_LARGEST, segments.shape)]


def _turn_of_coverage(body: FunctionBody, values: PruneValues) -> tuple[GraphProto, list[str]]:
    """State: `covered`, the largest similarity of a token to the chosen ones, at least 0."""
    matrix = body("Where", values.same_segment(), values.matrix(), _ZERO)
    weight = body("Unsqueeze", values.relevance(), [1])
    turn = FunctionBody(prefix="turn_")
    covered = turn("Unsqueeze", turn("Cast", "covered", to=_DOUBLE), [1])
    more = turn("Max", turn("Sub", turn("Cast", matrix, to=_DOUBLE), covered), _D_ZERO)
    gain = turn("ReduceSum", turn("Mul", more, weight), [2], keepdims=0)
    # rounded to float32: OPS.md
    gain = turn("Cast", turn("Cast", gain, to=_FLOAT), to=_DOUBLE)
    pick, chosen = _take(turn, values, gain)
    similarity = _row_of_pick(turn, matrix, pick)
    state = [("covered", _FLOAT, 2, turn("Max", "covered", similarity))]
    return _loop_body(turn, chosen, state), [body("Expand", _ZERO, values.segments.shape)]


def _turn_of_dpp(
    body: FunctionBody, values: PruneValues, theta: float
) -> tuple[GraphProto, list[str]]:
    """State: `nearest`, and what the chosen tokens leave of the similarities.

    `schur` [B, S, S] is the Schur complement of the chosen tokens in the matrix of similarities,
    `residual` its diagonal: what OPS.md computes by a growing Cholesky factor.
    """
    theta = float(np.float32(theta))
    z = values.relevance()
    if theta < 1:
        weight = body("Mul", z, np.array(theta / (1 - theta)))
    else:
        weight = body("Mul", body("Log", body("Add", z, np.array(1e-6))), np.array(2.0))
    own = body("Cast", values.own(), to=_DOUBLE)
    limit = body("Mul", own, np.array(1e-4))
    matrix = values.matrix()

    turn = FunctionBody(prefix="turn_")
    left = turn("And", turn("Greater", "residual", limit), turn("Not", "chosen"))
    any_left = values.segments.per_segment(turn("Cast", left, to=_INT64), 0, "max", turn)
    any_left = turn("Cast", any_left, to=_BOOL)
    rounded = turn("Cast", turn("Cast", "residual", to=_FLOAT), to=_DOUBLE)
    logarithm = turn("Log", turn("Where", left, rounded, _D_ONE))
    gain = turn("Where", left, turn("Add", weight, logarithm), -_D_INF)
    farthest = turn("Neg", turn("Cast", "nearest", to=_DOUBLE))
    pick, chosen = _take(turn, values, turn("Where", any_left, gain, farthest))
    pivot = turn("GatherElements", "residual", pick, axis=1)
    goes_on = turn("And", any_left, turn("Less", "turn", values.count))
    factor = _row_of_pick(turn, "schur", pick)
    scaled = turn("Div", factor, turn("Where", goes_on, pivot, _D_ONE))
    scaled = turn("Where", goes_on, scaled, _D_ZERO)
    product = turn("Mul", turn("Unsqueeze", scaled, [2]), turn("Unsqueeze", factor, [1]))
    schur = turn("Sub", "schur", product)  # what it says of two segments is never read
    residual = turn("Sub", "residual", turn("Mul", scaled, factor))
    state = [
        ("nearest", _FLOAT, 2, turn("Max", "nearest", _row_of_pick(turn, matrix, pick))),
        ("residual", _DOUBLE, 2, residual),
        ("schur", _DOUBLE, 3, schur),
    ]
    nearest = body("Expand", -_LARGEST, values.segments.shape)
    return _loop_body(turn, chosen, state), [nearest, own, body("Cast", matrix, to=_DOUBLE)]


def _take(turn: FunctionBody, values: PruneValues, gain: str) -> tuple[str, str]:
    """Append the token of the largest gain (float64) of each segment, and `chosen` with it."""
    segments = values.segments
    gain = turn("Where", "chosen", -_D_INF, gain)
    best = segments.per_segment(gain, -_D_INF, "max", turn)
    candidates = turn("And", turn("Equal", gain, best), turn("Not", "chosen"))
    places = turn("Where", candidates, segments.indices, segments.tokens)
    pick = segments.per_segment(places, segments.tokens, "min", turn)
    picked = turn("Equal", segments.indices, pick)
    chosen = turn("Or", "chosen", turn("And", picked, turn("Less", "turn", values.count)))
    # a segment that is complete may have nothing left to pick: any row serves
    return turn("Min", pick, turn("Sub", segments.tokens, 1)), chosen


def _row_of_pick(turn: FunctionBody, matrix: str, pick: str) -> str:
    """Append what [B, S, S] has for each token and the picked one of its segment."""
    return turn(
        "Squeeze", turn("GatherElements", matrix, turn("Unsqueeze", pick, [1]), axis=1), [1]
    )


def _loop_body(
    turn: FunctionBody, chosen: str, state: Sequence[tuple[str, int, int, str]]
) -> GraphProto:
    """Return the loop body (turn, go on, chosen, *state) -> (go on, chosen, *state).

    Args:
        turn: Its nodes.
        chosen: The new value of `chosen`, bool [B, S].
        state: Name, type, rank and new value of what else goes from turn to turn.
    """
    go_on = turn("Identity", "go_on")
    carried = [("chosen", _BOOL, 2, chosen), *state]

    def info(name: str, element: int, rank: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, element, [None] * rank)

    return helper.make_graph(
        turn.nodes,
        "one_token_of_each_segment",
        [
            info("turn", _INT64, 0),
            info("go_on", _BOOL, 0),
            *(info(name, element, rank) for name, element, rank, _ in carried),
        ],
        [
            info(go_on, _BOOL, 0),
            *(info(value, element, rank) for _, element, rank, value in carried),
        ],
    )
