"""The operators as torch custom ops, and how `torch.onnx.export` writes them.

The eager forms are slow and exact: they exist so that the module that is exported can also be run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxscript
import torch
from torch import Tensor, nn

from bivlm_edge.export import schemas, transformer_ops
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.weights import GroupWeight, pack_bits

_ai_bivlm = onnxscript.values.Opset(schemas.DOMAIN, schemas.OPSET_VERSION)
_com_microsoft = onnxscript.values.Opset("com.microsoft", 1)


@torch.library.custom_op("bivlm::binary_matmul", mutates_args=())
def binary_matmul(
    x: Tensor,
    codes: Tensor,
    coefficients: Tensor,
    signs: Tensor | None,
    order: Tensor | None,
    k: int,
    n: int,
    plane_columns: list[int],
    hadamard_block: int,
) -> Tensor:
    """BinaryMatMul of OPS.md on the dequantized weight: x ``(.., k)`` to ``(.., n)``."""
    weight = BinaryWeight(
        n=n,
        k=k,
        plane_columns=tuple(plane_columns),
        codes=codes.numpy(),
        coefficients=coefficients.numpy(),
        hadamard_block=hadamard_block,
        signs=None if signs is None else signs.numpy(),
        order=None if order is None else order.view(torch.int16).numpy().view(np.uint16),
    )
    dense = torch.from_numpy(weight.dequantize())
    return nn.functional.linear(x.float(), dense).to(x.dtype)


@binary_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,  # noqa: ARG001 - the signature of the op
    coefficients: Tensor,  # noqa: ARG001
    signs: Tensor | None,  # noqa: ARG001
    order: Tensor | None,  # noqa: ARG001
    k: int,  # noqa: ARG001
    n: int,
    plane_columns: list[int],  # noqa: ARG001
    hadamard_block: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("bivlm::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    k: int,
    n: int,
    bits: int,
    block: int,
) -> Tensor:
    """com.microsoft.MatMulNBits: x ``(.., k)``, codes uint8 ``(n, blocks, block * bits / 8)``."""
    blocks = codes.shape[1]
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    mask = 2**bits - 1
    values = ((codes[..., None] >> shifts) & mask).reshape(n, blocks, block).float()
    if zero_points is None:
        zero = torch.full((n, blocks), float(2 ** (bits - 1)))
    else:
        packed = ((zero_points.reshape(n, -1)[..., None] >> shifts) & mask).reshape(n, -1)
        zero = packed[:, :blocks].float()
    dense = (values - zero[..., None]) * scales.reshape(n, blocks, 1).float()
    return nn.functional.linear(x.float(), dense.reshape(n, -1)[:, :k]).to(x.dtype)


@matmul_nbits.register_fake
def _(
    x: Tensor,
    codes: Tensor,  # noqa: ARG001 - the signature of the op
    scales: Tensor,  # noqa: ARG001
    zero_points: Tensor | None,  # noqa: ARG001
    k: int,  # noqa: ARG001
    n: int,
    bits: int,  # noqa: ARG001
    block: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("bivlm::group_matmul", mutates_args=())
def group_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, k: int, n: int, bits: int, block: int
) -> Tensor:
    """GroupMatMul of OPS.md: x ``(.., k)``, codes uint8 ``(n, blocks, block * bits / 8)``."""
    y: Tensor = matmul_nbits(x, codes, scales, None, k, n, bits, block)
    return y


@group_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,  # noqa: ARG001 - the signature of the op
    scales: Tensor,  # noqa: ARG001
    k: int,  # noqa: ARG001
    n: int,
    bits: int,  # noqa: ARG001
    block: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the `custom_translation_table` for `torch.onnx.export`."""
    schemas.register()

    def to_binary_matmul(
        x: Any,
        codes: Any,
        coefficients: Any,
        signs: Any,
        order: Any,
        k: int,
        n: int,
        plane_columns: list[int],
        hadamard_block: int,
    ) -> Any:
        return _ai_bivlm.BinaryMatMul(
            x,
            codes,
            coefficients,
            signs,
            order,
            K=k,
            N=n,
            plane_columns=list(plane_columns),
            hadamard_block=hadamard_block,
        )

    def to_matmul_nbits(
        x: Any, codes: Any, scales: Any, zero_points: Any, k: int, n: int, bits: int, block: int
    ) -> Any:
        # accuracy_level 4 (int8 activations): the other levels of 2-bit weights dequantize the
        # whole matrix on every call.
        return _com_microsoft.MatMulNBits(
            x, codes, scales, zero_points, K=k, N=n, bits=bits, block_size=block, accuracy_level=4
        )

    def to_group_matmul(
        x: Any, codes: Any, scales: Any, k: int, n: int, bits: int, block: int
    ) -> Any:
        return _ai_bivlm.GroupMatMul(x, codes, scales, K=k, N=n, bits=bits, block_size=block)

    return {
        torch.ops.bivlm.binary_matmul.default: to_binary_matmul,
        torch.ops.bivlm.group_matmul.default: to_group_matmul,
        torch.ops.bivlm.matmul_nbits.default: to_matmul_nbits,
        **transformer_ops.translation_table(),
    }


