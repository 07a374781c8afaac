"""The token table and the output head, at 8 or 4 bits: read per token, and apart from the layers.

The head is read whole for every token that is generated, so that its bits decide the speed of a
small model: of LLaVA-OneVision-0.5B's decode step at two bits half is the head at 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bivlm_edge.config import DEFAULT_VOCABULARY_BITS
from bivlm_edge.quant.weights import GroupWeight

# Columns that share a scale, the first that divides the width: by bits.
GROUPS = {8: (64, 32, 16), 4: (32, 16)}
_FACTORS_AT_4_BITS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_ROWS_AT_ONCE = 4096  # bounds the memory of trials


def vocabulary_note(bits: int) -> str:
    """What the account of an export says about table and head."""
    return f"vocabulary: {bits} bits, counted apart (tables)"


def group_size(width: int, bits: int = DEFAULT_VOCABULARY_BITS) -> int | None:
    """Return the largest group of GROUPS that divides `width`, or None where none does."""
    return next((group for group in GROUPS[bits] if width % group == 0), None)


def quantize_table(
    table: NDArray[np.float32], bits: int = DEFAULT_VOCABULARY_BITS
) -> GroupWeight | None:
    """Round a token table to symmetric codes with one scale per row and group.

    At 8 bits a scale reaches the group's largest magnitude; at 4 bits it is the one with the least
    squared error of several, the largest of which puts that value at the lowest code, so that
    scales may be negative.

    Args:
        table: float32 ``(vocab, hidden)``.
        bits: One of VOCABULARY_BITS.

    Returns:
        Codes around half of their range with the largest group of GROUPS that divides hidden, or
        None where none does.
    """
    rows, width = table.shape
    group = group_size(width, bits)
    if group is None:
        return None
    codes = np.empty((rows, width), np.uint8)
    scale = np.empty((rows, width // group), np.float16)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        blocks = table[part].reshape(-1, width // group, group)
        scale[part] = _reaching(blocks) if bits == 8 else _searched(blocks)
        codes[part] = _codes(blocks, scale[part], bits).reshape(-1, width)
    zero = np.full(scale.shape, _zero(bits), np.uint8)
    return GroupWeight(n=rows, k=width, bits=bits, group=group, codes=codes, scale=scale, zero=zero)


def _zero(bits: int) -> int:
    return 1 << (bits - 1)


def _reaching(blocks: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales with which 8-bit codes reach from the largest magnitude to its negative."""
    found: NDArray[np.float16] = (np.abs(blocks).max(axis=-1) / (_zero(8) - 1)).astype(np.float16)
    return found


def _searched(blocks: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales of the least squared error at 4 bits."""
    places = np.abs(blocks).argmax(axis=-1)[..., np.newaxis]
    extreme = np.take_along_axis(blocks, places, axis=-1)[..., 0]
    best = np.zeros(extreme.shape, np.float16)
    least = np.full(extreme.shape, np.inf, np.float32)
    for factor in _FACTORS_AT_4_BITS:
        scale = (extreme * (-factor / _zero(4))).astype(np.float16)
        centred = _codes(blocks, scale, 4).astype(np.float32) - _zero(4)
        error = np.square(centred * scale.astype(np.float32)[..., np.newaxis] - blocks).sum(axis=-1)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def _codes(blocks: NDArray[np.float32], scale: NDArray[np.float16], bits: int) -> NDArray[np.uint8]:
    """The nearest codes, uint8, shaped as `blocks`."""
    divisor = np.where(scale != 0, scale, np.float16(1)).astype(np.float32)[..., np.newaxis]
    nearest = np.rint(blocks / divisor) + _zero(bits)
    codes: NDArray[np.uint8] = np.clip(nearest, 0, 2 * _zero(bits) - 1).astype(np.uint8)
    return codes


@torch.no_grad()
def round_vocabulary(
    module: Any, bits: int = DEFAULT_VOCABULARY_BITS
) -> tuple[GroupWeight, GroupWeight] | None:
    """Round a model's token table and head; both modules get the dequantized values.

    Args:
        module: A model of transformers with input and output embeddings, tied or not.
        bits: One of VOCABULARY_BITS.

    Returns:
        Table and head, or None where a width is not a multiple of 16: both stay float.
    """
    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    table_weight = quantize_table(table.weight.numpy(), bits)
    is_tied = head.weight is table.weight
    head_weight = table_weight if is_tied else quantize_table(head.weight.numpy(), bits)
    if table_weight is None or head_weight is None:
        return None
    table.weight.copy_(torch.from_numpy(table_weight.dequantize()))
    head.weight.copy_(torch.from_numpy(head_weight.dequantize()))
    return table_weight, head_weight
