"""The model-local functions that compute `GroupMatMul` without the operator library."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, FunctionProto, TensorProto

from bivlm_edge.errors import RequestError
from bivlm_edge.export.fallback import Kind
from bivlm_edge.export.function_body import FunctionBody
from bivlm_edge.export.schemas import MICROSOFT_DOMAIN

_ATTRIBUTES = ("K", "N", "bits", "block_size")


def overload(kind: Kind, bits: int) -> str:
    """Return the overload of the function: MatMulNBits alone refers to the node's attributes."""
    return "" if kind == "nbits" else f"bits{bits}"


def group_matmul_function(kind: Kind, bits: int, opset: int) -> FunctionProto:
    """Return the function `GroupMatMul`.

    Args:
        kind: "nbits": MatMulNBits, which rounds activations to int8, in float32 for float16 X too
            (see fallback.py); "dense": the weight in the type of X.
        bits: Of the codes of the nodes that call it, 4 or 8.
        opset: Version of the standard operators, as in the model.
    """
    body = FunctionBody()
    if kind == "nbits":
        _nbits_product(body)
    elif kind == "dense":
        _dense_product(body, bits)
    else:
        raise RequestError(f"fallback kind '{kind}' is none of nbits, dense")
    body.rename_last("Y")
    return body.function(
        "GroupMatMul",
        overload(kind, bits),
        inputs=["X", "codes", "scales"],
        outputs=["Y"],
        attributes=_ATTRIBUTES,
        opset=opset,
        doc=f"{kind} fallback of ai.bivlm::GroupMatMul",
    )


def _nbits_product(body: FunctionBody) -> None:
    x, scales = (body("Cast", name, to=TensorProto.FLOAT) for name in ("X", "scales"))
    product = body("MatMulNBits", x, "codes", scales, domain=MICROSOFT_DOMAIN, accuracy_level=4)
    for name in _ATTRIBUTES:
        body.nodes[-1].attribute.add(name=name, type=AttributeProto.INT, ref_attr_name=name)
    body("CastLike", product, "X")


def _dense_product(body: FunctionBody, bits: int) -> None:
    codes = "codes"
    if bits == 4:
        low = body("BitwiseAnd", codes, np.array(15, np.uint8))
        high = body("BitShift", codes, np.array(4, np.uint8), direction="RIGHT")
        pairs = body("Concat", *(body("Unsqueeze", half, [-1]) for half in (low, high)), axis=-1)
        codes = body("Reshape", pairs, [0, 0, -1])
    zero = np.array(2 ** (bits - 1), np.float32)
    levels = body("Sub", body("Cast", codes, to=TensorProto.FLOAT), zero)
    scales = body("Unsqueeze", body("Cast", "scales", to=TensorProto.FLOAT), [-1])
    weight = body("Reshape", body("Mul", levels, scales), [0, -1])
    body("MatMul", "X", body("CastLike", body("Transpose", weight, perm=[1, 0]), "X"))
