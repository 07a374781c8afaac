"""Bi-VLM: Gaussian-quantile partition, binary unsalient and 2-bit salient weights.

Bi-VLM, arXiv 2509.18763v1, 2025 (AAAI-26): equations 2 to 20, algorithms 1 to 3. Data-free. What
the paper leaves open: 20 iterations of algorithm 1, p_max 1 % for the projector, thresholds on
|w - mean|.

`--paper-exact` takes equation 14 for the salient codes, whose outer two of four no weight reaches
when tails are Gaussian. Without it the four codes +-c1, +-c2 (in units of the row's scale) are
fitted to the salient weights: the same storage, far less error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight

OPTIONS = ("n_uns", "paper_exact")

MIN_SALIENT = 1e-4
MAX_SALIENT = {"vision": 0.05, "projector": 0.01, "decoder": 0.01}
_ALPHA = 1.4
_ITERATIONS = 20
_SALIENT_BITS = 2
_FLOAT_BITS = 16


def thresholds(p_sal: float, n_uns: int) -> list[float]:
    """z(1) .. z(n_uns) of equation 5, in standard deviations."""
    p_uns = (1 - p_sal) / n_uns
    return [float(norm.ppf((1 + k * p_uns) / 2)) for k in range(1, n_uns + 1)]


def claimed_bits(n: int, k: int, p_sal: float, n_uns: int) -> float:
    """Bits per weight as appendix A.1.1 counts them: without the class of each weight."""
    return 1 + (_SALIENT_BITS - 1) * p_sal + _FLOAT_BITS * (n_uns + n) / (n * k)


def true_bits(n: int, k: int, shares: Sequence[float]) -> float:
    """Bits per weight with the classes entropy-coded, without which nothing can be decoded.

    Args:
        n: Output features.
        k: Input features.
        shares: Share of the weights in each unsalient group, and last in the salient one.
    """
    entropy = -sum(share * math.log2(share) for share in shares if share > 0)
    return claimed_bits(n, k, shares[-1], len(shares) - 1) + entropy


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[DenseWeight]:
    """Search the salient share by Brent's method (algorithm 3) and round; the Hessian is unused."""
    return [_quantize(layer.weight, options) for layer in layers]


def _quantize(weight: Tensor, options: LayerOptions) -> DenseWeight:
    n, k = weight.shape
    partition = Partition(weight, options.n_uns, exact=options.paper_exact)
    search = minimize_scalar(
        partition.error,
        bounds=(MIN_SALIENT, MAX_SALIENT[options.part]),
        method="bounded",
        options={"xatol": 1e-4},
    )
    p_sal = float(search.x)
    shares = [(stop - start) / (n * k) for start, stop in partition.groups(p_sal)]
    return DenseWeight(
        values=partition.round(p_sal).numpy(),
        claimed_bits=claimed_bits(n, k, shares[-1], options.n_uns),
        true_bits=true_bits(n, k, shares),
    )


