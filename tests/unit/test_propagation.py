"""Targets behind quantized layers: the known optimum, the held-out step, and nothing to correct."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bivlm_edge.calibration.moments import InputStatistics, StatisticsCollector
from bivlm_edge.quant.propagation import second_moment, target_weight, varies

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


def test_constant_inputs_do_not_vary() -> None:
    for value in (0.0, 1.0, 0.1):
        constant = torch.full((ROWS, K), value)
        assert not varies(collect((constant, constant), (constant, constant)).fit)
    assert varies(collect(inputs(2), inputs(3)).fit)


@pytest.mark.parametrize("ratio", [1e-6, 1e-4, 1e-2])
def test_small_changes_of_constant_inputs_are_made_good(
    ratio: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Channels whose variance is `ratio` of their second moment, most of it shared."""
    k, batches = 64, 8
    collector = StatisticsCollector(k, batches, crossed=True)
    mixing, rows = drawn(4, k, seed=5), []
    for batch in range(batches):
        changes = drawn(1024, 4, seed=batch) @ mixing + 1e-3 * drawn(1024, k, seed=20 + batch)
        f = 3.0 + 3.0 * ratio**0.5 * changes
        x = 3.0 + 2.0 * ratio**0.5 * changes
        collector.add(x, batch, None, f)
        rows.append((f, x))
    statistics = collector.finish()
    fit = statistics.fit
    x = torch.cat([x for _, x in rows[:-1]]).double()
    centred = x - x.mean(dim=0)
    expected = centred.T @ centred / len(x)
    found = second_moment(fit, fit, is_centred=True)
    assert varies(fit)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.max()))
    weight = drawn(N, k, seed=1)
    target = target_weight(weight, statistics, is_centred=True)
    assert not caplog.records  # 1 % of damping is enough
    alike = torch.ones(1024)
    before, after = (error(t, weight, rows[-1], alike, center=True) for t in (weight, target))
    assert after < 0.1 * before
