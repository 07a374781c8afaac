"""PB-LLM, BiLLM and ARB-LLM: known errors on Gaussians, their storage formulas, descent."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from bivlm_edge.quant.linalg import damped, inverse_factor, output_energy
from bivlm_edge.quant.methods import _blocks, arb_rc, billm, pb_llm
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int, seed: int = 0) -> Tensor:
    mixed = gaussian(4 * k, k, seed=seed) @ gaussian(k, k, seed=seed + 1)
    return mixed.T @ mixed / len(mixed)


def quantize(method: object, weight: Tensor, hessian: Tensor | None = None) -> DenseWeight:
    metric = torch.eye(weight.shape[1]) if hessian is None else hessian
    [packed] = method.quantize([CalibratedLayer("layer", weight, metric)], LayerOptions())  # type: ignore[attr-defined]
    assert isinstance(packed, DenseWeight)
    return packed


def mean_square(packed: DenseWeight, weight: Tensor) -> float:
    return float((torch.from_numpy(packed.dequantize()) - weight).square().mean())


def plain_signs(weight: Tensor) -> Tensor:
    return weight.abs().mean(dim=1, keepdim=True) * torch.sign(weight)


def test_pb_llm_of_a_gaussian_leaves_the_error_of_its_binary_part() -> None:
    weight = gaussian(256, 1024)
    cut = norm.ppf(0.95)
    share = 0.9
    square = share - 2 * cut * norm.pdf(cut)  # E[w^2; |w| < cut]
    mean = 2 * (norm.pdf(0) - norm.pdf(cut))  # E[|w|; |w| < cut]
    packed = quantize(pb_llm, weight)
    assert mean_square(packed, weight) == pytest.approx(square - mean**2 / share, rel=0.01)


def test_pb_llm_rounds_by_the_formula() -> None:
    weight = gaussian(6, 200)
    values = torch.from_numpy(quantize(pb_llm, weight).dequantize())
    cut = weight.abs().flatten().sort(descending=True).values[120]
    for row, found in zip(weight, values, strict=True):
        binary = row.abs() <= cut
        mean = row[binary].mean()
        scale = (row[binary] - mean).abs().mean()
        expected = mean + scale * torch.sign(row[binary] - mean)
        torch.testing.assert_close(found[binary], expected, rtol=2e-3, atol=1e-4)
        step = (row.abs().max() / 127).half().float()
        codes = found[~binary] / step
        torch.testing.assert_close(codes, (row[~binary] / step).round(), rtol=1e-3, atol=0)


def test_pb_llm_counts_the_map_and_the_floats_that_the_paper_leaves_out() -> None:
    packed = quantize(pb_llm, gaussian(100, 1000))
    assert packed.claimed_bits == pytest.approx(1.7)
    entropy = -0.1 * math.log2(0.1) - 0.9 * math.log2(0.9)
    assert packed.true_bits == pytest.approx(1.7 + entropy + 3 * 16 / 1000)


def test_pb_llm_keeps_the_weights_that_cost_most() -> None:
    weight, hessian = gaussian(20, 100), torch.eye(100)
    weight = torch.sign(weight) * (
        0.5 + torch.rand(20, 100, generator=torch.Generator().manual_seed(1))
    )
    hessian[:10, :10] *= 1e4
    values = torch.from_numpy(quantize(pb_llm, weight, hessian).dequantize())
    fine = (values - weight).abs().amax(dim=0) < 0.02
    assert fine[:10].all()
    assert not fine[10:].any()


def test_billm_of_a_gaussian_is_a_four_level_quantizer() -> None:
    """Lloyd-Max of four levels leaves 0.1175, two residual planes in salient columns 0.1305.

    Scales fitted to samples of 19 to 80 weights lower it by one weight per scale.
    """
    weight = gaussian(512, 512)
    packed = quantize(billm, weight)
    share = packed.claimed_bits - 1
    expected = 0.1175 * (1 - share) + 0.1305 * share
    assert 0.94 * expected < mean_square(packed, weight) < expected


def test_arb_rc_of_a_gaussian_is_better_than_billm_in_its_salient_columns() -> None:
    weight = gaussian(512, 512)
    packed = quantize(arb_rc, weight)
    assert packed.claimed_bits == pytest.approx(1 + salient_share(packed, weight))
    # 4 levels leave 0.1175, two planes in two groups about that of Lloyd-Max with 8 levels, 0.0345
    share = packed.claimed_bits - 1
    assert mean_square(packed, weight) < 0.1175 * (1 - share) + 0.04 * share


def salient_share(packed: DenseWeight, weight: Tensor) -> float:
    """Columns with more than four values in a row, of blocks of 128."""
    return round((packed.claimed_bits - 1) * weight.shape[1]) / weight.shape[1]


@pytest.mark.parametrize("method", [billm, arb_rc, pb_llm])
def test_binary_methods_beat_plain_signs(method: object) -> None:
    weight, hessian = gaussian(64, 384), correlated(384)
    packed = quantize(method, weight, hessian)
    errors = [
        output_energy(rounded - weight, hessian)
        for rounded in (torch.from_numpy(packed.dequantize()), plain_signs(weight))
    ]
    assert errors[0] < 0.5 * errors[1]
    assert packed.claimed_bits < packed.true_bits < 3.8


def test_billm_counts_signs_maps_and_four_floats_per_row_and_block() -> None:
    n, k = 64, 200
    weight = gaussian(n, k)
    packed = quantize(billm, weight)
    salient = round((packed.claimed_bits - 1) * k)
    assert packed.claimed_bits == pytest.approx(1 + salient / k)
    beside = (packed.true_bits - packed.claimed_bits) * n * k
    floats = 4 * 16 * n * 2  # two blocks, the second of 72 columns
    maps = beside - floats
    assert 0.5 * n * (k - salient) < maps < n * (k - salient) + k


def test_arb_rc_counts_six_floats_per_row_and_two_or_four_per_column() -> None:
    n, k = 64, 200
    packed = quantize(arb_rc, gaussian(n, k))
    salient = round((packed.claimed_bits - 1) * k)
    beside = (packed.true_bits - packed.claimed_bits) * n * k
    maps = beside - 16 * (6 * n * 2 + 2 * (k - salient) + 4 * salient)
    assert 0.5 * n * k < maps < n * k + k


@pytest.mark.parametrize("planes", [1, 2])
def test_alternating_refinement_never_raises_the_error(planes: int) -> None:
    values = gaussian(60, 40) * gaussian(60, 1, seed=1).exp() * gaussian(40, seed=2).exp()
    mask = gaussian(60, 40, seed=3) > -0.7
    errors = [
        float(((arb_rc.fit(values, mask, planes, rounds) - values) * mask).square().sum())
        for rounds in range(16)
    ]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-4)  # factors are rounded to float16
    assert errors[-1] < 0.97 * errors[0]


def test_signs_times_rows_times_columns_are_found_exactly() -> None:
    rows, columns = gaussian(50, seed=1).exp(), gaussian(30, seed=2).exp()
    values = torch.outer(rows, columns) * torch.sign(gaussian(50, 30))
    everywhere = torch.ones(50, 30, dtype=torch.bool)
    found = arb_rc.fit(values, everywhere, planes=1)
    torch.testing.assert_close(found, values, rtol=2e-3, atol=0)


@pytest.mark.parametrize("planes", [1, 2])
def test_nothing_is_left_outside_of_a_mask(planes: int) -> None:
    values, mask = gaussian(8, 12), gaussian(8, 12, seed=1) > 0
    mask[3], mask[:, 4] = False, False
    for found in (arb_rc.fit(values, mask, planes), billm.binarize(values, mask, planes)):
        assert (found[~mask] == 0).all()
        assert torch.isfinite(found).all()
        assert (found[mask] != 0).all()


def test_residual_binarization_of_a_row_is_the_formula() -> None:
    row = torch.tensor([[3.0, 1.0, -2.0, -2.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    # scale 2; left 1, -1, 0, 0: scale 0.5
    assert billm.binarize(row, mask, 1).tolist() == [[2.0, 2.0, -2.0, -2.0, 0.0]]
    assert billm.binarize(row, mask, 2).tolist() == [[2.5, 1.5, -1.5, -1.5, 0.0]]


def test_split_is_the_best_of_the_percentiles() -> None:
    values = gaussian(40, 128)
    cuts = torch.quantile(values.abs().flatten(), torch.linspace(0.1, 0.9, 81))

    def error(cut: float) -> float:
        rounded = torch.zeros_like(values)
        for mask in (values.abs() < cut, values.abs() >= cut):
            scale = (values.abs() * mask).sum(1) / mask.sum(1).clamp_min(1)
            rounded += scale[:, None] * torch.sign(values) * mask
        return float((rounded - values).square().sum())

    found = _blocks.magnitude_split(values)
    assert error(found) == pytest.approx(min(error(float(cut)) for cut in cuts), rel=1e-5)


def test_loud_columns_are_salient() -> None:
    values = gaussian(64, 128)
    values[:, [3, 77, 100]] *= 12
    found = _blocks.salient_columns(values, values.square().sum(dim=0))
    assert set(found.tolist()) == {3, 77, 100}


def test_block_compensation_is_the_update_of_optimal_brain_surgery() -> None:
    """The columns behind the first block move to where they are best once that is rounded."""
    weight, hessian = gaussian(5, 160, seed=3).double(), correlated(160).double()
    seen: list[Tensor] = []

    def assign(_: slice, block: Tensor) -> Tensor:
        seen.append(block.clone())
        return block.round()

    _blocks.compensate_blocks(weight, inverse_factor(hessian), assign)
    regular, head = damped(hessian), slice(0, 128)
    error = weight[:, head].round() - weight[:, head]
    # BiLLM pushes each column's error by its row of the factor, as if those before it were final
    factor = inverse_factor(hessian)
    pushed = (error / factor.diagonal()[head]) @ factor[head, 128:]
    torch.testing.assert_close(seen[1], weight[:, 128:] + pushed)
    optimal = -error @ regular[head, 128:] @ torch.linalg.inv(regular[128:, 128:])
    aligned = (pushed * optimal).sum() / (pushed.norm() * optimal.norm())
    assert float(aligned) > 0.5


def test_map_of_a_constant_costs_nothing_and_of_a_coin_one_bit() -> None:
    assert _blocks.map_bits(torch.ones(10, dtype=torch.bool)) == 0
    assert _blocks.map_bits(torch.arange(10) < 5) == 10
    assert _blocks.map_bits(torch.zeros(4, 0, dtype=torch.bool)) == 0
    np.testing.assert_allclose(_blocks.entropy(0.1), 0.469, atol=1e-3)
