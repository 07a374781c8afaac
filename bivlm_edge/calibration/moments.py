"""Second moments and means of a layer's inputs, a part of the batches held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bivlm_edge.distributed import Team

ALONE = Team()
HELD_OUT_EVERY = 10
_COLUMNS = 256  # of a symmetric product that are computed at once, below the diagonal for nothing


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighted averages over input rows x.

    Attributes:
        hessian: E[x x^T], float64 (k, k).
        mean: E[x], float64 (k,).
        rows: Number of rows.
        weight: Sum of their weights; the number of rows where all weigh 1.
        cross: E[f x^T] with f the row that the float model has in place of x, float64 (k, k), or
            None.
        reference_mean: E[f], float64 (k,), or None.
    """

    hessian: Tensor
    mean: Tensor
    rows: int
    weight: float
    cross: Tensor | None = None
    reference_mean: Tensor | None = None

    def around(self, center: Tensor) -> Tensor:
        """E[(x - center)(x - center)^T], float64 (k, k)."""
        cross = torch.outer(self.mean, center)
        return self.hessian - cross - cross.T + torch.outer(center, center)


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Moments of the rows to fit, and of those held out (None if there is but one batch)."""

    fit: Moments
    held_out: Moments | None


class _Accumulator:
    """Sums of one half of the rows, in float64.

    Products are those of rows around the mean of their batch, in float32; the mean is added in
    float64. Products of raw rows would err by 2^-24 of a channel's second moment, which may be
    more than its variance: their moments around the mean are not positive semidefinite. Of
    `squares` only what is on and above the diagonal counts.
    """

    def __init__(self, k: int, device: torch.device | None = None, *, crossed: bool) -> None:
        self.squares = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.sums = torch.zeros(k, dtype=torch.float64, device=device)
        self.rows = 0
        self.weight = 0.0
        self.cross = torch.zeros_like(self.squares) if crossed else None
        self.reference_sums = torch.zeros_like(self.sums) if crossed else None

    def add(self, rows: Tensor, weights: Tensor | None, reference: Tensor | None) -> None:
        if (reference is None) != (self.cross is None):
            raise ValueError("rows of the float model are given for all rows or for none.")
        weight = float(len(rows)) if weights is None else float(weights.double().sum())
        pivot, deviations, weighted = _deviations(rows, weights)
        deviation = weighted.sum(dim=0, dtype=torch.float64)
        for start in range(0, len(pivot), _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            self.squares[columns, start:] += weighted[:, columns].T @ deviations[:, start:]
        self.squares.addr_(pivot, deviation + weight * pivot).addr_(deviation, pivot)
        self.sums += deviation + weight * pivot
        self.rows += len(rows)
        self.weight += weight
        if reference is not None and self.cross is not None and self.reference_sums is not None:
            center, originals, weighted_originals = _deviations(reference, weights)
            original = weighted_originals.sum(dim=0, dtype=torch.float64)
            self.cross += (originals.T @ weighted).double()
            self.cross.addr_(center, deviation + weight * pivot).addr_(original, pivot)
            self.reference_sums += original + weight * center

    def pooled(self, team: Team) -> _Accumulator:
        """The sums over all processes."""
        if team.size == 1:
            return self
        counts = self.sums.new_tensor([float(self.rows), self.weight])
        parts = [self.squares, self.sums, counts]
        if self.cross is not None and self.reference_sums is not None:
            parts += [self.cross, self.reference_sums]
        flat = team.sum(torch.cat([part.reshape(-1) for part in parts]))
        found = torch.split(flat, [part.numel() for part in parts])
        pooled = [piece.reshape(part.shape) for piece, part in zip(found, parts, strict=True)]
        whole = _Accumulator(0, crossed=False)
        whole.squares, whole.sums, counts = pooled[:3]
        whole.rows, whole.weight = int(counts[0]), float(counts[1])
        if self.cross is not None:
            whole.cross, whole.reference_sums = pooled[3:]
        return whole

    def finish(self) -> Moments:
        """The averages, in the processor's memory."""
        total = self.weight if self.weight > 0 else 1.0
        squares = (self.squares.triu() + self.squares.triu(1).T) / total
        return Moments(
            squares.cpu(),
            (self.sums / total).cpu(),
            self.rows,
            self.weight,
            None if self.cross is None else (self.cross / total).cpu(),
            None if self.reference_sums is None else (self.reference_sums / total).cpu(),
        )


def _deviations(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of rows (t, k), float64 (k,), the rows around it, and those times their weights."""
    pivot = rows.mean(dim=0, dtype=torch.float64).float()
    deviations = rows.float() - pivot
    weighted = deviations if weights is None else deviations * weights.float()[:, None]
    return pivot.double(), deviations, weighted


class StatisticsCollector:
    """Adds up rows batch by batch; every tenth batch, and always the last, is held out.

    Args:
        k: Width of a row.
        batches: Number of batches that will come, to all processes together; with only one
            nothing is held out.
        team: The processes that take the batches in turn.
        device: Of the rows; sums are kept there.
        crossed: Whether every row comes with that of the float model.
    """

    def __init__(
        self,
        k: int,
        batches: int,
        team: Team = ALONE,
        device: torch.device | None = None,
        *,
        crossed: bool = False,
    ) -> None:
        self.crossed = crossed
        self._batches = batches
        self._team = team
        self._fit = _Accumulator(k, device, crossed=crossed)
        self._held_out = _Accumulator(k, device, crossed=crossed)

    def add(
        self,
        rows: Tensor,
        batch: int,
        weights: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Add rows (t, k) of batch number `batch` of all, with weights (t,) or all alike.

        `reference` (t, k) holds the rows that the float model has in their place; it is given if
        and only if the collector is crossed.
        """
        held_out = is_held_out(batch, self._batches)
        (self._held_out if held_out else self._fit).add(rows, weights, reference)

    def finish(self) -> InputStatistics:
        """The averages of everything that was added.

        Rows that only held-out batches had are fitted: there is nothing else to fit.
        """
        fit, held_out = self._fit.pooled(self._team), self._held_out.pooled(self._team)
        if not fit.rows:
            return InputStatistics(held_out.finish(), None)
        return InputStatistics(fit.finish(), held_out.finish() if held_out.rows else None)


def is_held_out(batch: int, batches: int) -> bool:
    """Whether batch number `batch` of `batches` is kept out of the fit."""
    return batches > 1 and (batches - 1 - batch) % HELD_OUT_EVERY == 0
