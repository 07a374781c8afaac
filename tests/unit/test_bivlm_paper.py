"""Bi-VLM as published: its quantiles, its storage formulas, and algorithm 1 by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from bivlm_edge.quant.methods import bivlm_paper
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight


def quantize(weight: Tensor, options: LayerOptions) -> DenseWeight:
    layer = CalibratedLayer("layer", weight, torch.eye(weight.shape[1]))
    [packed] = bivlm_paper.quantize([layer], options)
    return packed


def test_thresholds_cut_a_gaussian_into_equal_groups() -> None:
    p_sal, n_uns = 0.01, 5
    found = bivlm_paper.thresholds(p_sal, n_uns)
    expected = norm.ppf((1 + np.arange(1, 6) * (1 - p_sal) / n_uns) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    inside = np.diff(2 * norm.cdf([0.0, *found]) - 1)
    np.testing.assert_allclose(inside, (1 - p_sal) / n_uns, rtol=1e-9)


def test_claimed_bits_are_the_papers_1_014() -> None:
    assert bivlm_paper.claimed_bits(4096, 4096, 0.01, 5) == pytest.approx(1.014, abs=5e-4)


@pytest.mark.parametrize(("n_uns", "expected"), [(1, 1.091), (2, 2.081), (5, 3.39), (6, 3.65)])
def test_true_bits_count_the_class_of_each_weight(n_uns: int, expected: float) -> None:
    shares = [0.99 / n_uns] * n_uns + [0.01]
    scales = 16 / 4096 if n_uns < 5 else 0  # the table's first rows leave out the row scales
    found = bivlm_paper.true_bits(4096, 4096, shares) - scales
    assert found == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(
    ("n_uns", "p_sal", "fitted", "literal"),
    [
        (1, 0.01, 0.3185, None),
        (1, 0.05, 0.2347, None),
        (2, 0.0, 0.1394, 0.1394),
        (3, 0.0, 0.0806, 0.0806),
        (4, 0.0, 0.0550, 0.0550),
        (5, 0.0, 0.0410, 0.0410),
        (5, 0.01, 0.0278, (0.038, 0.040)),
        (5, 0.05, 0.0165, (0.049, 0.060)),
        (6, 0.01, 0.0209, None),
    ],
)
def test_error_on_a_gaussian_is_that_of_theory(
    n_uns: int, p_sal: float, fitted: float, literal: float | tuple[float, float] | None
) -> None:
    """ALGORITHMS.md 4.2: the literal equation 14 is no better than no salient weights at all."""
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(3))

    def error(*, exact: bool) -> float:
        rounded = bivlm_paper.Partition(weight, n_uns, exact=exact).round(p_sal)
        return float((rounded - weight).square().mean() / weight.square().mean())

    assert error(exact=False) == pytest.approx(fitted, rel=0.015)
    if isinstance(literal, tuple):
        assert literal[0] < error(exact=True) < literal[1]
    elif literal is not None:
        assert error(exact=True) == pytest.approx(literal, rel=0.015)


@pytest.mark.parametrize("exact", [False, True])
def test_error_that_is_searched_is_the_error_that_is_left(exact: bool) -> None:
    weight = torch.randn(96, 300, generator=torch.Generator().manual_seed(2)) ** 3 + 0.1
    partition = bivlm_paper.Partition(weight, 3, exact=exact)
    for p_sal in (0.0, 0.003, 0.04):
        difference = partition.round(p_sal) - weight
        left = float(difference.square().sum() / weight.square().sum())
        assert partition.error(p_sal) == pytest.approx(left, rel=2e-3)


def test_groups_are_those_of_equation_6() -> None:
    weight = torch.randn(32, 100, generator=torch.Generator().manual_seed(4)) + 0.3
    partition = bivlm_paper.Partition(weight, 4, exact=False)
    bounds = bivlm_paper.thresholds(0.02, 4)
    distance = (weight - weight.mean()).abs() / weight.std(correction=0)
    edges = [0.0, *bounds, math.inf]
    counts = [int(((distance > low) & (distance <= high)).sum()) for low, high in pairwise(edges)]
    assert [stop - start for start, stop in partition.groups(0.02)] == counts


def test_fitted_codes_recover_codes_of_their_kind() -> None:
    generator = torch.Generator().manual_seed(6)
    scale = torch.rand(20, generator=generator) + 0.5
    rows = torch.arange(20).repeat_interleave(40)
    magnitudes = torch.tensor([1.0, 2.5])[torch.randint(0, 2, (800,), generator=generator)]
    signs = torch.randint(0, 2, (800,), generator=generator) * 2.0 - 1
    values = scale[rows] * magnitudes * signs
    found, codes = bivlm_paper.fitted_codes(values, rows, 20)
    torch.testing.assert_close(found[rows] * codes, values, rtol=1e-3, atol=0)


def test_unsalient_weights_take_the_mean_magnitude_of_their_group() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    p_sal = 0.008
    values = bivlm_paper.Partition(weight, 2, exact=False).round(p_sal)
    magnitudes = np.unique(values.abs().numpy())
    split = bivlm_paper.thresholds(p_sal, 2)
    distance = (weight - weight.mean()).abs() / weight.std(correction=0)
    small = distance <= split[0]
    scale = weight[small].abs().mean().half().float()
    assert (values[small].abs() == scale).all()
    assert (torch.sign(values[small]) == torch.sign(weight[small])).all()
    assert len(magnitudes) <= 2 + 64 * 2


@pytest.mark.parametrize(("part", "limit"), [("vision", 0.05), ("projector", 0.01)])
def test_salient_share_is_the_limit_of_its_part_where_more_would_help(
    part: str, limit: float
) -> None:
    places = torch.randperm(32 * 256, generator=torch.Generator().manual_seed(1))
    weight = torch.from_numpy(norm.ppf((places.numpy() + 0.5) / (32 * 256))).float()
    packed = quantize(weight.reshape(32, 256), LayerOptions(part=part))
    salient = packed.claimed_bits - 1 - 16 * (5 + 32) / (32 * 256)
    assert 0.9 * limit < salient <= limit + 1e-3  # the weights' spread is 0.04 % below 1


def test_salient_centers_follow_equation_14() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 0.1]])
    salient = torch.tensor([[True, True, True, False]])
    rows = torch.zeros(3, dtype=torch.int64)
    scales, codes = bivlm_paper.codes_of_equation_14(weight[salient], rows, 1)
    found = scales.half().float() * codes
    # the loop starts at the mean magnitude, 3, with clipped codes 1, -1, 2/3; twenty rounds by hand
    binary, scale = [1.0, -1.0, 1.0], 0.0
    for _ in range(20):
        scale = sum(w * b for w, b in zip([4.0, -3.0, 2.0], binary, strict=True)) / sum(
            b * b for b in binary
        )
        binary = [max(-1.0, min(1.0, w / scale)) for w in [4.0, -3.0, 2.0]]
    mean = sum(binary) / 3
    deviation = math.sqrt(sum((b - mean) ** 2 for b in binary) / 3)
    edges = [
        mean + deviation * np.sign(d) * (1.4 * math.exp(abs(d)) - 1) for d in (-1, -0.5, 0, 0.5, 1)
    ]
    centers = [(a + b) / 2 for a, b in pairwise(edges)]
    expected = [float(np.float16(scale)) * min(centers, key=lambda c: abs(c - b)) for b in binary]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_constant_matrix_is_survived() -> None:
    packed = quantize(torch.zeros(16, 64), LayerOptions())
    assert (packed.dequantize() == 0).all()
