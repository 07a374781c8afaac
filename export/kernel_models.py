"""Graphs of one matrix product, as often as wanted, for measuring operators by themselves.

Each node has its weight at a place of its own in the external data file, so that a pass over all
nodes reads all of the file. The values are random and, but for the first two bytes, the same for
every node; those differ, because ONNX Runtime keeps what it packs from equal weights only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bivlm_edge.export.schemas import DOMAIN, MICROSOFT_DOMAIN, OPSET_VERSION
from bivlm_edge.quant.packed import (
    CHUNK,
    PANEL,
    coefficients_per_row,
    pack_coefficients,
    pack_planes,
    padded_columns,
    padded_rows,
)

INPUT = "x"
MAX_COPIES = 20_000  # distinct first bytes, and all finite as float16
_PAGE = 4096  # where data_file.py puts large tensors too; that one needs onnx_ir
_OPSET, _IR_VERSION = 21, 10
_SEED = 0
_ELEMENT_TYPES = {
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float32): TensorProto.FLOAT,
}


@dataclass(frozen=True, slots=True)
class KernelModel:
    """A graph on disk: `copies` nodes that read the input `x [m, k]` and write `y0 [m, n]`, ...

    Attributes:
        path: The .onnx file; its weights lie in `data`.
        data: The external data file.
        copies: Nodes, each with its own weight.
        weight_bytes: All tensors of one node.
    """

    path: Path
    data: Path
    copies: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class _Product:
    """One operator: its type, domain and attributes, and the tensors behind its input."""

    op: str
    domain: str
    attributes: Mapping[str, Any]
    tensors: Sequence[NDArray[Any]]
    dtype: np.dtype[Any] = np.dtype(np.float32)  # noqa: RUF009 (a constant)


def write_binary_matmul(path: Path, n: int, k: int, *, bits: float, fill_bytes: int) -> KernelModel:
    """Write BinaryMatMul nodes without an input transform.

    Args:
        path: The .onnx file; `path` + ".data" gets the weights.
        n: Output features.
        k: Input features.
        bits: 1 to 4: planes per column on average, the last plane rounded to whole chunks of 64
            columns, so that the true number can differ a little.
        fill_bytes: Weights to write at least; there is always one copy.

    Raises:
        ValueError: That needs more than MAX_COPIES copies; so do the functions below.
    """
    planes = plane_columns(k, bits)
    rng = np.random.default_rng(_SEED)
    used = rng.random((PANEL, padded_columns(k))) < 0.5
    used[:, k:] = False
    signs = [used[:, :width] for width in planes]
    panels = padded_rows(n) // PANEL
    codes = np.repeat(pack_planes(signs), panels, axis=0)
    last = n - (panels - 1) * PANEL  # rows of the last panel that are no padding
    codes.reshape(panels, -1, PANEL, 4)[-1, :, last:] = 0
    # Levels of the size that a layer has whose outputs are about as large as its inputs.
    alphas = rng.uniform(0.25, 1.0, (n, coefficients_per_row(planes))) / np.sqrt(k)
    coefficients = pack_coefficients(alphas.astype(np.float16))
    attributes = {"K": k, "N": n, "plane_columns": list(planes)}
    product = _Product("BinaryMatMul", DOMAIN, attributes, (codes, coefficients))
    return _write(path, product, n, k, fill_bytes)


def plane_columns(k: int, bits: float) -> tuple[int, ...]:
    """Columns that plane 0, 1, .. cover so that a column has `bits` planes on average."""
    kp = padded_columns(k)
    whole = int(bits)
    rest = round((bits - whole) * kp / CHUNK) * CHUNK
    return (kp,) * whole + ((rest,) if rest else ())


def write_matmul_nbits(
    path: Path, n: int, k: int, *, bits: int, block: int, fill_bytes: int
) -> KernelModel:
    """Write ONNX Runtime's MatMulNBits nodes: accuracy_level 4 (int8), no zero point.

    Args:
        path: The .onnx file; `path` + ".data" gets the weights.
        n: Output features.
        k: Input features; what is missing to whole blocks is padding.
        bits: 2 or 4.
        block: Input features per scale.
        fill_bytes: Weights to write at least; there is always one copy.
    """
    rng = np.random.default_rng(_SEED)
    blocks = -(-k // block)
    codes = rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
    scales = (rng.random((n, blocks), dtype=np.float32) + 0.1) / np.float32(np.sqrt(k))
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
    product = _Product("MatMulNBits", MICROSOFT_DOMAIN, attributes, (codes, scales))
    return _write(path, product, n, k, fill_bytes)


def write_matmul(
    path: Path, n: int, k: int, *, dtype: type[np.floating[Any]], fill_bytes: int
) -> KernelModel:
    """Write MatMul nodes with a float weight.

    Args:
        path: The .onnx file; `path` + ".data" gets the weights.
        n: Output features.
        k: Input features.
        dtype: float16 or float32, of input, weight and output.
        fill_bytes: Weights to write at least; there is always one copy.
    """
    rng = np.random.default_rng(_SEED)
    weight = (rng.random((k, n), dtype=np.float32) - np.float32(0.5)) / np.float32(np.sqrt(k))
    product = _Product("MatMul", "", {}, (weight.astype(dtype, copy=False),), np.dtype(dtype))
    return _write(path, product, n, k, fill_bytes)


def _write(path: Path, product: _Product, n: int, k: int, fill_bytes: int) -> KernelModel:
    weight_bytes = sum(tensor.nbytes for tensor in product.tensors)
    copies = max(1, -(-fill_bytes // weight_bytes))
    if copies > MAX_COPIES:
        raise ValueError(f"{copies} copies of {n} x {k} are more than {MAX_COPIES}.")
    data = path.with_name(path.name + ".data")
    nodes, initializers = [], []
    with data.open("wb") as stream:
        for copy in range(copies):
            names = [f"w{copy}_{index}" for index in range(len(product.tensors))]
            for index, (name, tensor) in enumerate(zip(names, product.tensors, strict=True)):
                stream.write(b"\0" * (-stream.tell() % _PAGE))
                initializers.append(_external(name, tensor, data.name, stream.tell()))
                content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
                if index == 0:
                    stream.write(copy.to_bytes(2, "little"))
                    content = content[2:]
                stream.write(content.data)
            nodes.append(
                helper.make_node(
                    product.op,
                    [INPUT, *names],
                    [f"y{copy}"],
                    domain=product.domain,
                    **product.attributes,
                )
            )
    kind = _ELEMENT_TYPES[product.dtype]
    graph = helper.make_graph(
        nodes,
        "kernels",
        [helper.make_tensor_value_info(INPUT, kind, ["m", k])],
        [helper.make_tensor_value_info(f"y{copy}", kind, ["m", n]) for copy in range(copies)],
        initializers,
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    if product.domain:
        opsets.append(helper.make_opsetid(product.domain, OPSET_VERSION))
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION), str(path))
    return KernelModel(path, data, copies, weight_bytes)


def _external(name: str, tensor: NDArray[Any], file: str, offset: int) -> TensorProto:
    proto = TensorProto()
    proto.name = name
    proto.data_type = _ELEMENT_TYPES[tensor.dtype]
    proto.dims.extend(tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", tensor.nbytes)):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)
    return proto
