"""The packed format against the sentences of FORMAT.md and OPS.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bivlm_edge.quant.hadamard import block_hadamard, hadamard_matrix, pack_signs, unpack_signs
from bivlm_edge.quant.packed import (
    CHUNK,
    PANEL,
    BinaryWeight,
    coefficients_per_row,
    pack_coefficients,
    pack_planes,
    packed_bytes,
    padded_columns,
    padded_rows,
    plane_classes,
    unpack_planes,
)


def random_weight(
    n: int,
    k: int,
    plane_columns: tuple[int, ...],
    *,
    hadamard_block: int = 0,
    order: str | None = None,
    seed: int = 0,
) -> BinaryWeight:
    rng = np.random.default_rng(seed)
    kp = padded_columns(k)
    entries = {None: 0, "columns": kp, "chunks": kp // CHUNK}[order]
    permutation = rng.permutation(entries).astype(np.uint16) if order else None
    planes = [rng.random((n, width)) < 0.5 for width in plane_columns]
    if hadamard_block == 0 and k != kp:
        positions = np.arange(kp) if permutation is None else permutation
        if len(positions) != kp:
            positions = (positions[:, None].astype(int) * CHUNK + np.arange(CHUNK)).reshape(kp)
        for plane in planes:
            plane[:, (positions >= k)[: plane.shape[1]]] = False
    slots = coefficients_per_row(plane_columns)
    return BinaryWeight(
        n=n,
        k=k,
        plane_columns=plane_columns,
        codes=pack_planes(planes),
        coefficients=pack_coefficients(rng.normal(size=(n, slots)).astype(np.float16)),
        hadamard_block=hadamard_block,
        signs=pack_signs(rng.random(kp) < 0.5) if hadamard_block else None,
        order=permutation,
    )


def test_single_plane_worked_example() -> None:
    plane = np.zeros((1, 64), dtype=np.bool_)
    plane[0, 5] = True
    expected = np.zeros((1, 128), dtype=np.uint8)
    expected[0, 1] = 2
    np.testing.assert_array_equal(pack_planes([plane]), expected)


def test_pair_block_worked_example() -> None:
    low, high = np.zeros((2, 1, 64), dtype=np.bool_)
    high[0, 21] = True
    expected = np.zeros((1, 256), dtype=np.uint8)
    expected[0, 65] = 8
    np.testing.assert_array_equal(pack_planes([low, high]), expected)


@pytest.mark.parametrize(
    ("row", "column", "planes", "plane", "byte", "bit"),
    [
        # three planes: the pair block takes 256 bytes, the single block follows
        (0, 0, 3, 2, 256, 0),
        (3, 63, 3, 2, 256 + 64 * 1 + 4 * 3 + 3, 7),  # 63 = 32*1 + 4*7 + 3
        (15, 34, 3, 1, 64 * 2 + 4 * 15 + 2, 1),  # 34 = 16*2 + 4*0 + 2, bit 2*0 + 1
        # four planes: two pair blocks
        (7, 9, 4, 2, 256 + 64 * 0 + 4 * 7 + 1, 4),  # 9 = 4*2 + 1, bit 2*2
        (7, 9, 4, 3, 256 + 64 * 0 + 4 * 7 + 1, 5),
    ],
)
def test_one_bit_lies_where_the_format_says(
    row: int, column: int, planes: int, plane: int, byte: int, bit: int
) -> None:
    bits = [np.zeros((PANEL, CHUNK), dtype=np.bool_) for _ in range(planes)]
    bits[plane][row, column] = True
    codes = pack_planes(bits)
    assert codes.shape == (1, 128 * planes)
    assert np.flatnonzero(codes[0]).tolist() == [byte]
    assert codes[0, byte] == 1 << bit


def test_chunks_follow_each_other_and_rows_beyond_sixteen_open_a_panel() -> None:
    # classes: columns 0..63 have two planes (256 bytes), columns 64..127 have one
    bits = [np.zeros((17, 128), dtype=np.bool_), np.zeros((17, 64), dtype=np.bool_)]
    bits[0][16, 64 + 5] = True
    codes = pack_planes(bits)
    assert codes.shape == (2, 2 * 192)
    assert np.argwhere(codes).tolist() == [[1, 256 + 1]]
    assert codes[1, 257] == 2


@pytest.mark.parametrize(
    ("n", "plane_columns"),
    [(1, (64,)), (16, (128, 64)), (17, (192, 192, 64)), (33, (256, 192, 128, 64)), (5, (64,) * 4)],
)
def test_unpacking_returns_the_packed_planes(n: int, plane_columns: tuple[int, ...]) -> None:
    rng = np.random.default_rng(n)
    planes = [rng.random((n, width)) < 0.5 for width in plane_columns]
    unpacked = unpack_planes(pack_planes(planes), n, plane_columns)
    for plane, got in zip(planes, unpacked, strict=True):
        np.testing.assert_array_equal(got, plane)


def test_classes_have_falling_planes_and_empty_ones_do_not_exist() -> None:
    assert plane_classes((256, 192, 64)) == [(3, 0, 64, 0), (2, 64, 192, 3), (1, 192, 256, 5)]
    assert plane_classes((128, 128, 64)) == [(3, 0, 64, 0), (2, 64, 128, 3)]
    assert plane_classes((128, 128)) == [(2, 0, 128, 0)]
    assert coefficients_per_row((256, 192, 64)) == 6


def test_size_of_the_formats_example() -> None:
    weight = random_weight(704, 256, (256, 192), hadamard_block=64, order="chunks")
    assert weight.codes.nbytes == 39_424
    assert weight.coefficients.nbytes == 4_224
    assert weight.nbytes == 43_688
    assert weight.true_bits == 43_688 * 8 / 180_224
    assert weight.nbytes == packed_bytes(704, 256, (256, 192), hadamard_block=64, order_entries=4)


def reference_product(weight: BinaryWeight, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """OPS.md, sentence by sentence, in float64 and plain loops over the channels."""
    kp = padded_columns(weight.k)
    u = np.zeros(kp)
    u[: weight.k] = x
    block = weight.hadamard_block
    if block:
        assert weight.signs is not None
        for j in range(kp):
            u[j] *= 1 if weight.signs[j // 8] >> (j % 8) & 1 else -1
        matrix = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
        for start in range(0, kp, block):
            u[start : start + block] = np.array(matrix) @ u[start : start + block] / block**0.5
    order = weight.order
    if order is None:
        v = u
    elif len(order) == kp:
        v = np.array([u[order[j]] for j in range(kp)])
    else:
        v = np.concatenate([u[64 * int(c) : 64 * int(c) + 64] for c in order])
    widths = [*weight.plane_columns, 0]
    planes = unpack_planes(weight.codes, weight.n, weight.plane_columns)
    y = np.zeros(weight.n)
    for i in range(weight.n):
        slot = 0
        for c in range(len(weight.plane_columns), 0, -1):
            columns = range(widths[c], widths[c - 1])
            for p in range(c if columns else 0):
                alpha = float(weight.coefficients[i // 16, slot, i % 16])
                y[i] += alpha * sum(v[j] * (1 if planes[p][i, j] else -1) for j in columns)
                slot += 1
    return y


@pytest.mark.parametrize(
    ("n", "k", "plane_columns", "hadamard_block", "order"),
    [
        (3, 64, (64,), 0, None),
        (17, 100, (128, 64), 0, "columns"),
        (5, 130, (192, 192, 64), 64, "chunks"),
        (4, 256, (256, 128, 64, 64), 128, "columns"),
        (2, 1, (64, 64), 64, None),
        (6, 200, (256, 64), 0, "chunks"),
    ],
)
def test_dequantized_weight_and_transform_both_compute_the_operator(
    n: int, k: int, plane_columns: tuple[int, ...], hadamard_block: int, order: str | None
) -> None:
    weight = random_weight(n, k, plane_columns, hadamard_block=hadamard_block, order=order)
    x = np.random.default_rng(1).normal(size=k)
    expected = reference_product(weight, x)
    dense = weight.dequantize()
    assert dense.shape == (n, k)
    assert dense.dtype == np.float32
    # float32 roundings of the weights and activations, 2^-24 each, in at most 4 kp terms
    bound = 4 * padded_columns(k) * 2.0**-23 * (np.abs(dense).max() + 1) * (np.abs(x).max() + 1)
    np.testing.assert_allclose(dense.astype(np.float64) @ x, expected, rtol=0, atol=bound)
    v = weight.transform(x.astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(weight.decode().astype(np.float64) @ v, expected, atol=8 * bound)


def test_decoded_value_is_the_float32_sum_of_the_float16_coefficients() -> None:
    weight = random_weight(20, 128, (128, 64))
    planes = unpack_planes(weight.codes, 20, (128, 64))
    a, b, tail = weight.coefficients.transpose(0, 2, 1).reshape(-1, 3)[:20].T.astype(np.float32)
    signs = [np.where(plane, np.float32(1), np.float32(-1)) for plane in planes]
    expected = np.empty((20, 128), dtype=np.float32)
    expected[:, :64] = a[:, None] * signs[0][:, :64] + b[:, None] * signs[1]
    expected[:, 64:] = tail[:, None] * signs[0][:, 64:]
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_hadamard_is_sylvesters_and_its_own_inverse() -> None:
    matrix = hadamard_matrix(64)
    assert matrix[3, 5] == (-1) ** (3 & 5).bit_count() / 8
    values = np.random.default_rng(0).normal(size=(3, 128))
    twice = block_hadamard(block_hadamard(values, 64), 64)
    np.testing.assert_allclose(twice, values, rtol=0, atol=1e-14)  # 64 float64 additions


def test_sign_bits_are_little_endian_and_one_means_plus() -> None:
    signs = np.zeros(64, dtype=np.bool_)
    signs[[0, 9]] = True
    packed = pack_signs(signs)
    assert packed.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(unpack_signs(packed) == 1.0).tolist() == [0, 9]


GOOD = random_weight(17, 100, (128, 64), order="chunks")
ROTATED = random_weight(16, 192, (192,), hadamard_block=64, order="columns")


@pytest.mark.parametrize(
    ("weight", "changes", "words"),
    [
        (GOOD, {"n": 0}, "N = 0"),
        (GOOD, {"plane_columns": ()}, "0 entries"),
        (GOOD, {"plane_columns": (128,) * 5}, "5 entries"),
        (GOOD, {"plane_columns": (64, 64)}, "must begin with 128"),
        (GOOD, {"plane_columns": (128, 192)}, "do not rise"),
        (GOOD, {"plane_columns": (128, 32)}, "multiples of 64"),
        (GOOD, {"codes": GOOD.codes[:1]}, "codes is uint8"),
        (GOOD, {"codes": GOOD.codes.astype(np.int8)}, "codes is int8"),
        (GOOD, {"coefficients": GOOD.coefficients.astype(np.float32)}, "coefficients is float32"),
        (GOOD, {"coefficients": np.full_like(GOOD.coefficients, np.inf)}, "NaN or infinity"),
        (GOOD, {"hadamard_block": 32}, "hadamard_block 32"),
        (ROTATED, {"hadamard_block": 128}, "does not divide 192"),
        (ROTATED, {"hadamard_block": 0}, "no Hadamard block"),
        (ROTATED, {"signs": np.zeros(20, dtype=np.uint8)}, "signs is uint8"),
        (GOOD, {"order": np.zeros(2, dtype=np.uint16)}, "not a permutation"),
        (GOOD, {"order": np.arange(3, dtype=np.uint16)}, "order is uint16"),
        (GOOD, {"codes": GOOD.codes | np.uint8(1)}, "padding"),
    ],
)
def test_parts_that_disagree_are_refused(
    weight: BinaryWeight, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        replace(weight, **changes)


def test_order_of_a_single_chunk_is_a_column_order() -> None:
    weight = random_weight(1, 64, (64,))
    with pytest.raises(ValueError, match="order is uint16"):
        replace(weight, order=np.zeros(1, dtype=np.uint16))
    assert replace(weight, order=np.arange(64, dtype=np.uint16)).nbytes == weight.nbytes + 128


def test_bits_in_padding_columns_are_refused_without_a_hadamard_block() -> None:
    planes = [np.ones((16, 64), dtype=np.bool_)]
    coefficients = pack_coefficients(np.ones((16, 1), dtype=np.float16))
    with pytest.raises(ValueError, match="columns 63 to 63 are padding"):
        BinaryWeight(16, 63, (64,), pack_planes(planes), coefficients)
    BinaryWeight(16, 63, (64,), pack_planes(planes), coefficients, hadamard_block=64)


def test_sizes_are_rounded_up_to_chunks_and_panels() -> None:
    assert [padded_columns(k) for k in (1, 64, 65)] == [64, 64, 128]
    assert [padded_rows(n) for n in (1, 16, 17)] == [16, 16, 32]
