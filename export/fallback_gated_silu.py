"""The model-local function that computes `GatedSiLU` without the operator library."""

from __future__ import annotations

from onnx import FunctionProto

from bivlm_edge.export.function_body import FunctionBody


def gated_silu_function(opset: int) -> FunctionProto:
    """Return the function: Split, Sigmoid and two products; one body serves all nodes.

    Args:
        opset: Version of the standard operators, as in the model.
    """
    body = FunctionBody()
    gate, up = body.several(2, "Split", "X", axis=-1, num_outputs=2)
    body("Mul", body("Mul", gate, body("Sigmoid", gate)), up)
    body.rename_last("Y")
    return body.function(
        "GatedSiLU",
        "",
        inputs=["X"],
        outputs=["Y"],
        opset=opset,
        doc="fallback of ai.bivlm::GatedSiLU",
    )
