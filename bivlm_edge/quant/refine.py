"""LNQ refinement: coefficients refitted in the Hessian metric, signs by coordinate descent.

Kim et al., "GuidedQuant", 2025, section 4 (layer-wise non-uniform quantization).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bivlm_edge.quant.levels import Levels, make_levels, sign_table, solve_rows
from bivlm_edge.quant.packed import PlaneClass

_BLOCK = 64
_ROWS = 512  # rows whose sign tensor is held at once by `refit`


@dataclass(slots=True)
class Assignment:
    """Codes and coefficients of one layer while it is being quantized.

    Attributes:
        classes: Classes of the columns, cut to the columns that exist.
        codes: uint8 (k, n); bit p is plane p.
        alpha: (n, A), slots as in FORMAT.md.
    """

    classes: Sequence[PlaneClass]
    codes: Tensor
    alpha: Tensor

    def coefficients(self, group: PlaneClass) -> Tensor:
        """Coefficients of one class, (n, planes)."""
        return self.alpha[:, group.slot : group.slot + group.planes]

    def levels(self) -> list[Levels]:
        """The levels of each class."""
        return [make_levels(self.coefficients(group)) for group in self.classes]

    def values(self) -> Tensor:
        """The rounded weight, (k, n)."""
        parts = []
        for group in self.classes:
            sums = sign_table(group.planes).to(self.alpha.dtype) @ self.coefficients(group).T
            parts.append(sums.gather(0, self.codes[group.start : group.stop].long()))
        return torch.cat(parts)


def loss(values_t: Tensor, weight_t: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) for E = values - weight, both (k, n)."""
    error = (values_t - weight_t).double()
    return float((error * (hessian.double() @ error)).sum())


def refit(assignment: Assignment, weight_t: Tensor, hessian: Tensor) -> Tensor:
    """Coefficients (n, A) of least H-weighted error for the given codes."""
    n = weight_t.shape[1]
    slots = assignment.alpha.shape[1]
    parts = []
    for first in range(0, n, _ROWS):
        rows = slice(first, min(first + _ROWS, n))
        count = rows.stop - rows.start
        signs = torch.zeros(count, slots, len(weight_t), dtype=weight_t.dtype)
        for group in assignment.classes:
            codes = assignment.codes[group.start : group.stop, rows].T
            for p in range(group.planes):
                plane = (codes >> p & 1).to(weight_t.dtype) * 2 - 1
                signs[:, group.slot + p, group.start : group.stop] = plane
        weighted = signs @ hessian
        gram = weighted @ signs.mT
        target = (weighted @ weight_t[:, rows].T[:, :, None])[:, :, 0]
        parts.append(solve_rows(gram, target))
    return torch.cat(parts)


def descend(assignment: Assignment, weight_t: Tensor, hessian: Tensor, sweeps: int) -> None:
    """Set each column to its best level with all others fixed, in place; cyclic `sweeps` times.

    The H-weighted error never rises. All rows of the layer move at once; within a block of
    columns only the block's gradient is kept up to date, the rest follows in one product.
    """
    tables = assignment.levels()
    values = assignment.values()
    gradient = hessian @ (values - weight_t)
    steps = (-1 / hessian.diagonal().clamp_min(1e-30)).tolist()
    for _ in range(sweeps):
        changed = False
        for group, table in zip(assignment.classes, tables, strict=True):
            for start in range(group.start, group.stop, _BLOCK):
                block = slice(start, min(start + _BLOCK, group.stop))
                before = values[block].clone()
                local = gradient[block].clone()
                inner = hessian[block, block]
                rows = zip(values[block], local, steps[block], strict=True)
                for i, (value, slope, step) in enumerate(rows, start=1):
                    chosen = table.round(torch.add(value, slope, alpha=step))
                    local[i:].addr_(inner[i:, i - 1], chosen - value)
                    value.copy_(chosen)
                delta = values[block] - before
                if bool(delta.any()):
                    changed = True
                    gradient.addmm_(hessian[:, block], delta)
        if not changed:
            break
    if sweeps:
        for group, table in zip(assignment.classes, tables, strict=True):
            columns = slice(group.start, group.stop)
            assignment.codes[columns] = table.nearest_codes(values[columns])
