"""BiLLM: salient columns binarized twice, other weights once in two groups by magnitude.

Huang et al., "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs", 2024. Blocks of 128
columns, one scale per row, block, group and plane. Where the paper and the authors' code differ,
this is what leaves the least error on SmolLM2-135M: scales without means and the split of the
weights as in the paper (the code subtracts means, which costs 0.4 bits per weight and adds error,
and splits the sensitivities w^2 / U_jj^2); salient columns are searched on those, as in the code.

True bits with the most favourable code that can be decoded: one sign per weight and a second one in
salient columns; the maps of salient columns and of the two groups entropy-coded; four float16
scales per row and block. The paper counts the signs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bivlm_edge.quant.methods._blocks import (
    FLOAT_BITS,
    Size,
    magnitude_split,
    map_bits,
    quantize_blocks,
    salient_columns,
)
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight

NEEDS = ("hessian",)

_FLOATS_PER_ROW = 4


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[DenseWeight]:
    """Binarize block by block with compensation between blocks."""
    del options
    return [quantize_blocks(layer.weight, layer.hessian, _binarize_block) for layer in layers]


def _binarize_block(block: Tensor, costs: Tensor, size: Size) -> Tensor:
    n, width = block.shape
    is_salient = torch.zeros(width, dtype=torch.bool)
    sensitivities = block.square() * costs
    is_salient[salient_columns(sensitivities, sensitivities.sum(dim=0))] = True
    salient, other = block[:, is_salient], block[:, ~is_salient]
    rounded = torch.empty_like(block)
    rounded[:, is_salient] = binarize(salient, torch.ones_like(salient, dtype=torch.bool), 2)
    dense = other.abs() < magnitude_split(other)
    rounded[:, ~is_salient] = binarize(other, dense, 1) + binarize(other, ~dense, 1)
    size.signs += block.numel() + salient.numel()
    size.beside += map_bits(is_salient) + map_bits(dense) + _FLOATS_PER_ROW * FLOAT_BITS * n
    return rounded


def binarize(values: Tensor, mask: Tensor, order: int) -> Tensor:
    """Rows as `order` residual planes of signs with one float16 scale each.

    Args:
        values: float32 (n, b).
        mask: bool (n, b), the weights that count.
        order: Number of planes.

    Returns:
        (n, b), 0 outside the mask.
    """
    count = mask.sum(dim=1, keepdim=True).clamp_min(1)
    planes = torch.zeros_like(values)
    for _ in range(order):
        rest = (values - planes) * mask
        scale = (rest.abs().sum(dim=1, keepdim=True) / count).half().float()
        planes = planes + scale * torch.where(rest >= 0, 1.0, -1.0)
    return planes * mask
