"""Positions of the tokens that are kept, in the graph; positions.py says which they are."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from bivlm_edge.export.graph_pieces import scalar, vector


def positions_at(tape: Tape, position_ids: ir.Value, indices: ir.Value, axes: int) -> ir.Value:
    """Return the positions of tokens at `indices`, `(batch, kept)`, on all axes."""
    if axes == 1:
        return tape.op("GatherElements", [position_ids, indices], {"axis": 1})
    sizes = [vector(tape, [axes], "axes"), tape.op("Shape", [indices])]
    indices = tape.op("Expand", [indices, tape.op("Concat", sizes, {"axis": 0})])
    return tape.op("GatherElements", [position_ids, indices], {"axis": 2})


def closed_positions(
    tape: Tape, position_ids: ir.Value, kept: ir.Value, axes: int, context: int
) -> ir.Value:
    """Return the positions of the kept tokens without gaps: `positions.without_gaps`.

    Args:
        tape: Takes the nodes.
        position_ids: Of all tokens.
        kept: int64 `(batch, kept)`.
        axes: 1, or 3 (M-RoPE).
        context: Most tokens of a run.
    """
    rows = low = high = positions_at(tape, position_ids, kept, axes)
    along_row = 1 if axes == 1 else 2
    first = tape.op(
        "Slice", [position_ids, *(vector(tape, [v], f"first_{v}") for v in (0, 1, along_row))]
    )
    if axes == 3:
        over_axes = vector(tape, [0], "over_axes")
        low, high, first = (
            tape.op(kind, [value, over_axes], {"keepdims": 0})
            for kind, value in (("ReduceMin", rows), ("ReduceMax", rows), ("ReduceMin", first))
        )
        high = _running_largest(tape, high, context)
    one = scalar(tape, 1, "one_position")
    before = tape.op("Slice", [high, *(vector(tape, [v], f"before_{v}") for v in (0, -1, 1))])
    behind = tape.op("Concat", [tape.op("Sub", [first, one]), before], {"axis": 1})
    gaps = tape.op("Sub", [tape.op("Sub", [low, behind]), one])
    gaps = tape.op("Max", [gaps, scalar(tape, 0, "no_gap")])
    return tape.op("Sub", [rows, tape.op("CumSum", [gaps, scalar(tape, 1, "along_row")])])


def _running_largest(tape: Tape, values: ir.Value, longest: int) -> ir.Value:
    """Return the largest of each value and those before it on axis 1, of up to `longest`."""
    lowest = scalar(tape, -1, "below_all_positions")
    step = 1
    while step < longest:
        pads = vector(tape, [0, step, 0, 0], f"pads_{step}")
        moved = tape.op("Pad", [values, pads, lowest])
        ends = (vector(tape, [v], f"moved_{v}") for v in (0, -step, 1))
        values = tape.op("Max", [values, tape.op("Slice", [moved, *ends])])
        step *= 2
    return values
