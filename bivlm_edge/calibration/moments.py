"""Second moments and means of a layer's inputs, a part of the batches held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bivlm_edge.distributed import Team

ALONE = Team()
HELD_OUT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighted averages over input rows x.

    Attributes:
        hessian: E[x x^T], float64 (k, k).
        mean: E[x], float64 (k,).
        rows: Number of rows.
        weight: Sum of their weights; the number of rows where all weigh 1.
    """

    hessian: Tensor
    mean: Tensor
    rows: int
    weight: float

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
    """Sums of one half of the rows, in float64."""

    def __init__(self, k: int) -> None:
        self.squares = torch.zeros(k, k, dtype=torch.float64)
        self.sums = torch.zeros(k, dtype=torch.float64)
        self.rows = 0
        self.weight = 0.0

    def add(self, rows: Tensor, weights: Tensor | None) -> None:
        rows = rows.float()
        weighted = rows if weights is None else rows * weights.float()[:, None]
        self.squares += (weighted.T @ rows).double()
        self.sums += weighted.sum(dim=0, dtype=torch.float64)
        self.rows += len(rows)
        self.weight += float(len(rows)) if weights is None else float(weights.double().sum())

    def pooled(self, team: Team) -> _Accumulator:
        """The sums over all processes."""
        if team.size == 1:
            return self
        counts = torch.tensor([float(self.rows), self.weight], dtype=torch.float64)
        parts = [self.squares.reshape(-1), self.sums, counts]
        lengths = [len(part) for part in parts]
        squares, sums, counts = torch.split(team.sum(torch.cat(parts)), lengths)
        whole = _Accumulator(0)
        whole.squares, whole.sums = squares.reshape(self.squares.shape), sums
        whole.rows, whole.weight = int(counts[0]), float(counts[1])
        return whole

    def finish(self) -> Moments:
        total = self.weight if self.weight > 0 else 1.0
        squares = (self.squares + self.squares.T) / (2 * total)
        return Moments(squares, self.sums / total, self.rows, self.weight)


class StatisticsCollector:
    """Adds up rows batch by batch; every tenth batch, and always the last, is held out.

    Args:
        k: Width of a row.
        batches: Number of batches that will come, to all processes together; with only one
            nothing is held out.
        team: The processes that take the batches in turn.
    """

    def __init__(self, k: int, batches: int, team: Team = ALONE) -> None:
        self._batches = batches
        self._team = team
        self._fit = _Accumulator(k)
        self._held_out = _Accumulator(k)

    def add(self, rows: Tensor, batch: int, weights: Tensor | None = None) -> None:
        """Add rows (t, k) of batch number `batch` of all, with weights (t,) or all alike."""
        held_out = is_held_out(batch, self._batches)
        (self._held_out if held_out else self._fit).add(rows, weights)

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
