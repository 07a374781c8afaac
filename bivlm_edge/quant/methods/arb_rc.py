"""ARB-LLM_RC with CGB: BiLLM's groups with alternately refined scales of rows times columns.

Li et al., "ARB-LLM: Alternating Refined Binarizations for Large Language Models", 2024, section 3.3
(row-column) and 3.4 (column-group bitmap): no means; salient and other columns are both divided by
magnitude, and the two salient groups have two planes. 15 rounds; BiLLM's searches, on the weights.

True bits with the most favourable code that can be decoded: one sign per weight and a second one in
salient columns; the maps of salient columns and of the groups entropy-coded; a float16 scale per
plane, group, row and block (6) and per plane, group and column (2, or 4 in a salient column). The
paper counts the signs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

ROUNDS = 15


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[DenseWeight]:
    """Binarize block by block with compensation between blocks."""
    del options
    return [quantize_blocks(layer.weight, layer.hessian, _binarize_block) for layer in layers]


def _binarize_block(block: Tensor, costs: Tensor, size: Size) -> Tensor:
    width = block.shape[1]
    is_salient = torch.zeros(width, dtype=torch.bool)
    is_salient[salient_columns(block, block.square().sum(dim=0) * costs)] = True
    rounded = torch.empty_like(block)
    size.beside += map_bits(is_salient)
    for columns, planes in ((~is_salient, 1), (is_salient, 2)):
        values = block[:, columns]
        if values.shape[1] == 0:
            continue
        dense = values.abs() < magnitude_split(values)
        rounded[:, columns] = fit(values, dense, planes) + fit(values, ~dense, planes)
        size.signs += planes * values.numel()
        size.beside += map_bits(dense) + 2 * planes * FLOAT_BITS * sum(values.shape)
    return rounded


def fit(values: Tensor, mask: Tensor, planes: int, rounds: int = ROUNDS) -> Tensor:
    """Values in `mask` as `planes` sign planes, each scaled by a row times a column factor.

    Every step of a round is the optimum of one factor, or of all signs, with the others fixed: but
    for the rounding of the factors to float16 the squared error never grows with `rounds`.

    Args:
        values: float32 (n, b).
        mask: bool (n, b).
        planes: 1 or 2.
        rounds: Alternations behind the start, mean magnitudes of rows and columns.

    Returns:
        (n, b), 0 outside the mask.
    """
    kept = mask.to(values.dtype)
    rest = values * kept
    fitted = []
    for _ in range(planes):
        plane = _first_plane(rest, kept)
        fitted.append(plane)
        rest = rest - plane.values() * kept
    for _ in range(rounds):
        for plane in fitted:
            rest = rest + plane.values() * kept
            plane.refit(rest, kept)
            rest = rest - plane.values() * kept
        if planes == 2:
            _choose_signs(values, *fitted)
            rest = (values - fitted[0].values() - fitted[1].values()) * kept
    decoded = torch.zeros_like(values)
    for plane in fitted:
        plane.rows, plane.columns = (x.half().float() for x in (plane.rows, plane.columns))
        decoded += plane.values() * kept
    return decoded


@dataclass(slots=True)
class _Plane:
    """Signs (n, b) scaled by `rows` (n,) times `columns` (b,)."""

    signs: Tensor
    rows: Tensor
    columns: Tensor

    def values(self) -> Tensor:
        return torch.outer(self.rows, self.columns) * self.signs

    def refit(self, target: Tensor, kept: Tensor) -> None:
        """Least squares of the rows, then of the columns, over the weights that are kept."""
        aligned = target * self.signs
        self.rows = _ratio(aligned @ self.columns, kept @ self.columns**2)
        self.columns = _ratio(aligned.T @ self.rows, kept.T @ self.rows**2)


def _first_plane(target: Tensor, kept: Tensor) -> _Plane:
    magnitudes = target.abs()
    rows = _ratio(magnitudes.sum(dim=1), kept.sum(dim=1))
    relative = magnitudes / rows.clamp_min(1e-30)[:, None]
    columns = _ratio(relative.sum(dim=0), kept.sum(dim=0))
    return _Plane(torch.where(target >= 0, 1.0, -1.0), rows, columns)


def _choose_signs(values: Tensor, first: _Plane, second: _Plane) -> None:
    """The pair of signs that comes nearest to each value."""
    a, b = (torch.outer(plane.rows, plane.columns) for plane in (first, second))
    plus, minus = values - a, values + a
    is_plus = (plus.abs() - b.abs()).abs() <= (minus.abs() - b.abs()).abs()
    rest = torch.where(is_plus, plus, minus)
    first.signs = torch.where(is_plus, 1.0, -1.0)
    second.signs = torch.where(rest * b >= 0, 1.0, -1.0)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Quotient, 0 where nothing is kept."""
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), 0.0)
