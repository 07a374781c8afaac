"""Values that several parts of a body of `TokenPrune` need; see fallback_prune.py."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from bivlm_edge.export.function_body import FunctionBody
from bivlm_edge.export.prune_configuration import TokenPruneConfiguration
from bivlm_edge.export.segments import Segments

_BOOL, _FLOAT, _DOUBLE, _INT64 = (
    TensorProto.BOOL,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
)
_ZERO, _INF = np.array([0, np.inf], dtype=np.float32)
_LARGEST = np.float32(np.finfo(np.float32).max)
_D_LARGEST = np.float64(np.finfo(np.float32).max)
_D_ZERO, _D_HALF, _D_ONE, _D_INF = np.array([0, 0.5, 1, np.inf])


class PruneValues:
    """What several parts of a body need; appended when first asked for.

    Attributes:
        count: Tokens that the segment of a token keeps, int64.
        scores: float32, one per token, NaN included; "" without scores.
    """

    def __init__(
        self, body: FunctionBody, configuration: TokenPruneConfiguration, segments: Segments
    ) -> None:
        self.body = body
        self.configuration = configuration
        self.segments = segments
        self.count = _counts(body, configuration, segments)
        self.scores = _reduced_scores(body, configuration, segments) if configuration.scores else ""
        self._rows: tuple[str, str, str] | None = None
        self._matrix = ""
        self._relevance = ""

    def clean_scores(self) -> str:
        return self.body("Where", self.body("IsNaN", self.scores), -_INF, self.scores)

    def relevance(self) -> str:
        """Append z of OPS.md, float64; 1 without scores."""
        if not self._relevance:
            self._relevance = self._append_relevance()
        return self._relevance

    def _append_relevance(self) -> str:
        body, segments = self.body, self.segments
        if not self.scores:
            return body("Expand", _D_ONE, segments.shape)
        scores = body("Cast", self.clean_scores(), to=_DOUBLE)
        finite = body("Less", body("Abs", scores), _D_INF)
        low = segments.per_segment(body("Where", finite, scores, _D_INF), _D_INF, "min")
        high = segments.per_segment(body("Where", finite, scores, -_D_INF), -_D_INF, "max")
        z = body("Div", body("Sub", scores, low), body("Sub", high, low))
        z = body("Where", body("Greater", high, low), z, _D_HALF)
        ends = body("Where", body("Greater", scores, _D_ZERO), _D_ONE, _D_ZERO)
        return body("Where", finite, z, ends)

    def rows(self) -> tuple[str, str, str]:
        """Append what similarities are computed from.

        Returns:
            Features, float32 [B, S, Dm], 0 where they have no direction; bool [B, S, 1], which of
            them have one; squared norms, float64 [B, S, 1], 0 of others.
        """
        if self._rows is None:
            body = self.body
            metric = self._metric(_FLOAT)
            squares = body("ReduceSum", body("Mul", metric, metric), [2])
            usable = body("And", body("Greater", squares, _ZERO), body("Less", squares, _INF))
            rows = body("Where", usable, metric, _ZERO)
            metric = body("Where", usable, self._metric(_DOUBLE), _D_ZERO)
            squares = body("ReduceSum", body("Mul", metric, metric), [2])
            self._rows = rows, usable, squares
        return self._rows

    def _metric(self, element: int) -> str:
        return self.body("Cast", "metric" if self.configuration.metric else "hidden", to=element)

    def usable(self) -> str:
        return self.body("Squeeze", self.rows()[1], [2])

    def squares(self) -> str:
        return self.body("Squeeze", self.rows()[2], [2])

    def own(self) -> str:
        """Append the similarity of each token to itself, float32."""
        if self.configuration.similarity == "cosine":
            return self.body("Cast", self.usable(), to=_FLOAT)
        return self.body("Cast", self.squares(), to=_FLOAT)

    def to_pick(self, turn: FunctionBody, pick: str) -> str:
        """Append to the body of a loop the similarities to one token of each segment.

        Args:
            turn: Of the loop; the features are appended outside of it.
            pick: For each token, the index of that of its segment, int64 [B, S].

        Returns:
            float32 [B, S]. Products are of the features as they are, so that those of integers are
            exact, and divided by norms in float64: what is as similar stays so.
        """
        rows, usable, squares = self.rows()
        place = turn("Unsqueeze", pick, [2])
        products = turn("Mul", rows, turn("GatherND", rows, place, batch_dims=1))
        between = turn("ReduceSum", products, [2], keepdims=0)
        if self.configuration.similarity == "dot":
            return turn("Clip", between, -_LARGEST, _LARGEST)
        norms = turn("Where", usable, squares, _D_ONE)
        both = turn("Mul", norms, turn("GatherND", norms, place, batch_dims=1))
        both = turn("Squeeze", turn("Sqrt", both), [2])
        return turn("Cast", turn("Div", turn("Cast", between, to=_DOUBLE), both), to=_FLOAT)

    def is_self(self) -> str:
        """Append which pairs are of one token, bool [1, S, S]."""
        body, index = self.body, self.segments.index
        return body("Equal", body("Unsqueeze", index, [0, 2]), body("Unsqueeze", index, [0, 1]))

    def same_segment(self) -> str:
        """Append which tokens are of one segment, bool [B, S, S]."""
        body, number = self.body, self.segments.number
        return body("Equal", body("Unsqueeze", number, [2]), body("Unsqueeze", number, [1]))

    def matrix(self) -> str:
        """Append the similarities of all tokens of a row, float32 [B, S, S]."""
        if not self._matrix:
            body = self.body
            _, usable, squares = self.rows()
            metric = body("Where", usable, self._metric(_DOUBLE), _D_ZERO)
            between = body("MatMul", metric, body("Transpose", metric, perm=[0, 2, 1]))
            if self.configuration.similarity == "cosine":
                norms = body("Where", usable, squares, _D_ONE)
                both = body("Mul", norms, body("Transpose", norms, perm=[0, 2, 1]))
                between = body("Div", between, body("Sqrt", both))
            else:
                between = body("Clip", between, -_D_LARGEST, _D_LARGEST)
            between = body("Cast", between, to=_FLOAT)
            own = body("Unsqueeze", self.own(), [2])
            self._matrix = body("Where", self.is_self(), own, between)
        return self._matrix

    def largest(self, matrix: str, mask: str) -> tuple[str, str]:
        """Append the largest masked value of each row of [B, S, S], or -inf, and its column."""
        body = self.body
        # a column more, so that a row of no tokens has a largest one, too
        masked = body("Pad", body("Where", mask, matrix, -_INF), [0, 1], -_INF, [2])
        value = body("ReduceMax", masked, [2], keepdims=0)
        return value, body("ArgMax", masked, axis=2, keepdims=0)


def _reduced_scores(
    body: FunctionBody, configuration: TokenPruneConfiguration, segments: Segments
) -> str:
    """Append the scores over all heads; whether there is an axis of heads shows their size."""
    tokens = body("Max", body("ReduceProd", segments.shape), 1)
    heads = body("Max", body("Div", body("Size", "scores"), tokens), 1)  # [1]
    batch = body("Shape", "hidden", end=1)
    shape = body("Concat", batch, heads, segments.tokens, axis=0)
    by_head = body("Cast", body("Reshape", "scores", shape, allowzero=1), to=_DOUBLE)
    if configuration.score_reduce == "max":
        missing = body("IsNaN", by_head)
        largest = body("ReduceMax", body("Where", missing, -_D_INF, by_head), [1], keepdims=0)
        any_missing = body("ReduceMax", body("Cast", missing, to=_INT64), [1], keepdims=0)
        nan = np.array(np.nan)
        reduced = body("Where", body("Cast", any_missing, to=_BOOL), nan, largest)
    else:
        reduced = body("ReduceSum", by_head, [1], keepdims=0)
    if configuration.score_reduce == "mean":
        reduced = body("Div", reduced, body("Cast", heads, to=_DOUBLE))
    return body("Cast", reduced, to=_FLOAT)


def _counts(body: FunctionBody, configuration: TokenPruneConfiguration, segments: Segments) -> str:
    """Append for each token the number of tokens that its segment keeps."""
    if configuration.keep:
        # one number, [B] or [B, G]: to (1 or B, 1 or G)
        size = body("Size", "keep")
        batch = body("Shape", "hidden", end=1)
        is_one = body("Equal", size, 1)
        rows = body("Where", is_one, 1, batch)  # [1]
        columns = body("Div", size, body("Max", rows, 1))
        table = body("Reshape", "keep", body("Concat", rows, columns, axis=0), allowzero=1)
        table = body("Expand", table, body("Concat", batch, columns, axis=0))
        last = body("Sub", columns, 1)
        wanted = body(
            "GatherElements", table, body("Clip", segments.ids, 0, body("Squeeze", last)), axis=1
        )
    elif configuration.keep_count != -1:
        wanted = body.operand(max(configuration.min_keep, configuration.keep_count))
    else:
        ratio = np.array(np.float32(configuration.keep_ratio), dtype=np.float64)
        share = body("Mul", body("Cast", segments.size, to=_DOUBLE), ratio)
        share = body("Ceil", body("Sub", share, np.array(1e-6)))
        wanted = body("Max", body("Cast", share, to=_INT64), configuration.min_keep)
    return body("Min", segments.size, wanted)
