"""What the block-wise binary baselines (BiLLM, ARB-LLM) share: no method of its own.

Both take blocks of 128 columns from left to right, split each into salient and other columns,
divide weights by magnitude into a concentrated and a sparse group, and push the error of a block
onto the blocks to come. The two searches use scales without means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bivlm_edge.quant.linalg import inverse_factor
from bivlm_edge.quant.weights import DenseWeight

BLOCK = 128
MAX_SALIENT = 50
FLOAT_BITS = 16

_PERCENTILES = torch.linspace(0.1, 0.9, 81)


@dataclass(slots=True)
class Size:
    """Bits so far.

    Attributes:
        signs: One per weight and plane: what the papers count.
        beside: Maps and scales.
    """

    signs: float = 0.0
    beside: float = 0.0


def quantize_blocks(
    weight: Tensor, hessian: Tensor, binarize_block: Callable[[Tensor, Tensor, Size], Tensor]
) -> DenseWeight:
    """Binarize a layer block by block with compensation between blocks.

    Args:
        weight: float32 (n, k).
        hessian: (k, k).
        binarize_block: Maps a block (n, b), the cost 1 / U_jj^2 of errors in its columns (b,) and
            the size, which it adds to, to rounded values.
    """
    factor = inverse_factor(hessian)
    costs = (1 / factor.diagonal() ** 2).to(weight.dtype)
    size = Size()

    def assign(columns: slice, block: Tensor) -> Tensor:
        return binarize_block(block, costs[columns], size)

    rounded = compensate_blocks(weight, factor, assign)
    return DenseWeight(
        values=rounded.numpy(),
        claimed_bits=size.signs / weight.numel(),
        true_bits=(size.signs + size.beside) / weight.numel(),
    )


def compensate_blocks(
    weight: Tensor, factor: Tensor, assign: Callable[[slice, Tensor], Tensor]
) -> Tensor:
    """Round block after block, each block's error pushed onto the columns behind it.

    Huang et al., "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs", 2024, algorithm
    1: inside a block nothing is compensated.

    Args:
        weight: float32 (n, k).
        factor: `inverse_factor` of the Hessian, (k, k).
        assign: Maps the columns of a block and its compensated values (n, b) to rounded values.

    Returns:
        The rounded values, (n, k).
    """
    k = weight.shape[1]
    rest, rounded = weight.clone(), torch.empty_like(weight)
    factor = factor.to(weight.dtype)
    for start in range(0, k, BLOCK):
        columns, later = slice(start, min(start + BLOCK, k)), slice(start + BLOCK, k)
        block = rest[:, columns]
        rounded[:, columns] = assign(columns, block)
        errors = (block - rounded[:, columns]) / factor.diagonal()[columns]
        rest[:, later] -= errors @ factor[columns, later]
    return rounded


def salient_columns(values: Tensor, scores: Tensor) -> Tensor:
    """The columns that get a second binary plane: the first of the ranking by falling score.

    Their number, 1 to 49, is that which leaves the least squared error when salient and other
    columns are binarized apart, both with residual (BiLLM, algorithm 2).

    Args:
        values: (n, b), what is binarized on trial: the weights or their sensitivities.
        scores: (b,), sensitivity of each column.

    Returns:
        int64 (c,).
    """
    ranking = scores.argsort(descending=True, stable=True)
    magnitudes = values[:, ranking].abs()
    most = min(MAX_SALIENT - 1, values.shape[1] - 1)
    errors = [
        _residual_error(magnitudes[:, :count]) + _residual_error(magnitudes[:, count:])
        for count in range(1, most + 1)
    ]
    count = 1 + min(range(most), key=errors.__getitem__) if errors else 0
    return ranking[:count]


def _residual_error(magnitudes: Tensor) -> float:
    """Squared error of rows binarized twice, each time by sign and mean magnitude."""
    first = (magnitudes - magnitudes.mean(dim=1, keepdim=True)).abs()
    return float((first - first.mean(dim=1, keepdim=True)).square().sum())


def magnitude_split(values: Tensor) -> float:
    """The magnitude that divides values best into two groups, each binarized by row.

    Tries 81 percentiles from 10 % to 90 % (BiLLM, "bell-shaped distribution splitting").

    Args:
        values: (n, b), at least one column.
    """
    ranked = values.abs().sort(dim=1).values
    cuts = torch.quantile(_thinned(ranked), _PERCENTILES)
    below = torch.searchsorted(ranked, cuts.expand(len(ranked), -1).contiguous())
    sums = torch.nn.functional.pad(ranked.double().cumsum(dim=1), (1, 0))
    low = sums.gather(1, below)
    high = sums[:, -1:] - low
    # sum (x - mean)^2 = sum x^2 - (sum x)^2 / count: only the last term depends on the cut
    gain = low**2 / below.clamp_min(1) + high**2 / (values.shape[1] - below).clamp_min(1)
    return float(cuts[int(gain.sum(dim=0).argmax())])


def _thinned(values: Tensor) -> Tensor:
    """At most a million of the values: torch.quantile takes 16 million, and these are enough."""
    flat = values.flatten()
    return flat[:: -(-len(flat) // 2**20)]


def entropy(share: float) -> float:
    """Bits per symbol of a bit that is set with probability `share`."""
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def map_bits(members: Tensor) -> float:
    """Bits of an entropy-coded map, bool of any shape."""
    count = members.numel()
    return count * entropy(float(members.sum()) / count) if count else 0.0
