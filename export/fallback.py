"""Model-local functions that compute `BinaryMatMul` without the operator library.

ONNX Runtime uses the library's operator where it is registered and inlines the function where it
is not. A function body knows no shapes of its inputs, so each distinct configuration gets a body
of its own, told apart by the `overload` field of nodes and functions (IR version 10). The
other operators have theirs in `fallback_<operator>.py`.

Two kinds of body: "nbits" keeps two bits per weight and plane in memory (ONNX Runtime's
MatMulNBits, version 1.24 or newer; activations are rounded to int8), "dense" unpacks to the type
of X (any runtime with opset 23). Unpacking reads initializers only: runtimes fold it at load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from bivlm_edge.errors import RequestError
from bivlm_edge.export.function_body import FunctionBody
from bivlm_edge.export.schemas import MICROSOFT_DOMAIN
from bivlm_edge.quant.hadamard import hadamard_matrix
from bivlm_edge.quant.layout import CHUNK, PANEL, padded_columns, plane_classes

OPSET = 23

_FLOAT, _INT32, _INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64

Kind = Literal["nbits", "dense"]
Order = Literal["none", "columns", "chunks"]


@dataclass(frozen=True, slots=True)
class BinaryMatMulConfiguration:
    """What the body of a function depends on: the attributes of a node and its optional inputs.

    Attributes:
        k: Input features.
        n: Output features.
        plane_columns: Columns of plane 0, 1, ..; see FORMAT.md.
        hadamard_block: 0, 64 or 128.
        signs: The node has the input `signs`.
        order: What its input `order` permutes; "none" without the input.
    """

    k: int
    n: int
    plane_columns: tuple[int, ...]
    hadamard_block: int = 0
    signs: bool = False
    order: Order = "none"

    def __post_init__(self) -> None:
        columns = self.plane_columns
        if self.k < 1 or self.n < 1:
            raise RequestError(f"BinaryMatMul needs K and N of at least 1, not {self.k}, {self.n}")
        if (
            not 1 <= len(columns) <= 4
            or columns[0] != self.padded_k
            or list(columns) != sorted(columns, reverse=True)
            or any(count <= 0 or count % CHUNK for count in columns)
        ):
            raise RequestError(
                f"plane_columns {columns} do not fit K = {self.k}: one to four multiples of "
                f"{CHUNK}, the first {self.padded_k}, none larger than the one before"
            )
        if self.hadamard_block not in (0, 64, 128) or (
            self.hadamard_block and self.padded_k % self.hadamard_block
        ):
            raise RequestError(
                f"hadamard_block {self.hadamard_block} is not 0, 64 or 128, or does not divide "
                f"the padded K = {self.padded_k}"
            )
        if self.signs and not self.hadamard_block:
            raise RequestError("signs need a Hadamard block; leave them out, or set hadamard_block")

    @property
    def padded_k(self) -> int:
        return padded_columns(self.k)

    @property
    def classes(self) -> list[tuple[int, int]]:
        """(planes, chunks) of each class that exists, in the order of the columns."""
        return [
            (group.planes, (group.stop - group.start) // CHUNK)
            for group in plane_classes(self.plane_columns)
        ]

    @property
    def overload(self) -> str:
        """A short name, the same in every process, that no other configuration has."""
        planes = "_".join(str(count // CHUNK) for count in self.plane_columns)
        order = {"none": "", "columns": "o", "chunks": "c"}[self.order]
        transform = f"h{self.hadamard_block}" if self.hadamard_block else ""
        return f"k{self.k}n{self.n}p{planes}{transform}{'s' if self.signs else ''}{order}"


def binary_matmul_function(
    configuration: BinaryMatMulConfiguration, kind: Kind, overload: str, opset: int = OPSET
) -> FunctionProto:
    """Return the function `BinaryMatMul` for one configuration.

    Args:
        configuration: Attributes and optional inputs of the nodes that call it.
        kind: "nbits" or "dense"; see the head of this file.
        overload: The `overload` field of these nodes, for instance `configuration.overload`.
        opset: Version of the standard operators, as in the model.
    """
    body = FunctionBody()
    v = _transform(body, configuration)
    if kind == "nbits":
        _nbits_product(body, configuration, v)
    elif kind == "dense":
        _dense_product(body, configuration, v)
    else:
        raise RequestError(f"fallback kind '{kind}' is none of nbits, dense")
    body.rename_last("Y")
    return body.function(
        "BinaryMatMul",
        overload,
        inputs=["X", "codes", "coefficients", "signs", "order"],
        outputs=["Y"],
        attributes=["K", "N", "plane_columns"],
        defaults=[
            helper.make_attribute("hadamard_block", 0),
            helper.make_attribute("format", 1),
        ],
        opset=opset,
        doc=f"{kind} fallback of ai.bivlm::BinaryMatMul for {configuration.overload}",
    )


def _transform(body: FunctionBody, configuration: BinaryMatMulConfiguration) -> str:
    """Append steps 1 to 3 of `transform`; the result is [..., Kp]."""
    padded_k, block = configuration.padded_k, configuration.hadamard_block
    u = "X"
    if padded_k != configuration.k:
        u = body("Pad", u, [0, padded_k - configuration.k], "", [-1])
    if not block and configuration.order == "none":
        return u
    shape = body("Shape", u)
    if configuration.signs:
        bits = _bits(body, body("Unsqueeze", "signs", [1]), np.arange(8, dtype=np.uint8))
        u = body("Mul", u, body("CastLike", _plus_minus_one(body, body("Reshape", bits, [-1])), u))
    if block:
        matrix = body("CastLike", np.sign(hadamard_matrix(block)).astype(np.int8), u)
        scale = body("CastLike", np.array(block**-0.5, dtype=np.float32), u)
        blocks = body("Reshape", u, [-1, block])
        u = body("MatMul", blocks, body("Mul", matrix, scale))
    if configuration.order != "none":
        width = 1 if configuration.order == "columns" else CHUNK
        pieces = body("Reshape", u, [-1, padded_k // width, width])
        u = body("Gather", pieces, body("Cast", "order", to=_INT64), axis=1)
    return body("Reshape", u, shape, allowzero=1)


def _nbits_product(body: FunctionBody, configuration: BinaryMatMulConfiguration, v: str) -> None:
    """Append one MatMulNBits per plane: code 3 is +1 and code 1 is -1 about the zero point 2.

    They run in float32 for float16 X too: ONNX Runtime 1.31 computes float16 MatMulNBits wrong at
    its default optimization level, 1.24 refuses it.
    """
    v = body("Cast", v, to=_FLOAT)
    total = ""
    for plane, columns in enumerate(configuration.plane_columns):
        bits = _plane_bits(body, configuration, plane)
        # code = 2 * bit + 1, four codes per byte, the first in the lowest bits
        quadruples = body("Reshape", bits, [configuration.n, columns // CHUNK, PANEL, 4])
        shifted = body("BitShift", quadruples, np.array([1, 3, 5, 7], np.uint8), direction="LEFT")
        codes: str = body.operand(np.array(0b01010101, dtype=np.uint8))
        for part in body.several(4, "Split", shifted, axis=-1, num_outputs=4):
            codes = body("BitwiseOr", codes, part)
        x = v if columns == configuration.padded_k else body("Slice", v, [0], [columns], [-1])
        product = body(
            "MatMulNBits",
            x,
            body("Squeeze", codes, [-1]),
            body("Cast", _plane_scales(body, configuration, plane), to=_FLOAT),
            domain=MICROSOFT_DOMAIN,
            K=columns,
            N=configuration.n,
            bits=2,
            block_size=CHUNK,
            accuracy_level=4,
        )
        total = body("Add", total, product) if total else product
    body("CastLike", total, "X")


def _dense_product(body: FunctionBody, configuration: BinaryMatMulConfiguration, v: str) -> None:
    """Append What, summed in float32, and one MatMul in the type of X."""
    n, padded_k = configuration.n, configuration.padded_k
    total = ""
    for plane, columns in enumerate(configuration.plane_columns):
        bits = _plane_bits(body, configuration, plane)
        signs = body("Cast", _plus_minus_one(body, bits), to=_FLOAT)
        chunks = body("Reshape", signs, [n, columns // CHUNK, CHUNK])
        scales = body("Cast", _plane_scales(body, configuration, plane), to=_FLOAT)
        weighted = body("Mul", chunks, body("Unsqueeze", scales, [-1]))
        weight = body("Reshape", weighted, [n, columns])
        if columns < padded_k:
            weight = body("Pad", weight, [0, padded_k - columns], "", [1])
        total = body("Add", total, weight) if total else weight
    body("MatMul", v, body("CastLike", body("Transpose", total, perm=[1, 0]), v))


def _plane_bits(body: FunctionBody, configuration: BinaryMatMulConfiguration, plane: int) -> str:
    """Append the bits of a plane: uint8 [N, columns of the plane], 1 for +1."""
    regions, start = [], 0
    for planes, chunks in configuration.classes:
        stop = start + chunks * planes * 2 * CHUNK
        if plane < planes:
            region = body("Slice", "codes", [start], [stop], [1])
            region = body("Reshape", region, [-1, chunks, planes * 2 * CHUNK])
            in_pair = (plane | 1) < planes
            # bytes of the pair or single block in a chunk, and where in a byte the plane's bits lie
            first = (plane & ~1) * 2 * CHUNK
            block = body("Slice", region, [first], [first + (4 if in_pair else 2) * CHUNK], [2])
            shifts = np.arange(plane & 1, 8, 2) if in_pair else np.arange(8)
            block = body("Reshape", block, [-1, chunks, 4 if in_pair else 2, 1, PANEL, 4])
            bits = _bits(body, block, shifts.astype(np.uint8).reshape(-1, 1, 1))
            # [panel, chunk, t, i, row, e] -> rows x columns
            bits = body("Transpose", bits, perm=[0, 4, 1, 2, 3, 5])
            regions.append(body("Reshape", bits, [-1, chunks * CHUNK]))
        start = stop
    return body("Slice", _joined(body, regions), [0], [configuration.n], [0])


def _plane_scales(body: FunctionBody, configuration: BinaryMatMulConfiguration, plane: int) -> str:
    """Append the coefficients of a plane per chunk: float16 [N, chunks of the plane]."""
    regions, slot = [], 0
    for planes, chunks in configuration.classes:
        if plane < planes:
            rows = body("Reshape", body("Gather", "coefficients", slot + plane, axis=1), [-1, 1])
            regions.append(body("Expand", rows, [1, chunks]))
        slot += planes
    return body("Slice", _joined(body, regions), [0], [configuration.n], [0])


def _bits(body: FunctionBody, values: str, shifts: np.ndarray) -> str:
    shifted = body("BitShift", values, shifts, direction="RIGHT")
    return body("BitwiseAnd", shifted, np.array(1, dtype=np.uint8))


def _plus_minus_one(body: FunctionBody, bits: str) -> str:
    """Append 2 * bits - 1 as int32."""
    doubled = body("Mul", body("Cast", bits, to=_INT32), np.array(2, dtype=np.int32))
    return body("Sub", doubled, np.array(1, dtype=np.int32))


def _joined(body: FunctionBody, regions: list[str]) -> str:
    return regions[0] if len(regions) == 1 else body("Concat", *regions, axis=1)
