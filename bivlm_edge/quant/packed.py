"""The packed binary weight of FORMAT.md: its parts, their checks, and what they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.quant.hadamard import BLOCKS, block_hadamard, unpack_signs
from bivlm_edge.quant.layout import (
    CHUNK,
    MAX_PLANES,
    PANEL,
    PlaneClass,
    can_stack,
    coefficients_per_row,
    pack_coefficients,
    pack_planes,
    packed_bytes,
    padded_columns,
    padded_rows,
    plane_classes,
    unpack_planes,
)

__all__ = [
    "CHUNK",
    "FORMAT",
    "PANEL",
    "BinaryWeight",
    "PlaneClass",
    "can_stack",
    "coefficients_per_row",
    "pack_coefficients",
    "pack_planes",
    "packed_bytes",
    "padded_columns",
    "padded_rows",
    "plane_classes",
    "unpack_planes",
]

FORMAT = 1


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
    def transform_bytes(self) -> int:
        """Bytes of signs and order, which weights on the same transformed input can share."""
        return sum(tensor.nbytes for tensor in (self.signs, self.order) if tensor is not None)

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
