"""The model-local function that computes `GroupQueryAttention` without the operator library."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, helper

from bivlm_edge.export.function_body import FunctionBody
from bivlm_edge.export.schemas import ATTENTION_INPUTS, ATTENTION_OUTPUTS, MICROSOFT_DOMAIN


def group_query_attention_function(opset: int) -> FunctionProto:
    """Return the function: Split, RotaryEmbedding, and ONNX Runtime's operator of the same name.

    One body serves all nodes (it refers to their attributes), so that it needs no overload.

    Args:
        opset: Version of the standard operators, as in the model.
    """
    body = FunctionBody()

    def refer(name: str, attribute: str, kind: AttributeProto.AttributeType) -> None:
        body.nodes[-1].attribute.add(name=name, type=kind, ref_attr_name=attribute)

    counts = []
    for attribute in ("num_heads", "kv_num_heads", "kv_num_heads"):
        counts.append(body("Constant"))
        refer("value_int", attribute, AttributeProto.INT)
    half = body("Shape", "cos", start=2, end=3)
    width = body("Add", half, half)
    sizes = body("Concat", *(body("Mul", width, count) for count in counts), axis=0)
    query, key, value = body.several(3, "Split", "qkv", sizes, axis=-1)
    # RotaryEmbedding looks its angles up: row t for token t
    tables = [body("Flatten", angles, axis=2) for angles in ("cos", "sin")]
    tokens = body("Shape", "cos", start=0, end=2)
    count = body("ReduceProd", tokens, keepdims=0)
    rows = body("Reshape", body("Range", 0, count, 1), tokens)
    query, key = (
        body("RotaryEmbedding", states, rows, *tables, domain=MICROSOFT_DOMAIN)
        for states in (query, key)
    )
    # ONNX Runtime's operator computes in the type of its cache
    states = [body("CastLike", part, "past_key") for part in (query, key, value)]
    body.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            [*states, *ATTENTION_INPUTS[3:]],
            ["attended", *ATTENTION_OUTPUTS[1:]],
            domain=MICROSOFT_DOMAIN,
        )
    )
    for attribute in ("num_heads", "kv_num_heads"):
        refer(attribute, attribute, AttributeProto.INT)
    refer("scale", "scale", AttributeProto.FLOAT)
    body.nodes.append(helper.make_node("CastLike", ["attended", "qkv"], ["output"]))
    return body.function(
        "GroupQueryAttention",
        "",
        inputs=ATTENTION_INPUTS,
        outputs=ATTENTION_OUTPUTS,
        attributes=["num_heads", "kv_num_heads"],
        defaults=[helper.make_attribute("scale", 0.0)],
        opset=opset,
        doc="fallback of ai.bivlm::GroupQueryAttention",
    )
