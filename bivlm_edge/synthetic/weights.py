"""Random weights in packed form, never in float: linear layers of any size in little memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.quant.packed import (
    CHUNK,
    PANEL,
    BinaryWeight,
    coefficients_per_row,
    pack_coefficients,
    packed_bytes,
    padded_columns,
    padded_rows,
    plane_classes,
)
from bivlm_edge.quant.weights import GroupWeight

_SPREAD = 0.2  # of the row scales, each way
_HADAMARD = 128


@dataclass(frozen=True, slots=True, eq=False)
class InputTransform:
    """What layers that read the same input share, as the quantizer's layers can.

    Attributes:
        k: Input features.
        plane_columns: See FORMAT.md.
        hadamard_block: 128 where the padded width allows it, else 64.
        signs: uint8 (kp / 8,).
        order: uint16 (kp / 64,), chunks in random order; None if all columns have two planes.
    """

    k: int
    plane_columns: tuple[int, ...]
    hadamard_block: int
    signs: NDArray[np.uint8]
    order: NDArray[np.uint16] | None


class Budget:
    """Bytes that layers may take at a number of bits per weight; what one leaves, the next gets."""

    def __init__(self, bits: float) -> None:
        """Begin with nothing spent.

        Args:
            bits: True bits per weight over all layers together.
        """
        self._bits = bits
        self._left = 0.0

    def spend(self, rows: Iterable[int], k: int) -> tuple[int, ...]:
        """Return plane_columns for layers that read one input, the second plane as wide as fits.

        Args:
            rows: Output features of each layer.
            k: Input features.

        Raises:
            ValueError: One plane exceeds the budget.
        """
        rows, kp = list(rows), padded_columns(k)
        self._left += self._bits * sum(rows) * k / 8
        for second in range(kp, -1, -CHUNK):
            planes = (kp, second) if second else (kp,)
            taken = sum(
                packed_bytes(
                    n,
                    k,
                    planes,
                    hadamard_block=_block(kp),
                    order_entries=0 if second in (0, kp) else kp // CHUNK,
                )
                for n in rows
            )
            if taken <= self._left:
                self._left -= taken
                return planes
        raise ValueError(f"{self._bits:g} bits per weight do not hold layers of {rows} x {k}.")


def draw_transform(
    rng: np.random.Generator, k: int, plane_columns: tuple[int, ...]
) -> InputTransform:
    """Draw signs and order for layers with these planes."""
    kp = padded_columns(k)
    has_order = len(plane_classes(plane_columns)) > 1
    return InputTransform(
        k=k,
        plane_columns=plane_columns,
        hadamard_block=_block(kp),
        signs=_random_bytes(rng, (kp // 8,)),
        order=rng.permutation(kp // CHUNK).astype(np.uint16) if has_order else None,
    )


def random_binary_weight(
    rng: np.random.Generator, n: int, transform: InputTransform
) -> BinaryWeight:
    """Draw the planes of a layer with entries of variance 1 / k.

    Args:
        rng: Source of the bits.
        n: Output features.
        transform: What it shares with the other layers of its input.
    """
    planes = transform.plane_columns
    codes = _random_bytes(rng, (padded_rows(n) // PANEL, 2 * sum(planes)))
    used = n - (padded_rows(n) - PANEL)
    codes[-1].reshape(-1, PANEL, 4)[:, used:] = 0
    coefficients = np.empty((n, coefficients_per_row(planes)))
    row = transform.k**-0.5 * rng.uniform(1 - _SPREAD, 1 + _SPREAD, n)
    for group in plane_classes(planes):
        halves = 0.5 ** np.arange(group.planes)
        slots = slice(group.slot, group.slot + group.planes)
        coefficients[:, slots] = row[:, np.newaxis] * halves / np.linalg.norm(halves)
    return BinaryWeight(
        n=n,
        k=transform.k,
        plane_columns=planes,
        codes=codes,
        coefficients=pack_coefficients(coefficients.astype(np.float16)),
        hadamard_block=transform.hadamard_block,
        signs=transform.signs,
        order=transform.order,
    )


def random_group_weight(
    rng: np.random.Generator, n: int, k: int, *, bits: int, group: int, symmetric: bool
) -> GroupWeight:
    """Draw affine codes of a layer with entries of variance about 1 / k.

    Args:
        rng: Source of the codes.
        n: Output features.
        k: Input features.
        bits: 4 or 8.
        group: Columns that share a scale.
        symmetric: Zero points in the middle, as of a token table, rather than near it.
    """
    groups = -(-k // group)
    codes = _random_bytes(rng, (n, groups * group)) >> np.uint8(8 - bits)
    middle = 2 ** (bits - 1)
    zero = np.full((n, groups), middle, np.uint8)
    if not symmetric:
        zero -= _random_bytes(rng, zero.shape) & 1
    deviation = 2**bits * 12**-0.5  # of uniform codes
    spread = rng.uniform(1 - _SPREAD, 1 + _SPREAD, (n, groups))
    return GroupWeight(
        n=n,
        k=k,
        bits=bits,
        group=group,
        codes=codes,
        scale=(spread * k**-0.5 / deviation).astype(np.float16),
        zero=zero,
    )


def _block(kp: int) -> int:
    return _HADAMARD if kp % _HADAMARD == 0 else CHUNK


def _random_bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    size = int(np.prod(shape))
    return np.frombuffer(bytearray(rng.bytes(size)), dtype=np.uint8).reshape(shape)
