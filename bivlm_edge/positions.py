"""Positions of tokens for the rotary embedding: one axis, or three where pictures are grids.

Imports neither torch nor onnx: exporter and runtime share it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def position_rows(
    token_ids: NDArray[np.int64], start: int, image_token_id: int, grid: tuple[int, int] | None
) -> tuple[NDArray[np.int64], int]:
    """Return the positions of tokens, and the one behind them.

    With a grid (M-RoPE of Qwen2.5-VL) a text token has one position on all axes, a picture one
    for its time, and one per row and column of its tokens; what follows a picture continues
    behind its largest.

    Args:
        token_ids: int64 `[tokens]`, whole pictures only.
        start: Position of the first token.
        image_token_id: Stands for one feature of a picture.
        grid: Rows and columns of a picture's tokens; None for one axis.

    Returns:
        int64 `[1, tokens]`, or `[3, 1, tokens]` with a grid; the next position.
    """
    count = len(token_ids)
    if grid is None:
        return np.arange(start, start + count, dtype=np.int64)[np.newaxis], start + count
    rows, columns = grid
    vertical, horizontal = np.divmod(np.arange(rows * columns), columns)
    of_picture = np.stack([np.zeros_like(vertical), vertical, horizontal])
    found = np.empty((3, 1, count), dtype=np.int64)
    index, position = 0, start
    is_image = token_ids == image_token_id
    while index < count:
        if is_image[index]:
            end = index + rows * columns
            found[:, 0, index:end] = of_picture + position
            position += max(grid)
        else:
            following = np.flatnonzero(is_image[index:])
            end = index + int(following[0]) if len(following) else count
            found[:, 0, index:end] = np.arange(position, position + end - index)
            position += end - index
        index = end
    return found, position


def without_gaps(rows: NDArray[np.int64], kept: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return the positions of kept tokens once the gaps of dropped ones are closed.

    Each token moves down by the positions that nothing before it takes any more. On one axis they
    become consecutive; a picture on a grid keeps its rows and columns, and what follows starts
    behind the largest position that is left of it.

    Args:
        rows: int64 `[1, tokens]` or `[3, 1, tokens]`, of all tokens of a run.
        kept: int64 `[kept tokens]`, rising.

    Returns:
        int64 `[1, kept tokens]` or `[3, 1, kept tokens]`; the next position.
    """
    left = rows[..., kept]
    axes = tuple(range(left.ndim - 1))
    start = int(rows[..., 0].min())
    behind = np.maximum.accumulate(np.concatenate([[start - 1], left.max(axis=axes)]))
    gaps = np.maximum(left.min(axis=axes) - behind[:-1] - 1, 0)
    closed = left - gaps.cumsum()
    return closed, max(start, int(closed.max(initial=start - 1)) + 1)
