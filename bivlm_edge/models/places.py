"""Where image tokens lie, as features: near tokens are alike, far ones have nothing in common."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPREAD = 1.5  # tokens; half the distance between kept ones at a tenth of a square picture
_LARGEST = 127

Places = NDArray[np.float32]


def grid(rows: int, columns: int) -> Places:
    """Return row and column of each token, row by row: ``(rows * columns, 2)``."""
    return np.indices((rows, columns), dtype=np.float32).reshape(2, -1).T


NOWHERE = np.full((1, 2), np.nan, np.float32)  # of a token that belongs to no place


def features(places: Places) -> NDArray[np.int8]:
    """Return features ``(tokens, width)`` whose cosines fall off with distance.

    The cosine of two tokens at distance d is exp(-d^2 / (2 SPREAD^2)), to 0.03; that of a token
    without a place with any other is 0. Integers: places that are alike are exactly alike, so that
    every implementation breaks their ties alike.

    Args:
        places: Row and column of each token, NaN for one without a place: ``(tokens, 2)``.
    """
    is_placed = ~np.isnan(places[:, 0])
    rows, columns = (_bumps(axis) for axis in places[is_placed].T)
    placed = (rows[:, :, None] * columns[:, None]).reshape(len(rows), -1)
    table = np.zeros((len(places), placed.shape[1] + int((~is_placed).sum())), np.float32)
    table[is_placed, : placed.shape[1]] = placed
    table[~is_placed, placed.shape[1] :] = np.eye(int((~is_placed).sum()))
    whole: NDArray[np.float32] = np.rint(_LARGEST * table / table.max(axis=1, keepdims=True))
    return whole.astype(np.int8)


def _bumps(axis: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return Gaussians around points SPREAD apart, one beyond each end: ``(tokens, points)``."""
    points = np.arange(axis.min() - SPREAD, axis.max() + 2 * SPREAD, SPREAD)
    bumps: NDArray[np.float32] = np.exp(-(((axis[:, None] - points) / SPREAD) ** 2))
    return bumps.astype(np.float32)
