"""Make one operator of those that read the same input: q, k and v, or gate and up.

A fused operator is launched once, and transforms and rounds its input once. Row by row it computes
what its parts computed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape

from bivlm_edge.export import schemas
from bivlm_edge.quant.layout import can_stack

LAYERS = "bivlm.layers"  # metadata of a fused node: JSON, name of each layer -> its rows


class _Inputs(NamedTuple):
    """Names of an operator's inputs after X: those with a row per output, and those without."""

    stacked: tuple[str, ...]
    shared: tuple[str, ...]


_OPERATORS = {
    (schemas.DOMAIN, "BinaryMatMul"): _Inputs(("codes", "coefficients"), ("signs", "order")),
    (schemas.MICROSOFT_DOMAIN, "MatMulNBits"): _Inputs(("codes", "scales", "zero_points"), ()),
}


@dataclass(frozen=True, slots=True)
class _Member:
    """An operator that can be fused, and what stands behind it.

    Attributes:
        node: The operator.
        n: Its output features.
        cast: Type to which its result is cast and nothing else, or None.
        bias: Constant `[n]` that is added to the result and nothing else, or None.
        chain: `node`, then its Cast and Add, where there are any.
    """

    node: ir.Node
    n: int
    cast: ir.DataType | None
    bias: ir.Value | None
    chain: list[ir.Node]

    @property
    def output(self) -> ir.Value:
        return self.chain[-1].outputs[0]


def fuse_shared_inputs(model: ir.Model) -> None:
    """Fuse the BinaryMatMul or MatMulNBits nodes that read one value, in all subgraphs.

    Nodes are fused that agree in K and all else but N, with byte-equal signs and order. Rows are
    stacked in the order of the nodes; constant biases become one. A `Concat` of all parts in this
    order falls away; otherwise a `Split` hands the parts to their users. Left alone: groups of
    BinaryMatMul in which a part other than the last does not fill whole panels, operators with a
    weight that others use too, and results that the graph returns.

    Args:
        model: Changed in place. Functions must not be attached yet: their overloads name N.
    """
    groups: defaultdict[Hashable, list[_Member]] = defaultdict(list)
    for node in model.graph.all_nodes():
        if (member := _member(node)) is not None:
            groups[_group_key(member)].append(member)
    for members in groups.values():
        is_binary = members[0].node.domain == schemas.DOMAIN
        fits = not is_binary or can_stack([member.n for member in members])
        if len(members) > 1 and fits:
            _fuse(model.graph, members)
    passes.RemoveUnusedNodesPass()(model)


def layer_rows(node: ir.Node) -> dict[str, int] | None:
    """Layers of a fused node -> their output features, in order; None for any other node."""
    stated = node.metadata_props.get(LAYERS)
    return None if stated is None else {str(name): int(n) for name, n in json.loads(stated).items()}


def layer_name(node: ir.Node) -> str:
    """Name of the checkpoint's module; `graph.join_parts` names nodes `module/operator`."""
    return str(node.name).rsplit("/", 1)[0]


def _member(node: ir.Node) -> _Member | None:
    """Return a node as a member of a group, or None if it cannot be one."""
    inputs = _OPERATORS.get((node.domain, node.op_type))
    if inputs is None or layer_rows(node) is not None:
        return None
    count = len(inputs.stacked) + len(inputs.shared)
    weights = [value for value in node.inputs[1:] if value is not None]
    if any(value is not None for value in node.inputs[1 + count :]):
        return None  # MatMulNBits with g_idx or a bias of its own
    if any(_constant(value) is None for value in weights):
        return None
    stacked = [value for value in node.inputs[1 : 1 + len(inputs.stacked)] if value is not None]
    if any(_is_used_elsewhere(value) for value in stacked):
        return None
    n, chain = node.attributes["N"].as_int(), [node]
    cast = bias = None
    user = _only_user(node.outputs[0])
    if user is not None and user.op_type == "Cast":
        cast = ir.DataType(user.attributes["to"].as_int())
        chain.append(user)
        user = _only_user(user.outputs[0])
    if user is not None and user.op_type == "Add":
        others = [value for value in user.inputs if value is not chain[-1].outputs[0]]
        if others and _is_bias(others[0], n):
            bias = others[0]
            chain.append(user)
    if chain[-1].outputs[0].is_graph_output():
        return None
    return _Member(node, n, cast, bias, chain)


def _is_bias(value: ir.Value | None, n: int) -> bool:
    tensor = None if value is None or not value.is_initializer() else value.const_value
    return tensor is not None and tuple(tensor.shape.numpy()) == (n,)


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _is_used_elsewhere(value: ir.Value) -> bool:
    """Whether more than one node reads a weight, or the initializer that it is a Cast of."""
    producer = value.producer()
    if len(list(value.uses())) > 1:
        return True
    return producer is not None and len(list(_source(value).uses())) > 1


def _source(value: ir.Value) -> ir.Value:
    """Return the value itself, or what it is a Cast of."""
    producer = value.producer()
    if producer is None or producer.op_type != "Cast" or producer.inputs[0] is None:
        return value
    return producer.inputs[0]


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    source = _source(value)
    return source.const_value if source.is_initializer() else None


def _group_key(member: _Member) -> Hashable:
    """Return what members of one group have in common."""
    node = member.node
    inputs = _OPERATORS[node.domain, node.op_type]
    stacked = _padded_inputs(node, inputs)[: len(inputs.stacked)]
    shared = _padded_inputs(node, inputs)[len(inputs.stacked) :]
    return (
        node.graph,
        node.inputs[0],
        (node.domain, node.op_type, node.overload),
        tuple(sorted((a.name, repr(a.value)) for a in node.attributes.values() if a.name != "N")),
        tuple(_form(value) for value in stacked),
        tuple(None if value is None else _bytes(value) for value in shared),
        member.cast,
    )


