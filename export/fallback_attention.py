"""The model-local function that computes `GroupQueryAttention` without the operator library."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, helper

from bivlm_edge.export.schemas import ATTENTION_INPUTS, ATTENTION_OUTPUTS, DOMAIN, MICROSOFT_DOMAIN


def group_query_attention_function(opset: int) -> FunctionProto:
    """Return the function: ONNX Runtime's operator of the same name, with the node's attributes.

    One body serves all nodes, so that it needs no overload.

    Args:
        opset: Version of the standard operators, as in the model.
    """
    node = helper.make_node(
        "GroupQueryAttention", ATTENTION_INPUTS, ATTENTION_OUTPUTS, domain=MICROSOFT_DOMAIN
    )
    for name, kind in (
        ("num_heads", AttributeProto.INT),
        ("kv_num_heads", AttributeProto.INT),
        ("scale", AttributeProto.FLOAT),
    ):
        node.attribute.add(name=name, type=kind, ref_attr_name=name)
    return helper.make_function(
        DOMAIN,
        "GroupQueryAttention",
        ATTENTION_INPUTS,
        ATTENTION_OUTPUTS,
        [node],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT_DOMAIN, 1)],
        attributes=["num_heads", "kv_num_heads"],
        attribute_protos=[helper.make_attribute("scale", 0.0)],
        doc_string="fallback of ai.bivlm::GroupQueryAttention",
    )
