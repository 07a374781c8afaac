"""The arithmetic of passes through the model: calibration inputs, gradients, fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def compute_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, else float32."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Matrix products in `compute_dtype`, all else in float32."""
    dtype = compute_dtype()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


def exact_products() -> torch.autocast:
    """Matrix products in the type of their factors, also inside `fast_products`."""
    return torch.autocast("cpu", enabled=False)
