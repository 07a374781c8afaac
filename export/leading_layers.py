"""Decoder layers before the one that image tokens leave, and their cache (PRUNING.md 3, pattern B).

With a picture they run on all tokens, and then write keys and values of the kept ones alone into
the cache: all layers have one past. Without one they run like the others, and write in place. So
they stand in both branches of the graph's `If`, with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape

from bivlm_edge.export import schemas
from bivlm_edge.export.fuse import fuse_shared_inputs
from bivlm_edge.export.graph_pieces import Part, name_part, pieces_of, prefix_values, vector

_ATTENTION = "GroupQueryAttention"
_QKV, _COS, _SIN, _LAST, _TOTAL = 0, 1, 2, 5, 6  # its inputs
_KEY, _VALUE = 1, 2  # its outputs


@dataclass(frozen=True, slots=True)
class Leading:
    """The layers, once for each branch.

    Attributes:
        pictures: Of the branch with pictures.
        text: Of the other.
        past: key, value of each layer in turn: inputs of the graph that both read.
        initializers: The weights of both.
    """

    pictures: Part
    text: Part
    past: list[ir.Value]
    initializers: list[ir.Value]


def leading_layers(model: ir.Model) -> Leading:
    """Return the pieces of `decoder_parts.trace_leading`, which is taken apart."""
    name_part(model.graph, "leading")
    fuse_shared_inputs(model)  # two readers of one weight are left alone
    copied = model.graph.clone()
    pictures = pieces_of(model.graph)
    shared = {value.name: value for value in pictures.initializers}
    for name, value in copied.initializers.items():
        ir.convenience.replace_all_uses_with(value, shared[name])
    copied.initializers.clear()
    prefix_values(copied, "text")
    text = pieces_of(copied)
    past = pictures.inputs[4:]
    for mine, theirs in zip(past, text.inputs[4:], strict=True):
        ir.convenience.replace_all_uses_with(theirs, mine)
    for part in (pictures, text):
        part.initializers.clear()
    return Leading(pictures, text, past, list(shared.values()))


@dataclass(frozen=True, slots=True)
class Run:
    """What a run of the layers gives: all tokens, nothing dropped yet.

    Attributes:
        normed: Input of the next layer behind its norm, `(B, S, hidden)`.
        hidden: The residual before it.
        cos: Rotations `(B, S, head_dim / 2)`.
        sin: Likewise.
        present: key, value of each layer.
    """

    normed: ir.Value
    hidden: ir.Value
    cos: ir.Value
    sin: ir.Value
    present: list[ir.Value]


def run_layers(
    part: Part, hidden: ir.Value, position_ids: ir.Value, last: ir.Value, total: ir.Value
) -> Run:
    """Give the layers of a branch their inputs.

    Args:
        part: Of `Leading`.
        hidden: Embeddings `(B, S, hidden)`.
        position_ids: Of all tokens.
        last: Index of the last token in the cache with all tokens in it, int32 `(B,)`.
        total: Number of tokens then, int32 `(1,)`.
    """
    for value, given in zip(part.inputs[:4], (hidden, position_ids, last, total), strict=True):
        ir.convenience.replace_all_uses_with(value, given)
    normed, residual, *present = part.outputs
    first = _attention_of(present[0])
    return Run(normed, residual, _input(first, _COS), _input(first, _SIN), present)


def last_layer(found: Run) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return queries, keys and values of the last of the layers, and the rotations."""
    return _input(_attention_of(found.present[-1]), _QKV), found.cos, found.sin


def compacted(
    tape: Tape, found: Run, kept: ir.Value, last: ir.Value, total: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, list[ir.Value]]:
    """Return normed input and rotations of the kept tokens, and the cache with these alone.

    Each layer's attention is asked once more for the kept tokens: it rotates their keys as before
    and writes them behind the past, in place where past and present are one buffer. What it
    attends to is not used.

    Args:
        tape: Takes the nodes.
        found: Of all tokens.
        kept: int64 `(B, kept)`.
        last: Index of the last token in the cache with the kept ones in it.
        total: Number of tokens then.
    """
    places = tape.op("Unsqueeze", [kept, vector(tape, [-1], "last_axis")])

    def of_kept(value: ir.Value) -> ir.Value:
        return tape.op("GatherND", [value, places], {"batch_dims": 1})

    cos, sin = of_kept(found.cos), of_kept(found.sin)
    present = []
    for key in found.present[::2]:
        node = _attention_of(key)
        inputs = list(node.inputs)
        inputs[_QKV], inputs[_COS], inputs[_SIN] = of_kept(_input(node, _QKV)), cos, sin
        inputs[_LAST], inputs[_TOTAL] = last, total
        _, *states = tape.op_multi_out(
            _ATTENTION,
            inputs,
            dict(node.attributes),
            num_outputs=3,
            domain=schemas.DOMAIN,
            name=f"{node.name}/kept",
        )
        present += states
    return of_kept(found.normed), cos, sin, present


def _attention_of(present: ir.Value) -> ir.Node:
    node = present.producer()
    if node is None or node.op_type != _ATTENTION:
        raise ValueError(f"'{present.name}' is no key of {_ATTENTION}")
    return node


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