class BinaryLinear(nn.Module):
    """A linear layer on a packed weight: ``(.., k)`` to ``(.., n)``."""

    def __init__(self, weight: BinaryWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.k, weight.n
        self.plane_columns = list(weight.plane_columns)
        self.hadamard_block = weight.hadamard_block
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("codes", torch.from_numpy(weight.codes))
        self.register_buffer("coefficients", torch.from_numpy(weight.coefficients))
        self.register_buffer("signs", _tensor(weight.signs))
        self.register_buffer("order", _tensor(weight.order))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weight and the bias."""
        y: Tensor = torch.ops.bivlm.binary_matmul(
            x,
            self.codes,
            self.coefficients,
            self.signs,
            self.order,
            self.in_features,
            self.out_features,
            self.plane_columns,
            self.hadamard_block,
        )
        return y if self.bias is None else y + self.bias


class GroupLinear(nn.Module):
    """A linear layer on affine codes, written as MatMulNBits: ``(.., k)`` to ``(.., n)``."""

    def __init__(self, weight: GroupWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.k, weight.n
        self.bits, self.block = weight.bits, weight.group
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
        blocks = weight.scale.shape[1]
        codes = pack_bits(weight.codes.reshape(weight.n, blocks, weight.group), weight.bits)
        is_symmetric = bool((weight.zero == 2 ** (weight.bits - 1)).all())
        zero_points = None if is_symmetric else _tensor(pack_bits(weight.zero, weight.bits))
        self.register_buffer("codes", torch.from_numpy(codes))
        self.register_buffer("scales", torch.from_numpy(weight.scale))
        self.register_buffer("zero_points", zero_points)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weight and the bias.

        MatMulNBits runs in float32 in a float16 graph too: ONNX Runtime 1.31 computes it wrong in
        float16 graphs at its default optimization level (30 % error measured), 1.24 refuses it.
        """
        y: Tensor = torch.ops.bivlm.matmul_nbits(
            x.float(),
            self.codes,
            self.scales.float(),
            self.zero_points,
            self.in_features,
            self.out_features,
            self.bits,
            self.block,
        )
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias


class GroupHead(GroupLinear):
    """The output head on symmetric codes, written as GroupMatMul: ``(.., k)`` to ``(.., n)``."""

    def __init__(self, weight: GroupWeight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        is_symmetric = bool((weight.zero == 2 ** (weight.bits - 1)).all())
        if not is_symmetric or self.bits not in (4, 8) or self.block not in (16, 32, 64):
            raise ValueError(
                "GroupMatMul takes symmetric codes of 4 or 8 bits in blocks of 16, 32 or 64, not "
                f"{'symmetric' if is_symmetric else 'asymmetric'} ones of {self.bits} bits in "
                f"blocks of {self.block}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weight and the bias."""
        y: Tensor = torch.ops.bivlm.group_matmul(
            x,
            self.codes,
            self.scales,
            self.in_features,
            self.out_features,
            self.bits,
            self.block,
        )
        return y if self.bias is None else y + self.bias


def _tensor(array: Any) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
