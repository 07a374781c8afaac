"""Rows of a weight divided over processes: every row is solved by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bivlm_edge import distributed
from bivlm_edge.quant.packed import PANEL, BinaryWeight
from bivlm_edge.quant.transform import StoredProblem


def solve_rows(
    problem: StoredProblem, solve: Callable[[StoredProblem], BinaryWeight]
) -> BinaryWeight:
    """Solve a problem with each process taking a part of the rows, whole panels of them.

    Args:
        problem: The same in all processes.
        solve: Quantizes a problem row by row; planes and transform must not depend on the rows.

    Returns:
        The whole weight, in every process.
    """
    team = distributed.current()
    panels = -(-problem.n // PANEL)
    if team.size == 1 or panels < team.size:
        return solve(problem)
    bounds = [PANEL * (panels * part // team.size) for part in range(team.size)] + [problem.n]
    rows = slice(bounds[team.rank], bounds[team.rank + 1])
    own = solve(
        replace(
            problem,
            n=rows.stop - rows.start,
            weight_t=problem.weight_t[:, rows].contiguous(),
        )
    )
    codes = team.concatenate(torch.from_numpy(own.codes)).numpy()
    coefficients = team.concatenate(torch.from_numpy(own.coefficients)).numpy()
    return replace(own, n=problem.n, codes=codes, coefficients=coefficients)
