"""Bi-VLM as published: Gaussian-quantile partition, binary unsalient and 2-bit salient weights.

Bi-VLM, arXiv 2509.18763v1, 2025 (AAAI-26): equations 2 to 20, algorithms 1 to 3. Data-free. What
the paper leaves open: 20 iterations of algorithm 1, p_max 1 % for the projector, thresholds on
|w - mean|.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight

MIN_SALIENT = 1e-4
MAX_SALIENT = {"vision": 0.05, "projector": 0.01, "decoder": 0.01}
_ALPHA = 1.4
_ITERATIONS = 20
_SALIENT_BITS = 2


def thresholds(p_sal: float, n_uns: int) -> list[float]:
    """z(1) .. z(n_uns) of equation 5, in standard deviations."""
    p_uns = (1 - p_sal) / n_uns
    return [float(norm.ppf((1 + k * p_uns) / 2)) for k in range(1, n_uns + 1)]


def claimed_bits(n: int, k: int, p_sal: float, n_uns: int) -> float:
    """Bits per weight as appendix A.1.1 counts them: without the class of each weight."""
    return 1 + (_SALIENT_BITS - 1) * p_sal + 16 * (n_uns + n) / (n * k)


def true_bits(n: int, k: int, p_sal: float, n_uns: int) -> float:
    """Bits per weight with the classes entropy-coded, without which nothing can be decoded."""
    p_uns = (1 - p_sal) / n_uns
    entropy = -(1 - p_sal) * math.log2(p_uns) - p_sal * math.log2(p_sal)
    return claimed_bits(n, k, p_sal, n_uns) + entropy


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[DenseWeight]:
    """Search the salient share by Brent's method (algorithm 3) and round; the Hessian is unused."""
    return [_quantize(layer.weight, options) for layer in layers]


def _quantize(weight: Tensor, options: LayerOptions) -> DenseWeight:
    n, k = weight.shape
    energy = float((weight.double() ** 2).sum())

    def error(p_sal: float) -> float:
        rounded = _round(weight, p_sal, options.n_uns)
        return float(((rounded - weight).double() ** 2).sum()) / max(energy, 1e-30)

    search = minimize_scalar(
        error,
        bounds=(MIN_SALIENT, MAX_SALIENT[options.part]),
        method="bounded",
        options={"xatol": 1e-4},
    )
    p_sal = float(search.x)
    return DenseWeight(
        values=_round(weight, p_sal, options.n_uns).numpy().astype(np.float32),
        claimed_bits=claimed_bits(n, k, p_sal, options.n_uns),
        true_bits=true_bits(n, k, p_sal, options.n_uns),
    )


def _round(weight: Tensor, p_sal: float, n_uns: int) -> Tensor:
    """The quantized matrix for one salient share; scales are rounded to float16."""
    distance = (weight - weight.mean()).abs() / weight.std().clamp_min(1e-30)
    bounds = torch.tensor(thresholds(p_sal, n_uns))
    group = torch.bucketize(distance, bounds)  # n_uns: salient
    signs = torch.where(weight >= 0, 1.0, -1.0)
    rounded = torch.zeros_like(weight)
    for index in range(n_uns):
        members = group == index
        if bool(members.any()):
            scale = weight[members].abs().mean().half().float()
            rounded[members] = scale * signs[members]
    salient = group == n_uns
    if bool(salient.any()):
        rounded[salient] = round_salient(weight, salient)[salient]
    return rounded


def round_salient(weight: Tensor, salient: Tensor) -> Tensor:
    """Algorithm 1 with equation 14: row scales and four centers for the weights in `salient`.

    Args:
        weight: (n, k).
        salient: bool (n, k).

    Returns:
        (n, k), meaningful where `salient` is set.
    """
    kept = weight * salient
    binary = torch.sign(kept)
    scale = torch.zeros(len(weight), 1)
    for _ in range(_ITERATIONS):
        norms = (binary**2).sum(dim=1, keepdim=True)
        scale = (kept * binary).sum(dim=1, keepdim=True) / norms.clamp_min(1e-30)
        binary = (kept / scale.clamp_min(1e-30)).clamp(-1, 1)
    codes = binary[salient]
    mean, deviation = codes.mean(), codes.std(correction=0)
    steps = torch.linspace(-1, 1, 2**_SALIENT_BITS + 1)
    edges = mean + deviation * torch.sign(steps) * (_ALPHA * torch.exp(steps.abs()) - 1)
    centers = (edges[1:] + edges[:-1]) / 2
    nearest = torch.bucketize(binary, (centers[1:] + centers[:-1]) / 2)
    return scale.half().float() * centers[nearest]
