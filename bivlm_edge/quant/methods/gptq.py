"""GPTQ with activation order, on the affine grid of `rtn` or on a codebook per row.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2023. Groups are fixed before the loop, so the order changes no stored layout.

`--grid lloyd`: every row has its own 2^bits levels, the weighted k-means of its weights, as in Kim
et al., "SqueezeLLM", 2024, with weights 1 / U_jj^2: what an error in column j costs once the
columns behind it have compensated (Zhang and Shrivastava, "LeanQuant", 2025, takes higher powers of
1 / U_jj, which leave more error on SmolLM2-135M).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bivlm_edge.quant.linalg import compensate, inverse_factor
from bivlm_edge.quant.methods.rtn import affine_grid, group_size, group_weight
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight, GroupWeight

BITS = (2.0, 3.0, 4.0, 8.0)
EXPORTED_BITS = (2.0, 4.0, 8.0)
NEEDS = ("hessian",)
OPTIONS = ("grid",)

_FLOAT_BITS = 16
_ROUNDS = 50


def quantize(
    layers: Sequence[CalibratedLayer], options: LayerOptions
) -> list[GroupWeight] | list[DenseWeight]:
    """Round columns by falling diag(H), each error compensated by the columns still to come.

    The Lloyd grid has no operator: its weights are dense, with the bits of codes and codebooks.
    """
    if options.grid == "lloyd":
        return [_on_codebook(layer.weight, layer.hessian, int(options.bits)) for layer in layers]
    return [_on_affine_grid(layer.weight, layer.hessian, options) for layer in layers]


def _on_affine_grid(weight: Tensor, hessian: Tensor, options: LayerOptions) -> GroupWeight:
    n, k = weight.shape
    bits = int(options.bits)
    group = options.group or group_size(k)
    weight = _without_dead_columns(weight, hessian)
    scale, zero = affine_grid(weight, bits, group)
    order = _visit(hessian)
    codes = torch.empty(k, n)

    def assign(position: int, column: Tensor) -> Tensor:
        j = int(order[position])
        row_scale, row_zero = scale[:, j // group], zero[:, j // group]
        codes[j] = (column / row_scale + row_zero).round().clamp(0, 2**bits - 1)
        return row_scale * (codes[j] - row_zero)

    factor = inverse_factor(hessian[order][:, order])
    compensate(weight.T[order].contiguous(), factor, assign)
    return group_weight(codes.T, scale, zero, bits, group)


def _on_codebook(weight: Tensor, hessian: Tensor, bits: int) -> DenseWeight:
    k = weight.shape[1]
    weight = _without_dead_columns(weight, hessian)
    order = _visit(hessian)
    factor = inverse_factor(hessian[order][:, order])
    costs = torch.empty(k)
    costs[order] = (1 / factor.diagonal() ** 2).float()
    levels = lloyd_levels(weight, costs, 2**bits).half().float()
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()

    def assign(_: int, column: Tensor) -> Tensor:
        codes = torch.searchsorted(middles, column[:, None])
        return levels.gather(1, codes)[:, 0]

    rounded = torch.empty_like(weight)
    rounded[:, order] = compensate(weight.T[order].contiguous(), factor, assign).T
    true_bits = bits + _FLOAT_BITS * 2**bits / k
    return DenseWeight(rounded.numpy(), claimed_bits=bits, true_bits=true_bits)


def _visit(hessian: Tensor) -> Tensor:
    return hessian.diagonal().argsort(descending=True, stable=True)


def _without_dead_columns(weight: Tensor, hessian: Tensor) -> Tensor:
    """Zeros for channels that no calibration input uses, so that they widen no grid."""
    return weight * (hessian.diagonal() > 0).to(weight.dtype)


def lloyd_levels(weight: Tensor, costs: Tensor, count: int) -> Tensor:
    """Levels of each row that leave the least weighted squared error, by Lloyd's algorithm.

    Starts from the row's quantiles and from even steps over its range; the better end is taken.

    Args:
        weight: float32 (n, k).
        costs: (k,), weight of the error in each column.
        count: Levels per row.

    Returns:
        float32 (n, count), ascending.
    """
    k = weight.shape[1]
    ranked, places = weight.sort(dim=1)
    mass = costs.double()[places]
    totals = [
        torch.nn.functional.pad(terms.cumsum(dim=1), (1, 0)) for terms in (mass, mass * ranked)
    ]
    rows = _SortedRows(ranked, *totals)
    quantiles = ranked[:, ((torch.arange(count) + 0.5) * k / count).long()]
    low, high = ranked[:, :1], ranked[:, -1:]
    steps = low + (high - low) * torch.linspace(0, 1, count)
    (first, gain), (second, other) = rows.lloyd(quantiles), rows.lloyd(steps)
    return torch.where((other > gain)[:, None], second, first)


class _SortedRows(NamedTuple):
    """Rows in ascending order: float32 (n, k), with sums of costs and of costs * values in float64.

    The sums (n, k + 1) start with 0: those of the first j values stand at place j.
    """

    values: Tensor
    mass: Tensor
    sums: Tensor

    def lloyd(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (n, count) after the last round, and by how much they lower the error (n,)."""
        gain = torch.zeros(len(levels))
        ends = torch.full((len(levels), 1), self.values.shape[1])
        for _ in range(_ROUNDS):
            middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
            edges = torch.searchsorted(self.values, middles)
            edges = torch.cat([torch.zeros_like(ends), edges, ends], dim=1)
            mass, sums = (total.gather(1, edges).diff(dim=1) for total in (self.mass, self.sums))
            means = sums / mass.clamp_min(1e-300)
            levels = torch.where(mass > 0, means.float(), levels)
            gain = (means * sums).sum(dim=1)
        return levels, gain
