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


@pytest.mark.parametrize(("n_uns", "expected"), [(5, 3.39), (6, 3.65)])
def test_true_bits_count_the_class_of_each_weight(n_uns: int, expected: float) -> None:
    assert bivlm_paper.true_bits(4096, 4096, 0.01, n_uns) == pytest.approx(expected, abs=5e-3)


def test_unsalient_weights_take_the_mean_magnitude_of_their_group() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, LayerOptions(part="decoder", n_uns=2))
    values = torch.from_numpy(packed.dequantize())
    magnitudes = np.unique(values.abs().numpy())
    p_sal = packed.claimed_bits - 1 - 16 * (2 + 64) / (64 * 128)
    assert 1e-4 <= p_sal <= 0.01
    split = bivlm_paper.thresholds(p_sal, 2)
    distance = (weight - weight.mean()).abs() / weight.std()
    small = distance <= split[0]
    scale = weight[small].abs().mean().half().float()
    assert (values[small].abs() == scale).all()
    assert (torch.sign(values[small]) == torch.sign(weight[small])).all()
    assert len(magnitudes) <= 2 + 64 * 4


@pytest.mark.parametrize(("part", "limit"), [("vision", 0.05), ("projector", 0.01)])
def test_salient_share_stays_below_the_limit_of_its_part(part: str, limit: float) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) ** 3
    packed = quantize(weight, LayerOptions(part=part))
    p_sal = packed.claimed_bits - 1 - 16 * (5 + 32) / (32 * 256)
    assert 0 < p_sal <= limit


def test_salient_centers_follow_equation_14() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 0.1]])
    salient = torch.tensor([[True, True, True, False]])
    found = bivlm_paper.round_salient(weight, salient)
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
    np.testing.assert_allclose(found[0, :3].numpy(), expected, rtol=1e-5)


def test_constant_matrix_is_survived() -> None:
    packed = quantize(torch.zeros(16, 64), LayerOptions())
    assert (packed.dequantize() == 0).all()
