"""Rows of a weight divided over processes and threads: every row is solved by itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from bivlm_edge import distributed
from bivlm_edge.quant.packed import PANEL, BinaryWeight
from bivlm_edge.quant.transform import StoredProblem

_LEAST_ROWS = 4 * PANEL  # per thread; fewer do not pay


def solve_in_parts(
    problem: StoredProblem, solve: Callable[[StoredProblem], BinaryWeight]
) -> BinaryWeight:
    """Solve a problem with each process and thread taking a part of the rows, whole panels of them.

    Args:
        problem: The same in all processes.
        solve: Quantizes a problem row by row; planes and transform must not depend on the rows.

    Returns:
        The whole weight, in every process.
    """
    team = distributed.current()
    panels = -(-problem.n // PANEL)
    if team.size == 1 or panels < team.size:
        return _by_threads(problem, solve)
    own = _by_threads(_rows(problem, team.rank, team.size), solve)
    codes = team.concatenate(torch.from_numpy(own.codes)).numpy()
    coefficients = team.concatenate(torch.from_numpy(own.coefficients)).numpy()
    return replace(own, n=problem.n, codes=codes, coefficients=coefficients)


def _rows(problem: StoredProblem, part: int, parts: int) -> StoredProblem:
    """One of `parts` parts of the rows."""
    panels = -(-problem.n // PANEL)
    first = PANEL * (panels * part // parts)
    last = min(PANEL * (panels * (part + 1) // parts), problem.n)
    return replace(problem, n=last - first, weight_t=problem.weight_t[:, first:last].contiguous())


def _by_threads(
    problem: StoredProblem, solve: Callable[[StoredProblem], BinaryWeight]
) -> BinaryWeight:
    """Solve parts of the rows at once, each with one thread of torch.

    The products of one column are too small to be divided by torch itself.
    """
    threads = torch.get_num_threads()
    parts = min(threads, problem.n // _LEAST_ROWS)
    if parts < 2:
        return solve(problem)
    try:
        with ThreadPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            solved = list(pool.map(solve, [_rows(problem, part, parts) for part in range(parts)]))
    finally:
        torch.set_num_threads(threads)
    codes = np.concatenate([weight.codes for weight in solved])
    coefficients = np.concatenate([weight.coefficients for weight in solved])
    return replace(solved[0], n=problem.n, codes=codes, coefficients=coefficients)
