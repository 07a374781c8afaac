"""Function bodies' view of `TokenPrune`'s segments: sizes, ranks and reductions per segment."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from bivlm_edge.export.function_body import FunctionBody


class Segments:
    """The segments of the tokens, as values of a function body; all are int64 [B, S].

    Text (-1) and padding (-2) count as segments of their row, too.

    Attributes:
        ids: The input `segments`, or 0.
        prunable: bool, the ids from 0 up.
        number: 0, 1, .. in the order of the ids, without gaps; only after `number_them()`.
        size: Tokens of a token's segment; likewise.
        start: Place of its first token if the tokens were sorted by segment; likewise.
        indices: Place of the token in the row; `index` is the same as [S], `tokens` is S as [1].
    """

    def __init__(self, body: FunctionBody, given: bool) -> None:
        self.body = body
        self.shape = body("Shape", "hidden", end=2)
        self.tokens = body("Shape", "hidden", start=1, end=2)
        self.index = body("Range", 0, body("Squeeze", self.tokens), 1)  # [S]
        self.zeros = body("Expand", np.zeros((1, 1), dtype=np.int64), self.shape)
        self.indices = body("Add", self.zeros, self.index)
        self.ids = self.zeros
        if given:
            self.ids = body("Cast", "segments", to=TensorProto.INT64)
        self.prunable = body("GreaterOrEqual", self.ids, 0)

    def number_them(self) -> None:
        """Append `number`, `size` and `start`, which the methods below need."""
        body = self.body
        by_segment = body("Add", body("Mul", body("Add", self.ids, 2), self.tokens), self.index)
        order = body.several(2, "TopK", by_segment, self.tokens, largest=0)[1]
        sorted_ids = body("GatherElements", self.ids, order, axis=1)
        padded = body("Pad", sorted_ids, [1, 0], -3, [1])
        before = body("Slice", padded, [0], [-1], [1])
        first = body("Cast", body("Not", body("Equal", sorted_ids, before)), to=TensorProto.INT64)
        numbers = body("Sub", body("CumSum", first, 1), 1)
        self.number = body("ScatterElements", self.zeros, order, numbers, axis=1)
        ones = body("Add", self.zeros, 1)
        sizes = body("ScatterElements", self.zeros, self.number, ones, axis=1, reduction="add")
        self.size = body("GatherElements", sizes, self.number, axis=1)
        starts = body("CumSum", sizes, 1, exclusive=1)
        self.start = body("GatherElements", starts, self.number, axis=1)

    def rank(self, values: str = "") -> str:
        """Append for each token how many of its segment come before it, by falling values.

        Without values, and among equal ones, the order of the tokens counts.
        """
        body = self.body
        low = self.indices
        if values:
            low = self._inverse(body.several(2, "TopK", values, self.tokens)[1])
        key = body("Add", body("Mul", self.number, self.tokens), low)
        place = self._inverse(body.several(2, "TopK", key, self.tokens, largest=0)[1])
        return body("Sub", place, self.start)

    def _inverse(self, order: str) -> str:
        return self.body("ScatterElements", self.zeros, order, self.indices, axis=1)

    def per_segment(
        self,
        values: str,
        start: str | np.float32 | int,
        reduction: str,
        body: FunctionBody | None = None,
    ) -> str:
        """Append the min or max of `values` over the segment of each token."""
        body = body or self.body
        initial = body("Expand", start, self.shape)
        reduced = body("ScatterElements", initial, self.number, values, axis=1, reduction=reduction)
        return body("GatherElements", reduced, self.number, axis=1)
