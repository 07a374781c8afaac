"""What graphs are joined of: constants, and traced parts taken apart."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape


def name_values(tape: Tape, prefix: str) -> None:
    """Name what has no name yet; left to the graph, names would repeat those of the branches."""
    for number, node in enumerate(tape.nodes):
        for index, value in enumerate(node.outputs):
            if value.name is None:
                value.name = f"{prefix}/{node.op_type}_{number}_{index}"


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Return an input of a graph."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def initializer(tape: Tape, array: np.ndarray, name: str) -> ir.Value:
    """Return a constant that the file keeps outside the graph if it is large."""
    return tape.initializer(ir.tensor(np.ascontiguousarray(array), name=name), name=name)


def scalar(tape: Tape, value: int, name: str, dtype: type = np.int64) -> ir.Value:
    """Return a constant of no axis."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(value, dtype), name=name)})


def vector(tape: Tape, values: list[int], name: str) -> ir.Value:
    """Return an int64 constant of one axis."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64), name=name)})


@dataclass(frozen=True, slots=True)
class Part:
    """A traced graph in pieces that belong to no graph."""

    inputs: list[ir.Value]
    outputs: list[ir.Value]
    nodes: list[ir.Node]
    initializers: list[ir.Value]


def take_apart(model: ir.Model, prefix: str) -> Part:
    """Return the pieces of a part: values named with a prefix, nodes `module/operator`."""
    name_part(model.graph, prefix)
    return pieces_of(model.graph)


def pieces_of(graph: ir.Graph) -> Part:
    """Return the pieces of a graph, which is empty afterwards."""
    part = Part(
        list(graph.inputs), list(graph.outputs), list(graph), list(graph.initializers.values())
    )
    graph.inputs.clear()
    graph.outputs.clear()
    graph.initializers.clear()
    graph.remove(part.nodes)
    return part


def name_part(graph: ir.Graph, prefix: str) -> None:
    """Name values with a prefix, and nodes `module/operator`."""
    taken: Counter[str] = Counter()
    for node in graph:
        name = f"{_module_of(node) or prefix}/{node.op_type}"
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1
    prefix_values(graph, prefix)


def prefix_values(graph: ir.Graph, prefix: str) -> None:
    """Put a prefix before the names of all values."""
    outputs = [value for node in graph for value in node.outputs]
    initializers = list(graph.initializers.values())
    graph.initializers.clear()
    for value in {*graph.inputs, *initializers, *outputs}:
        value.name = f"{prefix}/{value.name}"
    for value in initializers:
        graph.register_initializer(value)


def _module_of(node: ir.Node) -> str:
    """Return the dotted name of the checkpoint's module that a traced node comes from."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is None:
        return ""
    *modules, _ = ast.literal_eval(scopes)
    return str(modules[-1]).removeprefix("module.").removeprefix("module") if modules else ""
