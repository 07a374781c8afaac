"""One budget divided over layers: exact bytes, convex hulls, and what gets planes first."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bivlm_edge.quant.allocation import (
    VARIANTS,
    Plan,
    allocate,
    best_plan,
    group_plans,
    lower_hull,
    plans,
)
from bivlm_edge.quant.linalg import output_energy
from bivlm_edge.quant.packed import packed_bytes
from bivlm_edge.quant.transform import (
    CalibratedLayer,
    StoredProblem,
    Variant,
    transform_problems,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int, loud: int = 0) -> Tensor:
    rows = gaussian(4 * k, k, seed=1) @ (torch.eye(k) + 0.1 * gaussian(k, k, seed=2))
    rows[:, :loud] *= 10
    return rows.T @ rows / len(rows)


def stored(weight: Tensor, hessian: Tensor, variant: Variant) -> list[StoredProblem]:
    return transform_problems([CalibratedLayer("layer", weight, hessian)], variant, seed=0)


def test_plans_fall_in_planes_and_cost_what_the_format_says() -> None:
    problems = stored(gaussian(40, 192), correlated(192), Variant(64, "chunks"))
    found = {plan.plane_columns: plan for plan in plans(problems)}
    assert len(found) == 20  # boundaries 3 >= a >= b >= c >= 0
    assert (192,) in found
    assert (192, 192, 192, 192) in found
    for planes, plan in found.items():
        assert list(planes) == sorted(planes, reverse=True)
        entries = 3 if len(set(planes)) > 1 or planes[-1] < 192 else 0
        assert plan.nbytes == packed_bytes(
            40, 192, planes, hadamard_block=64, order_entries=entries
        )


def test_wide_layers_are_planned_on_a_grid() -> None:
    weight, hessian = gaussian(16, 64 * 30), torch.eye(64 * 30)
    found = plans(stored(weight, hessian, Variant(0, "chunks")))
    assert len(found) < 600
    assert any(plan.plane_columns == (1920, 1920) for plan in found)


def test_estimate_of_white_inputs_is_the_gaussian_distortion() -> None:
    weight = gaussian(64, 128)
    problems = stored(weight, torch.eye(128), Variant(64, "chunks"))
    energy = output_energy(weight, torch.eye(128))
    by_planes = {plan.plane_columns: plan.error / energy for plan in plans(problems)}
    # damping adds 1 % to every conditional variance
    assert by_planes[(128,)] == pytest.approx(0.3634, rel=0.02)
    assert by_planes[(128, 128)] == pytest.approx(0.1175, rel=0.02)
    assert by_planes[(128, 64)] == pytest.approx((0.3634 + 0.1175) / 2, rel=0.05)


def test_loud_columns_come_first_and_get_the_planes() -> None:
    weight, hessian = gaussian(64, 256), correlated(256, loud=30)
    [problem] = stored(weight, hessian, Variant(0, "columns"))
    assert problem.order is not None
    assert sorted(problem.order[:30].tolist()) == list(range(30))
    plan = best_plan([problem], int(2.0 * 64 * 256 / 8))
    assert plan is not None
    assert len(plan.plane_columns) > 2
    assert plan.plane_columns[-1] == 64


def test_hull_is_convex_and_dominates_every_plan() -> None:
    candidates = group_plans(
        [CalibratedLayer("layer", gaussian(64, 256), correlated(256, loud=9))], seed=0
    )
    hull = lower_hull(candidates)
    slopes = [(a.error - b.error) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes, reverse=True)
    assert all(slope > 0 for slope in slopes)
    for plan in candidates:
        assert (
            any(
                a.nbytes <= plan.nbytes <= b.nbytes
                and plan.error
                >= a.error
                + (b.error - a.error) * (plan.nbytes - a.nbytes) / (b.nbytes - a.nbytes)
                - 1e-9 * hull[0].error
                for a, b in itertools.pairwise(hull)
            )
            or plan.nbytes > hull[-1].nbytes
        )


def toy_candidates() -> dict[str, list[Plan]]:
    steps = [(100, 8.0), (150, 4.0), (200, 2.0), (300, 1.0)]
    return {
        "calm": [Plan((64,), nbytes, error) for nbytes, error in steps],
        "delicate": [Plan((64,), nbytes, 10 * error) for nbytes, error in steps],
        "odd": [Plan((64,), 90, 6.0), Plan((64,), 170, 5.5), Plan((64,), 333, 0.5)],
    }


@pytest.mark.parametrize("budget", range(290, 960, 23))
def test_allocation_keeps_the_budget_and_is_close_to_the_best_of_all(budget: int) -> None:
    candidates = toy_candidates()
    chosen = allocate(candidates, budget)
    assert chosen is not None
    assert sum(plan.nbytes for plan in chosen.values()) <= budget
    best = min(
        sum(plan.error for plan in choice)
        for choice in itertools.product(*candidates.values())
        if sum(plan.nbytes for plan in choice) <= budget
    )
    # greedy on hulls is off by less than one step of one layer
    assert sum(plan.error for plan in chosen.values()) <= best + 6.0


def test_delicate_layers_get_bytes_first() -> None:
    chosen = allocate(toy_candidates(), 400)
    assert chosen is not None
    assert chosen["delicate"].nbytes == 200
    assert chosen["calm"].nbytes == 100


def test_nothing_that_fits_and_helps_is_left_unspent() -> None:
    candidates = toy_candidates()
    chosen = allocate(candidates, 700)
    assert chosen is not None
    left = 700 - sum(plan.nbytes for plan in chosen.values())
    for name, plan in chosen.items():
        for other in candidates[name]:
            assert not (other.error < plan.error and other.nbytes - plan.nbytes <= left)


def test_budget_below_the_smallest_plans_has_no_allocation() -> None:
    assert allocate(toy_candidates(), 289) is None


def test_variants_that_do_not_divide_the_width_are_left_out() -> None:
    assert [v.block for v in VARIANTS if v.fits(192)] == [64, 0]
    assert [v.block for v in VARIANTS if v.fits(250)] == [64, 128, 0]
