"""The block Hadamard transform with signs that OPS.md puts before the product."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCKS = (0, 64, 128)


@lru_cache(maxsize=4)
def hadamard_matrix(block: int) -> NDArray[np.float64]:
    """Sylvester's matrix divided by sqrt(block): float64 (block, block), symmetric, orthogonal.

    Entry (i, j) is (-1)^popcount(i & j) / sqrt(block). The array is shared and read-only.

    Args:
        block: A power of two.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block of {block} is not a power of two.")
    matrix = np.ones((1, 1))
    while matrix.shape[0] < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(block)
    matrix.setflags(write=False)
    return matrix


def block_hadamard(values: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Return `values` with every `block` consecutive entries of the last axis transformed.

    The transform is its own inverse.

    Args:
        values: float64 (..., k), `block` divides k.
        block: 0 (nothing happens) or a power of two.
    """
    if block == 0:
        return values
    blocks = values.reshape(*values.shape[:-1], -1, block)
    transformed: NDArray[np.float64] = np.matmul(blocks, hadamard_matrix(block))
    return transformed.reshape(values.shape)


def pack_signs(signs: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack the signs of a transform, bit j % 8 of byte j / 8 being 1 for +1.

    Args:
        signs: bool (kp,), True is +1.
    """
    return np.packbits(signs, bitorder="little")


def unpack_signs(packed: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The factors +-1 that `pack_signs` packed: float64 (8 * bytes,)."""
    return np.unpackbits(packed, bitorder="little").astype(np.float64) * 2.0 - 1.0
