"""Where every bit of a packed weight lies: classes of columns, sizes, and the code bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK = 64
PANEL = 16
MAX_PLANES = 4


class PlaneClass(NamedTuple):
    """The columns `start <= j < stop`, which have `planes` planes and coefficients from `slot`."""

    planes: int
    start: int
    stop: int
    slot: int


def padded_columns(k: int) -> int:
    """Kp: k rounded up to whole chunks."""
    return -(-k // CHUNK) * CHUNK


def padded_rows(n: int) -> int:
    """Np: n rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def can_stack(rows: Sequence[int]) -> bool:
    """Whether weights of these rows, alike in all else, can be stacked into one by their panels."""
    return all(n % PANEL == 0 for n in rows[:-1])


def plane_classes(plane_columns: Sequence[int]) -> list[PlaneClass]:
    """The classes in the order of the columns: most planes first."""
    classes = []
    start = slot = 0
    for planes in range(len(plane_columns), 0, -1):
        stop = plane_columns[planes - 1]
        if stop > start:
            classes.append(PlaneClass(planes, start, stop, slot))
            start, slot = stop, slot + planes
    return classes


def coefficients_per_row(plane_columns: Sequence[int]) -> int:
    """A: the sum of the planes over the classes."""
    return sum(group.planes for group in plane_classes(plane_columns))


def packed_bytes(
    n: int,
    k: int,
    plane_columns: Sequence[int],
    *,
    hadamard_block: int = 0,
    order_entries: int = 0,
) -> int:
    """Bytes of all tensors of a weight of n x k with these planes, padding included.

    Args:
        n: Output features.
        k: Input features.
        plane_columns: See FORMAT.md.
        hadamard_block: 0 stores no signs.
        order_entries: Length of `order`; 0 stores none.
    """
    kp, rows = padded_columns(k), padded_rows(n)
    codes = rows // PANEL * 2 * sum(plane_columns)
    coefficients = rows * 2 * coefficients_per_row(plane_columns)
    return codes + coefficients + (kp // 8 if hadamard_block else 0) + 2 * order_entries


def pack_planes(planes: Sequence[NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """Pack sign planes into codes, uint8 (np / 16, 2 * sum of the widths).

    Args:
        planes: Plane p is bool (n, plane_columns[p]), True for +1. Rows are padded with False.
    """
    widths = [plane.shape[1] for plane in planes]
    rows = planes[0].shape[0]
    panels = padded_rows(rows) // PANEL
    padded = []
    for plane in planes:
        whole = np.zeros((panels * PANEL, plane.shape[1]), dtype=np.uint8)
        whole[:rows] = plane
        padded.append(whole.reshape(panels, PANEL, plane.shape[1]))
    parts = []
    for group in plane_classes(widths):
        chunks = (group.stop - group.start) // CHUNK
        # axes: panel, row, chunk, t, i, e
        bits = [plane[:, :, group.start : group.stop] for plane in padded[: group.planes]]
        blocks = []
        for first in range(0, group.planes - 1, 2):
            steps = np.arange(4, dtype=np.uint8).reshape(4, 1) * 2
            shape = (panels, PANEL, chunks, 4, 4, 4)
            low, high = (bits[p].reshape(shape) for p in (first, first + 1))
            blocks.append(np.sum(low << steps | high << steps + 1, axis=4, dtype=np.uint8))
        if group.planes % 2:
            steps = np.arange(8, dtype=np.uint8).reshape(8, 1)
            last = bits[-1].reshape(panels, PANEL, chunks, 2, 8, 4)
            blocks.append(np.sum(last << steps, axis=4, dtype=np.uint8))
        # axes: panel, row, chunk, t, e -> panel, chunk, t, row, e
        merged = np.concatenate(blocks, axis=3).transpose(0, 2, 3, 1, 4)
        parts.append(merged.reshape(panels, chunks * CHUNK * 2 * group.planes))
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def unpack_planes(
    codes: NDArray[np.uint8], n: int, plane_columns: Sequence[int]
) -> list[NDArray[np.bool_]]:
    """The inverse of `pack_planes`: plane p is bool (n, plane_columns[p])."""
    panels = codes.shape[0]
    planes = [np.zeros((panels * PANEL, width), dtype=np.bool_) for width in plane_columns]
    begin = 0
    for group in plane_classes(plane_columns):
        width = group.stop - group.start
        end = begin + 2 * width * group.planes
        merged = codes[:, begin:end].reshape(panels, width // CHUNK, 2 * group.planes, PANEL, 4)
        rows = merged.transpose(0, 3, 1, 2, 4)[:, :, :, :, np.newaxis]
        begin = end
        for p in range(group.planes):
            first_t = p // 2 * 4
            if p == group.planes - 1 and group.planes % 2:
                bytes_of_plane = rows[:, :, :, first_t : first_t + 2]
                steps = np.arange(8, dtype=np.uint8).reshape(8, 1)
            else:
                bytes_of_plane = rows[:, :, :, first_t : first_t + 4]
                steps = np.arange(4, dtype=np.uint8).reshape(4, 1) * 2 + p % 2
            bits = (bytes_of_plane >> steps & 1).astype(np.bool_)
            planes[p][:, group.start : group.stop] = bits.reshape(panels * PANEL, width)
    return [plane[:n] for plane in planes]


def pack_coefficients(rows: NDArray[np.float16]) -> NDArray[np.float16]:
    """Lay out coefficients (n, A), slots in the order of FORMAT.md, as (np / 16, A, 16)."""
    n, slots = rows.shape
    padded = np.zeros((padded_rows(n), slots), dtype=np.float16)
    padded[:n] = rows
    return np.ascontiguousarray(padded.reshape(-1, PANEL, slots).transpose(0, 2, 1))
