"""Targets behind quantized layers: the known optimum, the held-out step, and nothing to correct."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bivlm_edge.calibration.moments import InputStatistics, StatisticsCollector
from bivlm_edge.quant.propagation import second_moment, target_weight

K, N, ROWS = 24, 10, 4000


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of the float model, and what a mixing error and noise make of them."""
    f = drawn(ROWS, K, seed=seed) @ (torch.eye(K) + 0.2 * drawn(K, K, seed=50)) + mean
    return f, f @ (torch.eye(K) + 0.05 * drawn(K, K, seed=51)) + 0.2 * drawn(ROWS, K, seed=seed + 9)


def collect(
    fit: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], weights: Tensor | None = None
) -> InputStatistics:
    collector = StatisticsCollector(K, 2, crossed=True)
    for batch, (f, x) in enumerate((fit, held_out)):
        collector.add(x, batch, weights, f)
    return collector.finish()


def error(
    target: Tensor, weight: Tensor, rows: tuple[Tensor, Tensor], weights: Tensor, *, center: bool
) -> float:
    """Weighted E|T x - W f|^2, after the best bias if `center`."""
    f, x = rows
    difference = (x @ target.T - f @ weight.T).double()
    share = (weights / weights.sum()).double()[:, None]
    if center:
        difference = difference - (share * difference).sum(dim=0)
    return float((share * difference**2).sum())


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("weights", [torch.ones(ROWS), drawn(ROWS, seed=8).abs()])
def test_target_is_least_squares_on_what_the_float_layer_puts_out(
    is_centred: bool, weights: Tensor
) -> None:
    weight = drawn(N, K, seed=1)
    fit, held_out = inputs(2, mean=1.0), inputs(3, mean=1.0)
    found = target_weight(weight, collect(fit, held_out, weights), is_centred)
    f, x = (rows.double() for rows in fit)
    if is_centred:
        share = (weights / weights.sum()).double()[:, None]
        f, x = (rows - (share * rows).sum(dim=0) for rows in (f, x))
    root = weights.double().sqrt()[:, None]
    best = torch.linalg.lstsq(root * x, root * (f @ weight.double().T)).solution.T.float()
    least, reached = (error(t, weight, fit, weights, center=is_centred) for t in (best, found))
    before, after = (
        error(t, weight, held_out, weights, center=is_centred) for t in (weight, found)
    )
    assert reached < least + 0.03 * (before - least)  # what the damping of 1 % leaves
    assert after < 0.7 * before


def test_equal_inputs_leave_the_weight() -> None:
    weight = drawn(N, K, seed=1)
    f, _ = inputs(2)
    for is_centred in (False, True):
        found = target_weight(weight, collect((f, f), (f, f)), is_centred)
        torch.testing.assert_close(found, weight, rtol=0, atol=1e-5)
    statistics = collect((f, f), (f, f))
    without = InputStatistics(replace(statistics.fit, cross=None), statistics.held_out)
    assert target_weight(weight, without, is_centred=False) is weight


def test_correction_that_does_not_hold_on_other_inputs_is_left_out() -> None:
    weight = drawn(N, K, seed=1)
    f, x = inputs(2)
    opposite = 2 * x - f  # what is made good on the fitted inputs is doubled here
    found = target_weight(weight, collect((f, x), (opposite, x)), is_centred=False)
    assert torch.equal(found, weight)


def test_inputs_that_are_always_zero_leave_the_weight() -> None:
    weight = drawn(N, K, seed=1)
    zero = torch.zeros(ROWS, K)
    statistics = collect((zero, zero), (zero, zero))
    assert torch.equal(target_weight(weight, statistics, is_centred=True), weight)


def test_second_moment_of_constant_inputs_is_not_centred() -> None:
    constant = torch.ones(ROWS, K)
    moments = collect((constant, constant), (constant, constant)).fit
    assert torch.equal(second_moment(moments, moments, is_centred=True), moments.hessian)
