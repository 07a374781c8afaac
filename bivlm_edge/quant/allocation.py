"""Who gets how many planes: plans of one layer, and the division of one budget over all layers.

The error of a plan is estimated before quantization: per chunk, the compensated energy of its
columns (`StoredProblem.energy`) times the distortion that a Gaussian keeps at that many planes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from bivlm_edge.quant.levels import GAUSSIAN_DISTORTION
from bivlm_edge.quant.packed import (
    CHUNK,
    packed_bytes,
    padded_columns,
    plane_classes,
)
from bivlm_edge.quant.transform import StoredProblem, Variant, transform_problem

VARIANTS = (Variant(64, "chunks"), Variant(128, "chunks"), Variant(0, "columns"))

_STEPS = 12  # boundaries of the planes that are tried per layer


@dataclass(frozen=True, slots=True)
class Plan:
    """Planes of one layer, what they cost, and the error they are expected to leave."""

    plane_columns: tuple[int, ...]
    nbytes: int
    error: float = 0.0

    @classmethod
    def smallest(cls, n: int, k: int) -> Plan:
        """One plane, no transform."""
        planes = (padded_columns(k),)
        return cls(planes, packed_bytes(n, k, planes))


def layer_plans(weight: Tensor, hessian: Tensor, seed: int) -> list[Plan]:
    """The plans of a layer over all variants of its transform.

    Args:
        weight: float32 (n, k).
        hessian: (k, k), scaled so that errors of different layers compare.
        seed: Seed of the signs.
    """
    return [
        plan
        for variant in VARIANTS
        if variant.fits(weight.shape[1])
        for plan in plans(transform_problem(weight, hessian, variant, seed))
    ]


def plans(problem: StoredProblem) -> list[Plan]:
    """All plans of a layer on a grid of plane boundaries."""
    chunks = len(problem.energy)
    kept = np.concatenate([[0.0], np.cumsum(problem.energy)])
    step = -(-chunks // _STEPS)
    grid = sorted({*range(0, chunks, step), chunks})
    found = []
    for second in grid:
        for third in (count for count in grid if count <= second):
            for fourth in (count for count in grid if count <= third):
                counts = [count for count in (chunks, second, third, fourth) if count]
                planes = tuple(count * CHUNK for count in counts)
                bounds = [*counts, 0]
                error = sum(
                    (kept[bounds[c - 1]] - kept[bounds[c]]) * GAUSSIAN_DISTORTION[c]
                    for c in range(1, len(bounds))
                )
                found.append(Plan(planes, plan_bytes(problem, planes), float(error)))
    return found


def plan_bytes(problem: StoredProblem, planes: Sequence[int]) -> int:
    """Bytes of the packed layer; one class of columns needs no order."""
    ordered = len(plane_classes(planes)) > 1
    return packed_bytes(
        problem.n,
        problem.k,
        planes,
        hadamard_block=problem.variant.block,
        order_entries=problem.variant.order_entries(problem.k) if ordered else 0,
    )


def best_plan(problem: StoredProblem, budget: int) -> Plan | None:
    """The plan of least estimated error within `budget` bytes, or None."""
    fitting = [plan for plan in plans(problem) if plan.nbytes <= budget]
    return min(fitting, key=lambda plan: (plan.error, plan.nbytes), default=None)


def lower_hull(candidates: Sequence[Plan]) -> list[Plan]:
    """The plans on the lower convex hull of error over bytes, by rising bytes."""
    hull: list[Plan] = []
    for plan in sorted(candidates, key=lambda plan: (plan.nbytes, plan.error)):
        if hull and plan.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], plan):
            hull.pop()
        hull.append(plan)
    return hull


def _slope(small: Plan, large: Plan) -> float:
    """Error removed per byte added."""
    return (small.error - large.error) / max(large.nbytes - small.nbytes, 1)


def allocate(candidates: Mapping[str, Sequence[Plan]], budget: int) -> dict[str, Plan] | None:
    """Divide `budget` bytes over layers so that the sum of errors is small.

    Walks down the convex hulls by the best ratio of error to bytes, then fills what is left with
    any plan that still fits. None if even the smallest plans do not fit.

    Args:
        candidates: Plans of each layer, errors in one unit over all layers.
        budget: Bytes of all layers together.
    """
    hulls = {name: lower_hull(plans) for name, plans in candidates.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(plan.nbytes for plan in chosen.values())
    if left < 0:
        return None
    steps = [
        (-_slope(small, large), name, small, large)
        for name, hull in hulls.items()
        for small, large in pairwise(hull)
    ]
    steps.sort(key=lambda step: (*step[:2], step[2].nbytes))
    for _, name, small, large in steps:
        cost = large.nbytes - small.nbytes
        if chosen[name] == small and cost <= left:
            chosen[name] = large
            left -= cost
    return _fill(candidates, chosen, left)


def _fill(
    candidates: Mapping[str, Sequence[Plan]], chosen: dict[str, Plan], left: int
) -> dict[str, Plan]:
    """Spend the bytes that are left on the single changes that help most."""
    while True:
        best = heapq.nlargest(
            1,
            (
                (chosen[name].error - plan.error, name, plan)
                for name, options in candidates.items()
                for plan in options
                if plan.nbytes - chosen[name].nbytes <= left and plan.error < chosen[name].error
            ),
            key=lambda change: change[:2],
        )
        if not best:
            return chosen
        _, name, plan = best[0]
        left -= plan.nbytes - chosen[name].nbytes
        chosen[name] = plan