class Partition:
    """A matrix sorted by distance from its mean, to be cut into groups for any salient share.

    Args:
        weight: float32 (n, k).
        n_uns: Number of unsalient groups.
        exact: Whether the salient codes follow equation 14.
    """

    def __init__(self, weight: Tensor, n_uns: int, *, exact: bool) -> None:
        self._shape = weight.shape
        self._n_uns = n_uns
        self._exact = exact
        self._weight = weight.flatten()
        deviation = float(weight.std(correction=0).clamp_min(1e-30))
        distance = (self._weight - weight.mean()).abs() / deviation
        self._distance, self._order = distance.sort()
        magnitudes = self._weight.abs().double()[self._order]
        zero = torch.zeros(1, dtype=torch.float64)
        self._sums = torch.cat([zero, magnitudes.cumsum(0)])
        self._squares = torch.cat([zero, magnitudes.square().cumsum(0)])

    def groups(self, p_sal: float) -> list[tuple[int, int]]:
        """First and last place, in order of distance, of the unsalient groups and the salient."""
        bounds = torch.tensor(thresholds(p_sal, self._n_uns))
        edges = torch.searchsorted(self._distance, bounds, right=True).tolist()
        starts = [0, *edges]
        return list(zip(starts, [*edges, len(self._weight)], strict=True))

    def error(self, p_sal: float) -> float:
        """Squared error over the squares of the matrix, scales not yet rounded (equation 20)."""
        *unsalient, (start, stop) = self.groups(p_sal)
        total = 0.0
        for first, last in unsalient:
            sums, squares = (float(x[last] - x[first]) for x in (self._sums, self._squares))
            total += squares - sums**2 / max(last - first, 1)
        places = self._order[start:stop]
        total += float((self._salient(places) - self._weight[places]).double().square().sum())
        return total / max(float(self._squares[-1]), 1e-30)

    def round(self, p_sal: float) -> Tensor:
        """The quantized matrix, float32 (n, k), with scales rounded to float16."""
        *unsalient, (start, stop) = self.groups(p_sal)
        rounded = torch.zeros_like(self._weight)
        for first, last in unsalient:
            places = self._order[first:last]
            mean = (self._sums[last] - self._sums[first]) / max(last - first, 1)
            signs = torch.where(self._weight[places] >= 0, 1.0, -1.0)
            rounded[places] = mean.half().float() * signs
        places = self._order[start:stop]
        rounded[places] = self._salient(places, half=True)
        return rounded.reshape(self._shape)

    def _salient(self, places: Tensor, *, half: bool = False) -> Tensor:
        values = self._weight[places]
        if len(places) == 0:
            return values
        encode = codes_of_equation_14 if self._exact else fitted_codes
        rows = places // self._shape[1]
        scale, codes = encode(values, rows, self._shape[0])
        if half:
            scale = scale.half().float()
        return scale[rows] * codes


def codes_of_equation_14(values: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with equation 14: row scales, and the nearest of four centers.

    Args:
        values: float32 (s,), the salient weights.
        rows: int64 (s,), their rows.
        n: Rows of the matrix.

    Returns:
        Scales (n,) and codes (s,); a weight becomes `scale[row] * code`.
    """
    binary = torch.sign(values)
    scale = torch.zeros(n)
    for _ in range(_ITERATIONS):
        scale = _ratio(_by_row(values * binary, rows, n), _by_row(binary**2, rows, n))
        binary = (values / scale[rows].clamp_min(1e-30)).clamp(-1, 1)
    mean, deviation = binary.mean(), binary.std(correction=0)
    steps = torch.linspace(-1, 1, 2**_SALIENT_BITS + 1)
    edges = mean + deviation * torch.sign(steps) * (_ALPHA * torch.exp(steps.abs()) - 1)
    centers = (edges[1:] + edges[:-1]) / 2
    return scale, centers[torch.bucketize(binary, (centers[1:] + centers[:-1]) / 2)]


def fitted_codes(values: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Row scales and two magnitudes for the layer, by alternating least squares.

    Args and returns are those of `codes_of_equation_14`; the magnitudes are float16 numbers.
    """
    sizes = values.abs()
    scale = _ratio(_by_row(sizes, rows, n), _by_row(torch.ones_like(sizes), rows, n))
    relative = sizes / scale[rows].clamp_min(1e-30)
    is_large = relative > relative.mean()
    pair = torch.ones(2)
    for _ in range(_ITERATIONS):
        weights = scale[rows] ** 2
        products = scale[rows] * sizes
        member = is_large.long()
        pair = _ratio(_by_row(products, member, 2), _by_row(weights, member, 2))
        pair = pair.sort().values.half().float()
        relative = sizes / scale[rows].clamp_min(1e-30)
        is_large = relative > pair.mean()
        codes = pair[is_large.long()]
        scale = _ratio(_by_row(sizes * codes, rows, n), _by_row(codes**2, rows, n))
    return scale, pair[is_large.long()] * torch.sign(values)


def _by_row(terms: Tensor, rows: Tensor, n: int) -> Tensor:
    return torch.zeros(n).index_add_(0, rows, terms)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return top / bottom.clamp_min(1e-30)
