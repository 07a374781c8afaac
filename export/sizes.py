"""Count the bytes of an exported model, by operator and by table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

_MATMULS = ("BinaryMatMul", "MatMulNBits", "MatMul", "Gemm", "Conv")
_FIRST_WEIGHT = 1  # input 0 of all of them is the activation


@dataclass(frozen=True, slots=True)
class OperatorSize:
    """Initializer bytes of one operator with a weight.

    Attributes:
        name: Module in the checkpoint, e.g. "model.language_model.layers.0.mlp.up_proj".
        op: Operator type.
        n: Output features.
        k: Input features.
        bytes: Of all its initializers, each padded as in the file's format.
    """

    name: str
    op: str
    n: int
    k: int
    bytes: int

    @property
    def true_bits(self) -> float:
        """Bits per weight, every byte counted."""
        return 8 * self.bytes / (self.n * self.k)


def operator_sizes(model: ir.Model) -> list[OperatorSize]:
    """Return all operators with constant weights, in order of execution."""
    sizes = []
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
        n, k = _shape(node, tensors[0])
        module = str(node.name).rsplit("/", 1)[0]  # graph.join_parts names nodes so
        sizes.append(OperatorSize(module, node.op_type, n, k, _total_bytes(tensors)))
    return sizes


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


def true_bits(sizes: Iterable[OperatorSize]) -> float | None:
    """Return bits per weight over operators, or None where there are none."""
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
    if node.op_type in ("BinaryMatMul", "MatMulNBits"):
        return node.attributes["N"].as_int(), node.attributes["K"].as_int()
    shape = [int(size) for size in weight.shape.numpy()]
    if node.op_type == "Conv":
        return shape[0], weight.size // shape[0]
    return shape[-1], shape[0]
