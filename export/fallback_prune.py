"""Model-local functions that compute `TokenPrune` without the operator library; see fallback.py.

Values are [B, S] (rows of the batch, tokens) where nothing else is said. A row of features whose
squared norm overflows float32 counts as not finite. Similarities round as OPS.md says: `maxmin` and
`mmr` take dots in float32 and divide them by norms in float64. `dpp`, `coverage`, `first` =
`farthest` and merging compare all tokens of a row at once, in float64: [B, S, S].
Values of `keep` and `segments` are not checked.
"""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from bivlm_edge.export.fallback_prune_greedy import greedy
from bivlm_edge.export.fallback_prune_values import PruneValues
from bivlm_edge.export.function_body import FunctionBody
from bivlm_edge.export.prune_configuration import TokenPruneConfiguration
from bivlm_edge.export.segments import Segments

OPSET = 23
_BOOL, _FLOAT, _DOUBLE, _INT64 = (
    TensorProto.BOOL,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
)
_ZERO, _INF = np.array([0, np.inf], dtype=np.float32)
_D_ZERO, _D_ONE = np.array([0.0, 1.0])


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
    tokens = "hidden"
    merged = target = ""
    if not configuration.keeps_all:
        segments.number_them()
        values = PruneValues(body, configuration, segments)
        selected = body("And", selected, _selected(body, configuration, values))
        if configuration.merge != "none":
            tokens, merged, target = _merge(body, configuration, values, selected)
    kept = body("Or", selected, body("Equal", segments.ids, -1))
    _outputs(body, segments, kept, tokens)
    if configuration.token_map:
        slots = body("Sub", body("CumSum", body("Cast", kept, to=_INT64), 1), 1)
        others = body.operand(-1)
        if merged:
            others = body("Where", merged, body("GatherElements", slots, target, axis=1), -1)
        body("Where", kept, slots, others)
        body.rename_last("token_map")
    return body.function(
        "TokenPrune",
        overload,
        inputs=["hidden", "scores", "segments", "keep", "metric"],
        outputs=["pruned", "kept_indices", "lengths", "token_map"][
            : 4 if configuration.token_map else 2 + configuration.lengths
        ],
        defaults=[
            helper.make_attribute("mode", "mmr"),
            helper.make_attribute("keep_count", -1),
            helper.make_attribute("keep_ratio", -1.0),
            helper.make_attribute("min_keep", 1),
            helper.make_attribute("theta", 0.5),
            helper.make_attribute("seed", 0),
            helper.make_attribute("score_reduce", "mean"),
            helper.make_attribute("first", "auto"),
            helper.make_attribute("similarity", "cosine"),
            helper.make_attribute("merge", "none"),
            helper.make_attribute("order", "input"),
        ],
        opset=opset,
        doc=f"fallback of ai.bivlm::TokenPrune for {configuration}",
    )


def _selected(
    body: FunctionBody, configuration: TokenPruneConfiguration, values: PruneValues
) -> str:
    """Append the tokens that their segment keeps; what it says of text and padding is void."""
    segments, count = values.segments, values.count
    if configuration.mode == "uniform":
        return _uniform(body, segments, count)
    if configuration.mode == "topk_score":
        selected = body("Less", segments.rank(values.clean_scores()), count)
    else:
        selected = greedy(body, configuration, values)
    if not configuration.selects_by_scores:
        return selected
    number = body("Cast", body("Not", body("IsNaN", values.scores)), to=_INT64)
    any_number = body("Cast", segments.per_segment(number, 0, "max"), to=_BOOL)
    otherwise = body("And", body("Not", any_number), _uniform(body, segments, count))
    return body("Or", body("And", any_number, selected), otherwise)


def _merge(
    body: FunctionBody, configuration: TokenPruneConfiguration, values: PruneValues, selected: str
) -> tuple[str, str, str]:
    """Append the merging of dropped tokens into the `selected` ones.

    Returns:
        All tokens [B, S, D], kept ones averaged; which tokens are merged; into which token.
    """
    usable = values.usable()
    targets = body("Unsqueeze", body("And", selected, usable), [1])
    similarity, target = values.largest(
        values.matrix(), body("And", values.same_segment(), targets)
    )
    target = body("Min", target, body("Max", body("Sub", values.segments.tokens, 1), 0))
    finite = body("Less", body("Abs", body("Cast", "hidden", to=_FLOAT)), _INF)
    finite = body("ReduceMin", body("Cast", finite, to=_INT64), [2], keepdims=0)
    merged = body("And", values.segments.prunable, body("Not", selected))
    merged = body("And", body("And", merged, usable), body("Cast", finite, to=_BOOL))
    merged = body("And", merged, body("Greater", similarity, -_INF))

    weight = body("Expand", _D_ONE, values.segments.shape)
    if configuration.merge == "score_weighted":
        weight = values.relevance()
    # [B, S, S]: what the token of a column adds to the token of a row
    into = body(
        "Equal", body("Unsqueeze", target, [1]), body("Unsqueeze", values.segments.index, [0, 2])
    )
    into = body("And", into, body("Unsqueeze", merged, [1]))
    share = body("Where", into, body("Unsqueeze", weight, [1]), _D_ZERO)
    hidden = body("Cast", "hidden", to=_DOUBLE)
    added = body("MatMul", share, body("Where", body("Unsqueeze", merged, [2]), hidden, _D_ZERO))
    weights = body("Add", body("ReduceSum", share, [2]), _D_ONE)
    mean = body("Cast", body("Div", body("Add", hidden, added), weights), to=_FLOAT)
    parts = body("ReduceSum", body("Cast", into, to=_INT64), [2])
    tokens = body("Where", body("Greater", parts, 0), body("CastLike", mean, "hidden"), "hidden")
    return tokens, merged, target


def _outputs(body: FunctionBody, segments: Segments, kept: str, tokens: str) -> None:
    """Append the first three outputs; `tokens`: what to gather, [B, S, D]."""
    lengths = body("ReduceSum", body("Cast", kept, to=_INT64), [1], keepdims=0)
    body("Identity", lengths)
    body.rename_last("lengths")
    longest = body("ReduceMax", body("Concat", lengths, [0], axis=0), keepdims=1)
    marked = body("Where", kept, segments.indices, segments.tokens)
    positions = body.several(2, "TopK", marked, longest, largest=0)[0]
    valid = body("Less", positions, segments.tokens)
    indices = body("Where", valid, positions, 0)
    rows = body("GatherND", tokens, body("Unsqueeze", indices, [2]), batch_dims=1)
    zero = body("CastLike", _ZERO, "hidden")
    body("Where", body("Unsqueeze", valid, [2]), rows, zero)
    body.rename_last("pruned")
    body("Identity", indices)
    body.rename_last("kept_indices")


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
