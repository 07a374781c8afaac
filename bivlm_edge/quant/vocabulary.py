"""The token table and the output head at 8 bits: they are read per token and must stay exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bivlm_edge.quant.weights import GroupWeight

BITS = 8
ZERO = 1 << (BITS - 1)
_GROUPS = (64, 32, 16)


def group_size(width: int) -> int | None:
    """Return the largest group of 64, 32 or 16 that divides `width`, or None where none does."""
    return next((group for group in _GROUPS if width % group == 0), None)


def quantize_table(table: NDArray[np.float32]) -> GroupWeight | None:
    """Round a token table to symmetric 8-bit codes with one scale per row and group.

    Args:
        table: float32 ``(vocab, hidden)``.

    Returns:
        Codes around 128 with the largest group of 64, 32 or 16 that divides hidden, or None where
        none does.
    """
    rows, width = table.shape
    group = group_size(width)
    if group is None:
        return None
    blocks = table.reshape(rows, -1, group)
    scale = (np.abs(blocks).max(axis=-1) / (ZERO - 1)).astype(np.float16)
    divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[..., None]
    codes = np.clip(np.rint(blocks / divisor) + ZERO, 1, 2 * ZERO - 1).astype(np.uint8)
    return GroupWeight(
        n=rows,
        k=width,
        bits=BITS,
        group=group,
        codes=codes.reshape(rows, width),
        scale=scale,
        zero=np.full(scale.shape, ZERO, np.uint8),
    )


@torch.no_grad()
def round_vocabulary(module: Any) -> tuple[GroupWeight, GroupWeight] | None:
    """Round a model's token table and head to 8 bits; both modules get the dequantized values.

    Args:
        module: A model of transformers with input and output embeddings, tied or not.

    Returns:
        Table and head, or None where a width is not a multiple of 16: both stay float.
    """
    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    table_weight = quantize_table(table.weight.numpy())
    is_tied = head.weight is table.weight
    head_weight = table_weight if is_tied else quantize_table(head.weight.numpy())
    if table_weight is None or head_weight is None:
        return None
    table.weight.copy_(torch.from_numpy(table_weight.dequantize()))
    head.weight.copy_(torch.from_numpy(head_weight.dequantize()))
    return table_weight, head_weight
