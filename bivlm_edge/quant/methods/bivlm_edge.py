"""The product's method: bit planes by saliency, compensated, refined in the Hessian metric.

Per variant of the input transform: planes under the byte budget, joint row coefficients,
compensated rounding in activation order, then rounds of refitted coefficients and coordinate
descent over the signs, the last ones with coefficients already in float16. Of the variants whose
estimated error is near the least, the one that has the least error on held-out inputs after one
round wins, and gets the others. Layers with the same input share variant and planes.

Stages that can be switched off, and what takes their place:

    importance       all tokens count alike
    hadamard         no variant is rotated
    prefix           columns stay where they are and differ by one plane at most
    model-budget     layers with the same input have --bits to themselves
    joint-fit        coefficients are those of a Gaussian of the row's weighted mean square
    compensation     columns are rounded to the nearest level, errors stay where they are made
    act-order        columns are rounded in the order in which they are stored
    refit            coefficients stay as fitted to the weights, before rounding
    descent          signs stay as the compensated rounding leaves them
    bias-correction  biases stay; Hessians are not centred
    propagation      layers approximate their float weights, not their float outputs
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bivlm_edge.errors import RequestError
from bivlm_edge.quant.allocation import Plan, best_plan, plan_bytes, variants
from bivlm_edge.quant.levels import (
    Levels,
    fit_coefficients,
    gaussian_coefficients,
    make_levels,
)
from bivlm_edge.quant.linalg import compensate, output_energy
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.packed import (
    BinaryWeight,
    PlaneClass,
    coefficients_per_row,
    pack_coefficients,
    pack_planes,
    padded_columns,
    plane_classes,
)
from bivlm_edge.quant.parallel import solve_in_parts
from bivlm_edge.quant.refine import Assignment, descend, refit
from bivlm_edge.quant.transform import (
    CalibratedLayer,
    StoredProblem,
    Variant,
    transform_problems,
)

BIT_RANGE = (1.0, 4.0)
OPTIONS = ("tune",)
NEEDS = ("hessian", "importance", "budget", "bias", "propagation")
STAGES = (
    "importance",
    "hadamard",
    "prefix",
    "model-budget",
    "joint-fit",
    "compensation",
    "act-order",
    "refit",
    "descent",
    "bias-correction",
    "propagation",
)

_ROUNDS = 4
_SWEEPS = 4
_WORTH_TRYING = 1.3  # estimates were within 20 % of the measured errors


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[BinaryWeight]:
    """Quantize layers with the same input by the best variant within the budget.

    The weights agree in all but rows: planes, transform, signs and order are the same.

    Args:
        layers: At least one.
        options: `byte_budget`, the most bytes of all layers together as `plan_bytes` counts them,
            `seed` of the signs, and `without`, the stages that are switched off.

    Raises:
        RequestError: not even one plane fits the budget.
    """

    def solve(trial: tuple[Plan, list[StoredProblem]], rounds: int) -> list[BinaryWeight]:
        plan, problems = trial
        quantize = partial(quantize_planes, plan=plan, without=options.without, rounds=rounds)
        return [solve_in_parts(problem, quantize) for problem in problems]

    k = layers[0].weight.shape[1]
    byte_budget, seed = options.byte_budget, options.seed
    act_order = "act-order" not in options.without
    trials = [
        (plan, problems)
        for variant in variants(k, options.without)
        for problems in [transform_problems(layers, variant, seed, act_order=act_order)]
        if (plan := best_plan(problems, byte_budget)) is not None
    ]
    if not trials:
        rows = [len(layer.weight) for layer in layers]
        shapes = ", ".join(f"'{layer.name}' ({len(layer.weight)} x {k})" for layer in layers)
        raise RequestError(
            f"{shapes} does not fit {byte_budget} bytes: one plane needs "
            f"{plan_bytes(rows, k, Variant(0, 'none'), [padded_columns(k)])}. Raise --bits."
        )
    limit = _WORTH_TRYING * min(plan.error for plan, _ in trials)
    trials = [trial for trial in trials if trial[0].error <= limit]
    if len(trials) > 1:
        trials = [min(trials, key=lambda trial: _held_out_error(layers, solve(trial, rounds=1)))]
    return solve(trials[0], _ROUNDS)


def _held_out_error(layers: Sequence[CalibratedLayer], weights: Sequence[BinaryWeight]) -> float:
    """Output error of all layers on inputs that they were not fitted to, where there are any."""
    return sum(
        output_energy(
            torch.from_numpy(weight.dequantize()) - layer.weight,
            layer.hessian if layer.held_out is None else layer.held_out,
        )
        for layer, weight in zip(layers, weights, strict=True)
    )


def quantize_planes(
    problem: StoredProblem, plan: Plan, without: Collection[str] = (), rounds: int = _ROUNDS
) -> BinaryWeight:
    """Quantize a transformed layer with the planes of `plan`, without the stages named.

    `rounds` counts refits and descents, the last of them with coefficients in float16.
    """
    columns = len(problem.weight_t)
    classes = [
        group._replace(stop=min(group.stop, columns))
        for group in plane_classes(plan.plane_columns)
        if group.start < columns
    ]
    assignment = _assign(problem, classes, _initial(problem, classes, without), without)
    for step in range(rounds):
        if "refit" not in without:
            assignment.alpha = refit(assignment, problem.weight_t, problem.hessian)
        if step == rounds - 1:
            assignment.alpha = assignment.alpha.half().float()
        if "descent" not in without:
            descend(assignment, problem.weight_t, problem.hessian, _SWEEPS)
    return _pack(problem, plan, assignment)


def _initial(
    problem: StoredProblem, classes: Sequence[PlaneClass], without: Collection[str]
) -> Tensor:
    """Coefficients that fit each class of columns by itself, columns weighted by 1 / U_jj."""
    weights = torch.empty(len(problem.visit))
    weights[problem.visit] = (1 / problem.factor.diagonal()).float()
    parts = []
    for group in classes:
        columns = slice(group.start, group.stop)
        weight = problem.weight_t[columns].T.contiguous()
        alpha = gaussian_coefficients(weight, group.planes, weights[columns])
        if "joint-fit" not in without:
            alpha = fit_coefficients(weight, alpha, weights[columns])
        parts.append(alpha)
    return torch.cat(parts, dim=1)


def _assign(
    problem: StoredProblem,
    classes: Sequence[PlaneClass],
    alpha: Tensor,
    without: Collection[str],
) -> Assignment:
    """Codes by compensated rounding with fixed coefficients."""
    levels = [make_levels(alpha[:, group.slot : group.slot + group.planes]) for group in classes]
    targets = problem.weight_t
    if "compensation" not in without:
        targets = _compensated(problem, classes, levels)
    codes = [
        table.nearest_codes(targets[group.start : group.stop])
        for group, table in zip(classes, levels, strict=True)
    ]
    return Assignment(classes, torch.cat(codes), alpha)


def _compensated(
    problem: StoredProblem, classes: Sequence[PlaneClass], levels: Sequence[Levels]
) -> Tensor:
    """The weight rounded in the order of `visit`, each error pushed onto the columns to come."""
    tables = [
        table
        for group, table in zip(classes, levels, strict=True)
        for _ in range(group.start, group.stop)
    ]
    visited = [tables[j] for j in problem.visit.tolist()]
    rounded = torch.empty_like(problem.weight_t)
    rounded[problem.visit] = compensate(
        problem.weight_t[problem.visit],
        problem.factor,
        lambda position, column: visited[position].round(column),
    )
    return rounded


def _pack(problem: StoredProblem, plan: Plan, assignment: Assignment) -> BinaryWeight:
    n, columns = problem.n, len(problem.weight_t)
    alpha = np.zeros((n, coefficients_per_row(plan.plane_columns)), dtype=np.float16)
    alpha[:] = assignment.alpha.half().numpy()
    codes = np.zeros((n, plan.plane_columns[0]), dtype=np.uint8)
    codes[:, :columns] = assignment.codes.T.numpy()
    order = problem.order
    if len(plane_classes(plan.plane_columns)) == 1:  # all columns are alike: back to their places
        codes[:, problem.permutation] = codes.copy()
        order = None
    return BinaryWeight(
        n=n,
        k=problem.k,
        plane_columns=plan.plane_columns,
        codes=pack_planes(
            [
                (codes[:, :width] >> p & 1).astype(np.bool_)
                for p, width in enumerate(plan.plane_columns)
            ]
        ),
        coefficients=pack_coefficients(alpha),
        hadamard_block=problem.variant.block,
        signs=problem.signs,
        order=order,
    )
