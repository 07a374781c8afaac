"""Positions of tokens: one axis, or those of Qwen2.5-VL against transformers."""

from __future__ import annotations

import numpy as np
import pytest

from bivlm_edge.positions import position_rows, without_gaps

IMAGE = 3


def test_without_a_grid_tokens_are_counted() -> None:
    rows, following = position_rows(np.array([5, IMAGE, 7]), 4, IMAGE, None)
    np.testing.assert_array_equal(rows, [[4, 5, 6]])
    assert following == 7


def test_text_on_a_grid_has_the_same_position_on_all_axes() -> None:
    rows, following = position_rows(np.array([9]), 11, IMAGE, (2, 3))
    np.testing.assert_array_equal(rows, np.full((3, 1, 1), 11))
    assert following == 12


def test_a_picture_takes_rows_and_columns_and_as_many_positions_as_its_longer_side() -> None:
    rows, following = position_rows(np.array([9, *[IMAGE] * 6, 9]), 0, IMAGE, (2, 3))
    wanted = [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    np.testing.assert_array_equal(rows[:, 0], wanted)
    assert following == 5


@pytest.mark.parametrize("prompt", ["i", "aib", "iaibc", "abibcid", "abc"])
def test_positions_are_those_of_transformers(prompt: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    grid = (2, 3)
    ids = [token for mark in prompt for token in ([IMAGE] * 6 if mark == "i" else [ord(mark)])]
    config = transformers.Qwen2_5_VLConfig(
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32},
        text_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 128,
        },
    )
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).model
    tokens = torch.tensor([ids])
    wanted, delta = model.get_rope_index(
        tokens,
        (tokens == IMAGE).int(),
        torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * prompt.count("i")),
    )
    rows, following = position_rows(np.array(ids), 0, IMAGE, grid)
    np.testing.assert_array_equal(rows, wanted.numpy())
    assert following == len(ids) + int(delta)


def test_gaps_on_one_axis_close() -> None:
    rows = np.arange(5, 12)[np.newaxis]
    left, following = without_gaps(rows, np.array([0, 1, 4, 6]))
    assert left.tolist() == [[5, 6, 7, 8]]
    assert following == 9
    left, following = without_gaps(rows, np.array([3]))
    assert (left.tolist(), following) == ([[5]], 6)
    left, following = without_gaps(rows, np.arange(7))
    assert (left.tolist(), following) == (rows.tolist(), 12)
    left, following = without_gaps(rows, np.array([], dtype=np.int64))
    assert (left.size, following) == (0, 5)


def test_a_grid_keeps_its_rows_and_columns_and_text_moves_up() -> None:
    ids = np.array([1, *[IMAGE] * 9, 2, 4])
    rows, _ = position_rows(ids, 4, IMAGE, (3, 3))
    # row 0, column 2 and row 1, column 0 stay: the largest position left is that of column 2
    left, following = without_gaps(rows, np.array([0, 3, 4, 10, 11]))
    assert left[:, 0].T.tolist() == [[4] * 3, [5, 5, 7], [5, 6, 5], [8] * 3, [9] * 3]
    assert following == 10
    # only the first token of the picture stays
    left, following = without_gaps(rows, np.array([0, 1, 10, 11]))
    assert left[:, 0].T.tolist() == [[4] * 3, [5] * 3, [6] * 3, [7] * 3]
    assert following == 8
