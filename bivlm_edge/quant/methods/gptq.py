"""GPTQ on the affine grid of `rtn`, with activation order and static groups.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2023. Groups are fixed before the loop, so the order changes no stored layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bivlm_edge.quant.linalg import compensate, inverse_factor
from bivlm_edge.quant.methods.rtn import affine_grid, group_size, group_weight
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import GroupWeight

BITS = (2.0, 4.0, 8.0)
NEEDS = ("hessian",)


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[GroupWeight]:
    """Round columns by falling diag(H), each error compensated by the columns still to come."""
    return [_quantize(layer.weight, layer.hessian, options) for layer in layers]


def _quantize(weight: Tensor, hessian: Tensor, options: LayerOptions) -> GroupWeight:
    n, k = weight.shape
    bits = int(options.bits)
    group = options.group or group_size(k)
    scale, zero = affine_grid(weight, bits, group)
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    alive = torch.where(diagonal > 0, 1.0, 0.0)
    codes = torch.empty(k, n)

    def assign(position: int, column: Tensor) -> Tensor:
        j = int(order[position])
        row_scale, row_zero = scale[:, j // group], zero[:, j // group]
        codes[j] = (column / row_scale + row_zero).round().clamp(0, 2**bits - 1)
        return row_scale * (codes[j] - row_zero)

    factor = inverse_factor(hessian[order][:, order])
    compensate((weight * alive).T[order].contiguous(), factor, assign)
    return group_weight(codes.T, scale, zero, bits, group)
