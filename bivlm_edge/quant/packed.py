"""The packed binary weight of FORMAT.md: its parts, their checks, and what they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.quant.hadamard import BLOCKS, block_hadamard, unpack_signs

FORMAT = 1
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True, eq=False)
class BinaryWeight:
    """A weight as bit planes with row coefficients; FORMAT.md defines every field.

    Attributes:
        n: Output features.
        k: Input features.
        plane_columns: Columns that each plane covers, one to four falling multiples of 64.
        codes: uint8 (np / 16, 2 * sum(plane_columns)).
        coefficients: float16 (np / 16, A, 16).
        hadamard_block: 0, 64 or 128.
        signs: uint8 (kp / 8,), or None; only with a Hadamard block.
        order: uint16 (kp,) or (kp / 64,), a permutation, or None.

    Raises:
        ValueError: a field does not follow from the others as FORMAT.md says.
    """

    n: int
    k: int
    plane_columns: tuple[int, ...]
    codes: NDArray[np.uint8]
    coefficients: NDArray[np.float16]
    hadamard_block: int = 0
    signs: NDArray[np.uint8] | None = None
    order: NDArray[np.uint16] | None = None

    def __post_init__(self) -> None:
        _require(self.n >= 1 and self.k >= 1, f"N = {self.n}, K = {self.k}: both must be >= 1.")
        self._check_planes()
        self._check_tensors()
        self._check_transform()
        self._check_padding()

    def _check_planes(self) -> None:
        planes, kp = self.plane_columns, padded_columns(self.k)
        _require(
            1 <= len(planes) <= MAX_PLANES,
            f"plane_columns {planes} has {len(planes)} entries, accepted are 1 to {MAX_PLANES}.",
        )
        _require(
            planes[0] == kp,
            f"plane_columns {planes} must begin with {kp}, which is K = {self.k} in whole chunks.",
        )
        _require(
            all(width > 0 and width % CHUNK == 0 for width in planes)
            and all(a >= b for a, b in pairwise(planes)),
            f"plane_columns {planes} must be positive multiples of {CHUNK} that do not rise.",
        )

    def _check_tensors(self) -> None:
        panels = padded_rows(self.n) // PANEL
        slots = coefficients_per_row(self.plane_columns)
        self._check_tensor("codes", self.codes, np.uint8, [(panels, 2 * sum(self.plane_columns))])
        self._check_tensor("coefficients", self.coefficients, np.float16, [(panels, slots, PANEL)])
        _require(
            bool(np.isfinite(self.coefficients).all()),
            "coefficients hold NaN or infinity; float16 ends at 65504.",
        )

    def _check_transform(self) -> None:
        kp, block = padded_columns(self.k), self.hadamard_block
        _require(
            block in BLOCKS and (block == 0 or kp % block == 0),
            f"hadamard_block {block} is not one of {BLOCKS}, or does not divide {kp}.",
        )
        if self.signs is not None:
            _require(block > 0, "signs are stored, but there is no Hadamard block to use them.")
            self._check_tensor("signs", self.signs, np.uint8, [(kp // 8,)])
        if self.order is not None:
            lengths = [(kp,)] if kp == CHUNK else [(kp,), (kp // CHUNK,)]
            self._check_tensor("order", self.order, np.uint16, lengths)
            _require(
                np.array_equal(np.sort(self.order), np.arange(len(self.order))),
                f"order is not a permutation of 0..{len(self.order) - 1}.",
            )

    def _check_tensor(
        self, name: str, array: NDArray[np.generic], kind: type, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        _require(
            array.dtype == kind and array.shape in shapes,
            f"{name} is {array.dtype} {array.shape}, expected {np.dtype(kind)} "
            f"{' or '.join(map(str, shapes))} for N = {self.n}, K = {self.k}, "
            f"plane_columns = {self.plane_columns}.",
        )

    def _check_padding(self) -> None:
        used = self.n - (padded_rows(self.n) - PANEL)
        _require(
            not self.codes[-1].reshape(-1, PANEL, 4)[:, used:].any()
            and not self.coefficients[-1, :, used:].any(),
            f"rows {self.n} to {padded_rows(self.n) - 1} are padding and must be zero.",
        )
        if self.hadamard_block == 0 and self.k % CHUNK:
            padding = self.column_order() >= self.k
            planes = unpack_planes(self.codes, self.n, self.plane_columns)
            _require(
                not any(plane[:, padding[: plane.shape[1]]].any() for plane in planes),
                f"columns {self.k} to {padded_columns(self.k) - 1} are padding and must be zero.",
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.codes, self.coefficients, self.signs, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def true_bits(self) -> float:
        """Bits per weight, every byte counted."""
        return 8 * self.nbytes / (self.n * self.k)

    def column_order(self) -> NDArray[np.int64]:
        """For each position j of the weight, the transformed channel it multiplies: (kp,)."""
        kp = padded_columns(self.k)
        if self.order is None:
            return np.arange(kp, dtype=np.int64)
        order = self.order.astype(np.int64)
        if len(order) == kp:
            return order
        return (order[:, np.newaxis] * CHUNK + np.arange(CHUNK)).reshape(kp)

    def decode(self) -> NDArray[np.float32]:
        """What of FORMAT.md, in the coordinates of the transformed input: float32 (n, kp)."""
        planes = unpack_planes(self.codes, self.n, self.plane_columns)
        values = np.zeros((self.n, padded_columns(self.k)), dtype=np.float32)
        slots = self.coefficients.transpose(0, 2, 1).reshape(-1, self.coefficients.shape[1])
        alphas = slots[: self.n].astype(np.float32)
        for group in plane_classes(self.plane_columns):
            columns = slice(group.start, group.stop)
            for p in range(group.planes):
                alpha = alphas[:, group.slot + p, np.newaxis]
                values[:, columns] += np.where(planes[p][:, columns], alpha, -alpha)
        return values

    def dequantize(self) -> NDArray[np.float32]:
        """The weight in the coordinates of the original input: float32 (n, k)."""
        decoded = self.decode()
        weight = np.empty(decoded.shape)
        weight[:, self.column_order()] = decoded
        weight = block_hadamard(weight, self.hadamard_block)
        if self.signs is not None:
            weight *= unpack_signs(self.signs)
        return np.ascontiguousarray(weight[:, : self.k].astype(np.float32))

    def transform(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The transform of OPS.md on activations (..., k): float32 (..., kp)."""
        padded = np.zeros((*x.shape[:-1], padded_columns(self.k)))
        padded[..., : self.k] = x
        if self.signs is not None:
            padded *= unpack_signs(self.signs)
        transformed = block_hadamard(padded, self.hadamard_block)[..., self.column_order()]
        return transformed.astype(np.float32)


def pack_coefficients(rows: NDArray[np.float16]) -> NDArray[np.float16]:
    """Lay out coefficients (n, A), slots in the order of FORMAT.md, as (np / 16, A, 16)."""
    n, slots = rows.shape
    padded = np.zeros((padded_rows(n), slots), dtype=np.float16)
    padded[:n] = rows
    return np.ascontiguousarray(padded.reshape(-1, PANEL, slots).transpose(0, 2, 1))