def _padded_inputs(node: ir.Node, inputs: _Inputs) -> list[ir.Value | None]:
    """Return the inputs after X, None for those left out."""
    count = len(inputs.stacked) + len(inputs.shared)
    return [*node.inputs[1:], *[None] * count][:count]


def _form(value: ir.Value | None) -> Hashable:
    """Return what has to agree for weights to be stacked: types, and sizes of a row."""
    tensor = None if value is None else _constant(value)
    if value is None or tensor is None:
        return None
    return tensor.dtype, value.dtype, tuple(tensor.shape.numpy())[1:]


def _bytes(value: ir.Value) -> bytes:
    tensor = _constant(value)
    return b"" if tensor is None else tensor.tobytes()


def _fuse(root: ir.Graph, members: Sequence[_Member]) -> None:
    """Put one operator and a Split in the place of the members; initializers go into `root`."""
    first, template = members[0].node, members[0].output
    inputs = _OPERATORS[first.domain, first.op_type]
    names = [layer_name(member.node) for member in members]
    name, rows = _join_names(names), [member.n for member in members]
    tape = Tape()
    weights = [
        _stack(
            tape, [_padded_inputs(member.node, inputs)[i] for member in members], f"{name}/{what}"
        )
        for i, what in enumerate(inputs.stacked)
    ]
    value = tape.op(
        first.op_type,
        [first.inputs[0], *weights, *_padded_inputs(first, inputs)[len(weights) :]],
        {**first.attributes, "N": sum(rows)},
        domain=first.domain,
        name=f"{name}/{first.op_type}",
        metadata_props={LAYERS: json.dumps(dict(zip(names, rows, strict=True)))},
        output=_widened(first.outputs[0], sum(rows), f"{name}/y"),
    )
    if members[0].cast is not None:
        output = _widened(template, sum(rows), f"{name}/cast")
        value = tape.op("Cast", [value], {"to": members[0].cast}, output=output)
    biases = [member.bias for member in members]
    if any(bias is not None for bias in biases):
        bias = tape.initializer(ir.tensor(_stacked_bias(biases, rows)), f"{name}/bias")
        output = _widened(template, sum(rows), f"{name}/sum")
        value = tape.op("Add", [value, bias], name=f"{name}/Add", output=output)
    outputs = [member.output for member in members]
    concat = _concat_of(outputs)
    if concat is None:
        output = ir.Value(name=f"{name}/rows")
        rows_tensor = ir.tensor(np.array(rows, np.int64))
        sizes = tape.op("Constant", [], {"value": rows_tensor}, output=output)
        parts = [
            ir.Value(name=f"{layer}/part", shape=member.output.shape, type=member.output.type)
            for layer, member in zip(names, members, strict=True)
        ]
        attributes = {"axis": -1}
        tape.op_multi_out("Split", [value, sizes], attributes, outputs=parts, name=f"{name}/Split")
    else:
        outputs, parts = [concat.outputs[0]], [value]
    graph = first.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node '{first.name}' stands in no graph")
    for initializer in tape.initializers:
        root.register_initializer(initializer)
    graph.insert_before(first, tape.nodes)
    ir.convenience.replace_all_uses_with(outputs, parts)
    if concat is not None:
        graph.remove(concat, safe=True)
    for member in members:
        graph.remove(member.chain, safe=True)


def _concat_of(parts: Sequence[ir.Value]) -> ir.Node | None:
    """Return the Concat that joins the features of these values, in order, or None."""
    user = _only_user(parts[0])
    if user is None or user.op_type != "Concat" or list(user.inputs) != list(parts):
        return None
    if user.attributes["axis"].as_int() != -1 or user.outputs[0].is_graph_output():
        return None
    return user if all(_only_user(part) is user for part in parts) else None


def _join_names(names: Sequence[str]) -> str:
    """Return `a.q+k+v` for `a.q`, `a.k`, `a.v`; whole names with + where parents differ."""
    parents = {name.rpartition(".")[0] for name in names}
    rest = [name.rpartition(".")[2] for name in names[1:]] if len(parents) == 1 else names[1:]
    return "+".join([names[0], *rest])


def _widened(template: ir.Value, n: int, name: str) -> ir.Value:
    """Return a value like `template`, with n features."""
    shape = None if template.shape is None else ir.Shape([*template.shape[:-1], n])
    return ir.Value(name=name, shape=shape, type=template.type)


def _stack(tape: Tape, parts: Sequence[ir.Value | None], name: str) -> ir.Value | None:
    """Return weights stacked along their first axis, cast as the parts are; None for none."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    arrays = [_constant_array(part) for part in present]
    stacked = tape.initializer(ir.tensor(np.concatenate(arrays)), name)
    cast = present[0].producer()
    if cast is None:
        return stacked
    return tape.op("Cast", [stacked], cast.attributes, output=ir.Value(name=f"{name}/cast"))


def _stacked_bias(biases: Sequence[ir.Value | None], rows: Sequence[int]) -> NDArray[np.generic]:
    arrays = [None if bias is None else _constant_array(bias) for bias in biases]
    dtype = next(array.dtype for array in arrays if array is not None)
    return np.concatenate(
        [
            np.zeros(n, dtype) if array is None else array
            for array, n in zip(arrays, rows, strict=True)
        ]
    )


def _constant_array(value: ir.Value) -> NDArray[np.generic]:
    tensor = _constant(value)
    if tensor is None:
        raise ValueError(f"'{value.name}' is not an initializer")
    return tensor.numpy()
