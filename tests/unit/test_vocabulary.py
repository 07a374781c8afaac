"""Token table and head at 8 and at 4 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bivlm_edge.config import VOCABULARY_BITS, QuantConfig
from bivlm_edge.errors import RequestError
from bivlm_edge.quant import vocabulary
from bivlm_edge.quant.vocabulary import GROUPS, group_size, quantize_table, round_vocabulary
from bivlm_edge.quant.weights import GroupWeight, pack_bits


def _table(rows: int = 9, width: int = 64) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.random.default_rng(0).normal(size=(rows, width))
    return values.astype(np.float32)


def _quantized(table: NDArray[np.float32], bits: int) -> GroupWeight:
    weight = quantize_table(table, bits)
    assert weight is not None
    return weight


def test_every_choice_of_the_user_has_groups() -> None:
    assert set(GROUPS) == set(VOCABULARY_BITS)


@pytest.mark.parametrize(
    ("width", "bits", "group"),
    [(896, 8, 64), (896, 4, 32), (48, 8, 16), (48, 4, 16), (40, 4, None)],
)
def test_largest_group_that_divides_the_width(width: int, bits: int, group: int | None) -> None:
    assert group_size(width, bits) == group
    assert (quantize_table(np.ones((2, width), np.float32), bits) is None) == (group is None)


def test_8_bits_round_to_nearest_up_to_the_largest_magnitude() -> None:
    table = _table()
    weight = _quantized(table, 8)
    error = np.abs(weight.dequantize() - table).reshape(9, -1, weight.group)
    # half a step, and the rounding of the float16 scale at the last code
    assert (error <= weight.scale.astype(np.float32)[..., np.newaxis] * 0.57).all()


def test_4_bits_err_less_than_either_plain_scale() -> None:
    table = _table(rows=200)
    weight = _quantized(table, 4)
    assert weight.group == 32
    blocks = table.reshape(200, -1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., np.newaxis], -1)
    found = np.square(weight.dequantize() - table).sum()
    for scale, lowest in ((np.abs(extreme) / 7, -7), (extreme / -8, -8)):
        plain = np.clip(np.rint(blocks / scale), lowest, 7) * scale
        assert found < 0.95 * np.square(plain - blocks).sum()


def test_4_bits_are_exact_on_their_own_grid() -> None:
    """A group that holds both ends of the codes, with a scale of either sign."""
    codes = np.random.default_rng(0).integers(-8, 8, (4, 32)).astype(np.float32)
    codes[:, 0] = -8
    table = codes * np.array([[0.5], [-0.5], [2.0], [-0.25]], np.float32)
    np.testing.assert_array_equal(_quantized(table, 4).dequantize(), table)


@pytest.mark.parametrize("bits", VOCABULARY_BITS)
def test_rows_are_rounded_alike_in_any_portion(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table()
    table[4] = 0  # an unused token
    whole = _quantized(table, bits)
    monkeypatch.setattr(vocabulary, "_ROWS_AT_ONCE", 4)
    portions = _quantized(table, bits)
    np.testing.assert_array_equal(portions.codes, whole.codes)
    np.testing.assert_array_equal(portions.scale, whole.scale)
    assert not whole.dequantize()[4].any()


def test_tied_table_and_head_stay_one_weight() -> None:
    class Model(torch.nn.Module):
        def __init__(self, *, tied: bool) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(8, 32), torch.nn.Linear(32, 8)
            if tied:
                self.head.weight = self.table.weight

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.table

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    for tied in (True, False):
        model = Model(tied=tied)
        rounded = round_vocabulary(model, 4)
        assert rounded is not None
        table, head = rounded
        assert (table is head) == tied
        np.testing.assert_array_equal(model.table.weight.detach().numpy(), table.dequantize())
        np.testing.assert_array_equal(model.head.weight.detach().numpy(), head.dequantize())


def test_size_counts_codes_scales_and_zero_points() -> None:
    assert _quantized(_table(), 8).true_bits == 8 + 16 / 64 + 8 / 64
    assert _quantized(_table(), 4).true_bits == 4 + 16 / 32 + 4 / 32


def test_codes_are_packed_lowest_bits_first() -> None:
    codes = np.array([[1, 2, 3]], np.uint8)
    assert pack_bits(codes, 8).tolist() == [[1, 2, 3]]
    assert pack_bits(codes, 4).tolist() == [[0x21, 0x03]]
    assert pack_bits(codes, 2).tolist() == [[0b00_11_10_01]]


def test_other_bits_are_refused() -> None:
    with pytest.raises(RequestError, match=r"--vocabulary-bits 3 is not known. Accepted: 8, 4"):
        QuantConfig(vocabulary_bits=3)
    with pytest.raises(RequestError, match="--vocabulary-bits 4 does not go with --method none"):
        QuantConfig(method="none", vocabulary_bits=4)
