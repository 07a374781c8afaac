"""Write the packed weights of format 1 that test_golden.py holds to the byte.

Run only for a new format number: `python tests/golden/regenerate.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.quant.hadamard import pack_signs
from bivlm_edge.quant.packed import (
    CHUNK,
    FORMAT,
    BinaryWeight,
    coefficients_per_row,
    pack_coefficients,
    pack_planes,
    padded_columns,
)

FOLDER = Path(__file__).parent
PARTS = ("codes", "coefficients", "signs", "order")

# name: n, k, plane_columns, hadamard_block, entries of the order
CASES: dict[str, tuple[int, int, tuple[int, ...], int, int]] = {
    "one_plane": (16, 64, (64,), 0, 0),
    "two_planes_padded_rows": (17, 128, (128, 128), 0, 0),
    "tail_of_one_plane_rotated": (33, 192, (192, 128), 64, 3),
    "all_classes_column_order": (20, 256, (256, 192, 128, 64), 0, 256),
    "three_planes_block_128": (16, 256, (256, 256, 128), 128, 4),
    "padded_columns": (5, 100, (128, 64), 0, 128),
    "padded_columns_rotated": (3, 70, (128, 128), 64, 0),
}


def draw(count: int, seed: int) -> NDArray[np.uint64]:
    """Numbers that any language repeats: splitmix64 of seed + 1, seed + 2, ..."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


def permutation(count: int, seed: int) -> NDArray[np.uint16]:
    """Positions sorted by drawn numbers."""
    return np.argsort(draw(count, seed), kind="stable").astype(np.uint16)


def build(name: str) -> BinaryWeight:
    """The weight of one case."""
    n, k, plane_columns, block, entries = CASES[name]
    kp = padded_columns(k)
    order = permutation(entries, 1000) if entries else None
    positions = np.arange(kp)
    if order is not None:
        positions = order.astype(np.int64)
        if entries != kp:
            positions = (positions[:, np.newaxis] * CHUNK + np.arange(CHUNK)).reshape(kp)
    planes = []
    for p, width in enumerate(plane_columns):
        bits = draw(n * width, 10_000 * (p + 1)) % np.uint64(2) == 1
        plane = bits.reshape(n, width)
        if block == 0:
            plane = plane & (positions < k)[:width]
        planes.append(plane)
    slots = coefficients_per_row(plane_columns)
    # multiples of 1/1024 below 1: exact in float16
    rows = (draw(n * slots, 5) % np.uint64(1024)).astype(np.float64) / 1024
    return BinaryWeight(
        n=n,
        k=k,
        plane_columns=plane_columns,
        codes=pack_planes(planes),
        coefficients=pack_coefficients(rows.reshape(n, slots).astype(np.float16)),
        hadamard_block=block,
        signs=pack_signs(draw(kp, 77) % np.uint64(2) == 1) if block else None,
        order=order,
    )


def main() -> None:
    for name in CASES:
        weight = build(name)
        parts = {part: getattr(weight, part) for part in PARTS}
        np.savez(
            FOLDER / f"format{FORMAT}_{name}.npz",
            shape=np.array([weight.n, weight.k], dtype=np.int64),
            plane_columns=np.array(weight.plane_columns, dtype=np.int64),
            hadamard_block=np.array(weight.hadamard_block, dtype=np.int64),
            dequantized=weight.dequantize(),
            **{part: array for part, array in parts.items() if array is not None},
        )


if __name__ == "__main__":
    main()
