"""Round to nearest on an affine grid per row and group: the simplest baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import GroupWeight

BITS = (2.0, 3.0, 4.0, 8.0)
EXPORTED_BITS = (2.0, 4.0, 8.0)

_GROUPS = (128, 64, 32)


def group_size(k: int) -> int:
    """128, 64 or 32, the largest that divides k; 32 if none does (the tail is padded)."""
    return next((group for group in _GROUPS if k % group == 0), _GROUPS[-1])


def affine_grid(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Scale (float16 values) and zero point of each row and group: two float32 (n, groups).

    The grid spans the smallest to the largest weight and always holds 0.

    Args:
        weight: float32 (n, k), padded with zeros to whole groups.
        bits: Width of a code.
        group: Columns that share a grid.
    """
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % group)).reshape(n, -1, group)
    low = padded.amin(dim=2).clamp_max(0)
    high = padded.amax(dim=2).clamp_min(0)
    low = torch.where(high > low, low, -1)
    high = torch.where(high > low, high, 1)
    top = 2**bits - 1
    # float16 ends at 65504 and loses bits below 6e-5: a scale of 0 would divide by zero.
    scale = ((high - low) / top).clamp(6e-8, 65504).half().float()
    return scale, (-low / scale).round().clamp(0, top)


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[GroupWeight]:
    """Round every weight to the nearest code; the Hessian is not used."""
    return [_quantize(layer.weight, options) for layer in layers]


def _quantize(weight: Tensor, options: LayerOptions) -> GroupWeight:
    k = weight.shape[1]
    group = options.group or group_size(k)
    scale, zero = affine_grid(weight, int(options.bits), group)
    wide_scale, wide_zero = (part.repeat_interleave(group, dim=1)[:, :k] for part in (scale, zero))
    codes = (weight / wide_scale + wide_zero).round().clamp(0, 2 ** int(options.bits) - 1)
    return group_weight(codes, scale, zero, int(options.bits), group)


def group_weight(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> GroupWeight:
    """Pack codes (n, k) with their grid into a GroupWeight; padding gets the zero point."""
    n, k = codes.shape
    whole = zero.repeat_interleave(group, dim=1)
    whole[:, :k] = codes
    return GroupWeight(
        n=n,
        k=k,
        bits=bits,
        group=group,
        codes=whole.to(torch.uint8).numpy(),
        scale=scale.half().numpy(),
        zero=zero.to(torch.uint8).numpy(),
    )
