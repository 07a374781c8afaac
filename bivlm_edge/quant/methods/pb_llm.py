"""PB-LLM (GPTQ-PB): the most sensitive tenth of the weights in 8 bits, the others binary.

Shang et al., "PB-LLM: Partially Binarized Large Language Models", 2023. Saliency w^2 / U_jj^2 per
weight over the whole matrix; salient weights on a symmetric 8-bit grid per row, the others as the
row's mean and one scale; all columns compensated as in GPTQ. Mean and scale are those of the binary
weights alone (the authors' code counts the salient ones as zeros).

True bits with the most favourable code that can be decoded: the paper's 8 and 1 bits, the map of
salient weights entropy-coded, three float16 numbers per row. The paper leaves out the last two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bivlm_edge.quant.linalg import compensate, inverse_factor
from bivlm_edge.quant.methods._blocks import FLOAT_BITS, map_bits
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight

NEEDS = ("hessian",)

SALIENT_SHARE = 0.1
_SALIENT_BITS = 8
_FLOATS_PER_ROW = 3


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[DenseWeight]:
    """Round columns from left to right, each error compensated by the columns still to come."""
    del options
    return [_quantize(layer.weight, layer.hessian) for layer in layers]


def _quantize(weight: Tensor, hessian: Tensor) -> DenseWeight:
    n = len(weight)
    factor = inverse_factor(hessian)
    salient = _most_sensitive(weight / factor.diagonal().to(weight.dtype))
    binary = ~salient
    count = binary.sum(dim=1).clamp_min(1)
    mean = (weight * binary).sum(dim=1) / count
    scale = ((weight - mean[:, None]).abs() * binary).sum(dim=1) / count
    top = 2 ** (_SALIENT_BITS - 1) - 1
    step = weight.abs().amax(dim=1) / top
    mean, scale = mean.half().float(), scale.half().float()
    step = step.clamp(6e-8, 65504).half().float()

    def assign(j: int, column: Tensor) -> Tensor:
        signs = torch.where(column >= mean, 1.0, -1.0)
        fine = (column / step).round().clamp(-top, top) * step
        return torch.where(salient[:, j], fine, mean + scale * signs)

    rounded = compensate(weight.T.contiguous(), factor, assign).T.contiguous()
    claimed = 1 + (_SALIENT_BITS - 1) * float(salient.float().mean())
    beside = (map_bits(salient) + _FLOATS_PER_ROW * FLOAT_BITS * n) / weight.numel()
    return DenseWeight(rounded.numpy(), claimed_bits=claimed, true_bits=claimed + beside)


def _most_sensitive(roots: Tensor) -> Tensor:
    """The tenth with the largest |w / U_jj|: bool of the same shape."""
    count = round(SALIENT_SHARE * roots.numel())
    chosen = torch.zeros(roots.numel(), dtype=torch.bool)
    chosen[roots.abs().flatten().topk(count).indices] = True
    return chosen.reshape(roots.shape)
