"""Row coefficients of bit planes: their joint fit, and the nearest of the sums they form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Coefficients of 1 to 4 planes that fit a unit Gaussian best, and the squared error they leave.
GAUSSIAN_COEFFICIENTS = (
    (0.7979,),
    (0.9816, 0.5288),
    (1.158, 0.607, 0.301),
    (1.28, 0.66, 0.33, 0.165),
)
GAUSSIAN_DISTORTION = (1.0, 0.3634, 0.1175, 0.0369, 0.0114)

_ITERATIONS = 12
_RIDGE = 1e-7


@dataclass(frozen=True, slots=True)
class Levels:
    """All sums of +-coefficients, per row of the weight, rising.

    Attributes:
        values: (2^planes, n).
        thresholds: (2^planes - 1, n), midpoints of neighbours.
        codes: uint8 (2^planes, n); bit p is set where plane p is +1.
        steps: The coefficients, not negative and falling, each (n,), if the sign of what is left
            decides each in turn: none is below the sum of those behind it. Else None.
    """

    values: Tensor
    thresholds: Tensor
    codes: Tensor
    steps: tuple[Tensor, ...] | None

    def round(self, targets: Tensor) -> Tensor:
        """The nearest level, for targets (n,)."""
        if self.steps is None:
            return self.values.gather(0, self.nearest(targets)[None])[0]
        rounded = torch.copysign(self.steps[0], targets)
        for step in self.steps[1:]:
            rounded = rounded + torch.copysign(step, targets - rounded)
        return rounded

    def nearest_codes(self, targets: Tensor) -> Tensor:
        """Codes of the nearest levels, uint8 (k, n) for targets (k, n)."""
        return self.codes.gather(0, self.nearest(targets))

    def nearest(self, targets: Tensor) -> Tensor:
        """Index of the nearest level, int64 with the shape of `targets` (..., n)."""
        if targets.ndim == 1:
            return (targets > self.thresholds).sum(dim=0)
        index = torch.zeros(targets.shape, dtype=torch.uint8)
        for threshold in self.thresholds.unbind():
            index += targets > threshold
        return index.long()


def make_levels(alpha: Tensor) -> Levels:
    """The levels of coefficients (n, planes)."""
    planes = alpha.shape[1]
    codes = torch.arange(2**planes)
    signs = sign_table(planes).to(alpha.dtype)
    values, order = (signs @ alpha.T).sort(dim=0)
    falling = canonical(alpha)
    behind = falling.flip(1).cumsum(1).flip(1) - falling
    return Levels(
        values,
        (values[1:] + values[:-1]) / 2,
        codes[order].to(torch.uint8),
        falling.T.contiguous().unbind() if bool((falling >= behind).all()) else None,
    )


def sign_table(planes: int) -> Tensor:
    """Signs +-1 of every code, int8 (2^planes, planes): bit p of the code is plane p."""
    codes = torch.arange(2**planes)[:, None]
    bits = codes >> torch.arange(planes) & 1
    return (2 * bits - 1).to(torch.int8)


def canonical(alpha: Tensor) -> Tensor:
    """The same levels by coefficients that are not negative and fall from plane to plane."""
    return alpha.abs().sort(dim=1, descending=True).values


def gaussian_coefficients(
    weight: Tensor, planes: int, column_weights: Tensor | None = None
) -> Tensor:
    """Coefficients (n, planes) that fit a Gaussian with the weighted mean square of each row best.

    Args:
        weight: (n, k).
        planes: 1 to 4.
        column_weights: (k,), not negative; None for equal weights.
    """
    weights = _mean_one(weight, column_weights)
    deviation = ((weight**2 * weights).mean(dim=1, keepdim=True)).sqrt()
    return deviation * torch.tensor(GAUSSIAN_COEFFICIENTS[planes - 1], dtype=weight.dtype)


def fit_coefficients(weight: Tensor, start: Tensor, column_weights: Tensor | None = None) -> Tensor:
    """Coefficients (n, planes) that minimise the weighted squared error of each row.

    Alternates nearest levels and least squares; never increases the error.

    Args:
        weight: (n, k).
        start: Coefficients to begin with, (n, planes), 1 to 4 planes.
        column_weights: (k,), not negative; None for equal weights.
    """
    weights = _mean_one(weight, column_weights)
    alpha = start
    table = sign_table(start.shape[1]).to(weight.dtype)
    for _ in range(_ITERATIONS):
        levels = make_levels(alpha)
        codes = levels.nearest_codes(weight.T).long()
        signs = table[codes].permute(1, 2, 0)  # n, planes, k
        weighted = signs * weights
        gram = weighted @ signs.mT
        alpha = solve_rows(gram, (weighted @ weight[:, :, None])[:, :, 0])
    return canonical(alpha)


def _mean_one(weight: Tensor, column_weights: Tensor | None) -> Tensor:
    """Column weights (k,) of mean one in the dtype of `weight`."""
    if column_weights is None:
        return torch.ones(weight.shape[1], dtype=weight.dtype)
    return (column_weights / column_weights.mean()).to(weight.dtype)


def solve_rows(gram: Tensor, target: Tensor) -> Tensor:
    """Least-squares coefficients per row: gram (n, a, a), target (n, a) -> (n, a).

    A ridge of 1e-7 of the mean diagonal keeps rows solvable whose planes coincide.
    """
    gram64 = gram.double()
    size = gram.shape[-1]
    scale = gram64.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(1e-30)
    ridge = _RIDGE * scale[:, None, None] * torch.eye(size, dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(gram64 + ridge, target.double()[:, :, None])
    return solved[:, :, 0].to(gram.dtype)
