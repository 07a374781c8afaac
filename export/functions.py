"""Give a model the functions that stand in for its operators where the library is missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx_ir as ir
from onnx import FunctionProto

from bivlm_edge.config import Fallback
from bivlm_edge.export import (
    fallback,
    fallback_attention,
    fallback_gated_silu,
    fallback_group_matmul,
    fallback_prune,
    schemas,
)
from bivlm_edge.export.prune_configuration import TokenPruneConfiguration

_PRUNE_WORDS = ("score_reduce", "first", "similarity", "merge", "order")


def attach(model: ir.Model, kind: Fallback) -> None:
    """Add one function per distinct configuration and point the nodes' `overload` at it.

    Args:
        model: Changed in place.
        kind: "nbits" or "dense" bodies; "none" adds nothing.
    """
    if kind == "none":
        return
    opset = model.opset_imports[""]
    for node in model.graph.all_nodes():
        if node.domain != schemas.DOMAIN:
            continue
        overload, write = _function(node, kind, opset)
        node.overload = overload
        key = (node.domain, node.op_type, overload)
        if key not in model.functions:
            model.functions[key] = ir.serde.deserialize_function(write())


def _function(
    node: ir.Node, kind: fallback.Kind, opset: int
) -> tuple[str, Callable[[], FunctionProto]]:
    """Return the overload of a node's function, and what writes the function."""
    if node.op_type == "BinaryMatMul":
        matmul = _binary_matmul_configuration(node)
        return matmul.overload, partial(
            fallback.binary_matmul_function, matmul, kind, matmul.overload, opset
        )
    if node.op_type == "GroupMatMul":
        bits = node.attributes["bits"].as_int()
        overload = fallback_group_matmul.overload(kind, bits)
        return overload, partial(fallback_group_matmul.group_matmul_function, kind, bits, opset)
    if node.op_type == "GroupQueryAttention":
        return "", partial(fallback_attention.group_query_attention_function, opset)
    if node.op_type == "GatedSiLU":
        return "", partial(fallback_gated_silu.gated_silu_function, opset)
    prune = _token_prune_configuration(node)
    return prune.overload, partial(
        fallback_prune.token_prune_function, prune, prune.overload, opset
    )


def _binary_matmul_configuration(node: ir.Node) -> fallback.BinaryMatMulConfiguration:
    inputs = [*node.inputs, None, None][:5]
    columns = tuple(node.attributes["plane_columns"].as_ints())
    return fallback.BinaryMatMulConfiguration(
        k=node.attributes["K"].as_int(),
        n=node.attributes["N"].as_int(),
        plane_columns=columns,
        hadamard_block=node.attributes.get_int("hadamard_block", 0) or 0,
        signs=inputs[3] is not None,
        order=_order_kind(inputs[4], columns[0]),
    )


def _order_kind(order: ir.Value | None, padded_columns: int) -> fallback.Order:
    if order is None:
        return "none"
    tensor = order.const_value
    if tensor is None:
        raise ValueError(f"order '{order.name}' is not an initializer")
    return "columns" if tensor.size == padded_columns else "chunks"


def _token_prune_configuration(node: ir.Node) -> TokenPruneConfiguration:
    inputs = [*node.inputs, None, None, None, None][:5]
    attributes = node.attributes
    return TokenPruneConfiguration(
        mode=attributes.get_string("mode", "mmr") or "mmr",
        scores=inputs[1] is not None,
        segments=inputs[2] is not None,
        keep=inputs[3] is not None,
        metric=inputs[4] is not None,
        lengths=len(node.outputs) > 2,
        token_map=len(node.outputs) > 3,
        keep_count=attributes["keep_count"].as_int() if "keep_count" in attributes else -1,
        keep_ratio=attributes["keep_ratio"].as_float() if "keep_ratio" in attributes else -1.0,
        min_keep=attributes["min_keep"].as_int() if "min_keep" in attributes else 1,
        theta=attributes["theta"].as_float() if "theta" in attributes else 0.5,
        **{name: attributes[name].as_string() for name in _PRUNE_WORDS if name in attributes},
    )
