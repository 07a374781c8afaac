"""Count the bytes of an exported model, by layer and by table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from bivlm_edge.export.fuse import layer_name, layer_rows
from bivlm_edge.quant.layout import PANEL, padded_rows

_MATMULS = ("BinaryMatMul", "GroupMatMul", "MatMulNBits", "MatMul", "Gemm", "Conv")
_FIRST_WEIGHT = 1  # input 0 of all of them is the activation
_STACKED_OF_BINARY = 2  # codes and coefficients; signs and order belong to all rows


@dataclass(frozen=True, slots=True)
class LayerSize:
    """Initializer bytes of one layer with a weight: an operator, or some rows of a fused one.

    Attributes:
        name: Module in the checkpoint, e.g. "model.language_model.layers.0.mlp.up_proj".
        node: Name of the graph's node, e.g. "model.language_model.layers.0.mlp.gate_proj+up_proj".
        op: Operator type.
        n: Output features.
        k: Input features.
        bytes: Of all its initializers, each padded as in the file's format. What all layers of a
            fused operator use, signs and order, counts with the first.
    """

    name: str
    node: str
    op: str
    n: int
    k: int
    bytes: int

    @property
    def true_bits(self) -> float:
        """Bits per weight, every byte counted."""
        return 8 * self.bytes / (self.n * self.k)


def layer_sizes(model: ir.Model) -> list[LayerSize]:
    """Return all layers with constant weights, in order of execution.

    Operators that stand in both branches of an `If`, on the same weights, are one layer.
    """
    sizes: list[LayerSize] = []
    seen: set[tuple[str | None, ...]] = set()
    for node in model.graph.all_nodes():
        if node.op_type not in _MATMULS:
            continue
        tensors = [
            tensor
            for value in node.inputs[_FIRST_WEIGHT:]
            if (tensor := _constant(value)) is not None
        ]
        if not tensors:
            continue
        found = map(_initializer, node.inputs[_FIRST_WEIGHT:])
        key = (node.name, *(value.name for value in found if value is not None))
        if key in seen:
            continue
        seen.add(key)
        n, k = _shape(node, tensors[0])
        name = layer_name(node)
        rows = layer_rows(node) or {name: n}
        shares = _shares(node, tensors, list(rows.values()))
        for (layer, part), share in zip(rows.items(), shares, strict=True):
            sizes.append(LayerSize(layer, name, node.op_type, part, k, share))
    return sizes


def _shares(node: ir.Node, tensors: Sequence[ir.TensorProtocol], rows: Sequence[int]) -> list[int]:
    """Divide the bytes of a node over its layers by rows, or by panels of rows."""
    if len(rows) == 1:
        return [_total_bytes(tensors)]
    is_binary = node.op_type == "BinaryMatMul"
    stacked = tensors[:_STACKED_OF_BINARY] if is_binary else tensors
    units = [padded_rows(n) // PANEL if is_binary else n for n in rows]
    shares = [_total_bytes(stacked) * unit // sum(units) for unit in units]
    shares[0] += _total_bytes(tensors) - _total_bytes(stacked)
    return shares


def table_sizes(model: ir.Model) -> dict[str, int]:
    """Return bytes of all initializers in three groups; tensors that share bytes count each."""
    counted = {
        value.name
        for node in model.graph.all_nodes()
        if node.op_type in _MATMULS
        for value in map(_initializer, node.inputs[_FIRST_WEIGHT:])
        if value is not None
    }
    groups = {"layers": 0, "token table": 0, "norms, biases, positions": 0}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            continue
        group = "norms, biases, positions"
        if name in counted:
            group = "layers"
        elif name.startswith("embedding/"):
            group = "token table"
        groups[group] += value.const_value.nbytes
    return groups


def true_bits(sizes: Iterable[LayerSize]) -> float | None:
    """Return bits per weight over layers, or None where there are none."""
    chosen = list(sizes)
    weights = sum(size.n * size.k for size in chosen)
    return 8 * sum(size.bytes for size in chosen) / weights if weights else None


def _initializer(value: ir.Value | None) -> ir.Value | None:
    """Return the initializer behind a value, looking through a Cast."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None:
        return _initializer(producer.inputs[0]) if producer.op_type == "Cast" else None
    return value if value.const_value is not None else None


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    found = _initializer(value)
    return None if found is None else found.const_value


def _total_bytes(tensors: Iterable[ir.TensorProtocol]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _shape(node: ir.Node, weight: ir.TensorProtocol) -> tuple[int, int]:
    if node.op_type in ("BinaryMatMul", "GroupMatMul", "MatMulNBits"):
        return node.attributes["N"].as_int(), node.attributes["K"].as_int()
    shape = [int(size) for size in weight.shape.numpy()]
    if node.op_type == "Conv":
        return shape[0], weight.size // shape[0]
    return shape[-1], shape[0]
