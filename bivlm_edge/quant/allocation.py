"""Who gets how many planes: plans of layers with the same input, one budget over all of them.

Layers with the same input share a plan, so that one operator can compute them all.

The error of a plan is estimated before quantization: per chunk, the compensated energy of its
columns (`StoredProblem.energy`) times the distortion that a Gaussian keeps at that many planes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bivlm_edge.quant.levels import GAUSSIAN_DISTORTION
from bivlm_edge.quant.packed import (
    CHUNK,
    can_stack,
    packed_bytes,
    plane_classes,
)
from bivlm_edge.quant.transform import (
    CalibratedLayer,
    StoredProblem,
    Variant,
    transform_problems,
)

VARIANTS = (Variant(64, "chunks"), Variant(128, "chunks"), Variant(0, "columns"))
_STEPS = 12  # boundaries of the planes that are tried per group


@dataclass(frozen=True, slots=True)
class Plan:
    """Planes of layers with the same input, what they cost, and the error expected of them."""

    plane_columns: tuple[int, ...]
    nbytes: int
    error: float = 0.0


def variants(k: int, without: Collection[str] = ()) -> list[Variant]:
    """The variants for K = k that are left without some of the stages "hadamard" and "prefix"."""
    return [
        variant._replace(order="none") if "prefix" in without else variant
        for variant in VARIANTS
        if variant.fits(k) and not (variant.block and "hadamard" in without)
    ]


def group_plans(
    layers: Sequence[CalibratedLayer], seed: int, without: Collection[str] = ()
) -> list[Plan]:
    """The plans of layers with the same input over all variants of their transform.

    Args:
        layers: At least one.
        seed: Seed of the signs.
        without: Stages that are switched off.
    """
    return [
        plan
        for variant in variants(layers[0].weight.shape[1], without)
        for plan in plans(transform_problems(layers, variant, seed))
    ]


def plans(problems: Sequence[StoredProblem]) -> list[Plan]:
    """All plans on a grid of plane boundaries; errors are summed over the layers.

    Columns in their own order, unranked, differ by one plane at most: what the budget leaves.
    """
    energy = sum(problem.energy for problem in problems)
    rows, k, variant = [problem.n for problem in problems], problems[0].k, problems[0].variant
    chunks = len(problems[0].energy)
    kept = np.concatenate([[0.0], np.cumsum(energy)])
    step = -(-chunks // _STEPS)
    grid = sorted({*range(0, chunks, step), chunks})
    found = []
    for second in grid:
        for third in (count for count in grid if count <= second):
            for fourth in (count for count in grid if count <= third):
                counts = [count for count in (chunks, second, third, fourth) if count]
                if variant.order == "none" and sum(count < chunks for count in counts) > 1:
                    continue
                planes = tuple(count * CHUNK for count in counts)
                bounds = [*counts, 0]
                error = sum(
                    (kept[bounds[c - 1]] - kept[bounds[c]]) * GAUSSIAN_DISTORTION[c]
                    for c in range(1, len(bounds))
                )
                found.append(Plan(planes, plan_bytes(rows, k, variant, planes), float(error)))
    return found


def plan_bytes(rows: Sequence[int], k: int, variant: Variant, planes: Sequence[int]) -> int:
    """Bytes of packed layers that share planes and transform, stacked into one where they can be.

    One class of columns needs no order.

    Args:
        rows: Output features of each layer.
        k: Input features.
        variant: Transform.
        planes: See FORMAT.md.
    """
    is_ordered = len(plane_classes(planes)) > 1
    return sum(
        packed_bytes(
            n,
            k,
            planes,
            hadamard_block=variant.block,
            order_entries=variant.order_entries(k) if is_ordered else 0,
        )
        for n in ([sum(rows)] if can_stack(rows) else rows)
    )


def best_plan(problems: Sequence[StoredProblem], budget: int) -> Plan | None:
    """The plan of least estimated error within `budget` bytes, or None."""
    fitting = [plan for plan in plans(problems) if plan.nbytes <= budget]
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
    """Divide `budget` bytes over groups of layers so that the sum of errors is small.

    Walks down the convex hulls by the best ratio of error to bytes, then fills what is left with
    any plan that still fits. None if even the smallest plans do not fit.

    Args:
        candidates: Plans of each group, errors in one unit over all groups.
        budget: Bytes of all groups together.
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
