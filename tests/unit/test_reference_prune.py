"""The numpy reference of TokenPrune against the sentences of OPS.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bivlm_edge.export import reference_prune

Array = NDArray[Any]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123, kat_vectors
        ([0] * 4, [0] * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: tuple[int, ...]) -> None:
    assert reference_prune.philox4x32_10(counter, key) == words


def _tokens(count: int, batch: int = 1) -> Array:
    rows = np.arange(batch * count * 2, dtype=np.float32)
    return rows.reshape(batch, count, 2) + 1


def _kept(scores: list[float], segments: list[int] | None = None, **given: Any) -> list[int]:
    """Return the kept indices of one row."""
    keep = given.pop("keep", None)
    given = {"mode": "topk_score"} | given
    _, indices, lengths, _ = reference_prune.token_prune(
        given.pop("hidden", _tokens(len(scores))),
        np.array([scores], dtype=np.float32),
        None if segments is None else np.array([segments], dtype=np.int32),
        None if keep is None else np.array(keep),
        **given,
    )
    assert lengths.tolist() == [indices.shape[1]]
    row: list[int] = indices[0].tolist()
    return row


NAN, INF = math.nan, math.inf
GREEDY = ("maxmin", "mmr", "dpp", "coverage")
MODES = (*GREEDY, "topk_score", "uniform", "random")


def test_row_without_prunable_tokens_is_the_identity() -> None:
    assert _kept([1, 2, 3], [-1, -1, -1], keep=0) == [0, 1, 2]
    assert _kept([1], [-1], keep_count=1, mode="mmr") == [0]


def test_keep_zero_drops_every_image_token() -> None:
    assert _kept([1, 2, 3], keep=0) == []
    assert _kept([1, 2, 3], [0, -1, 0], keep=0) == [1]
    assert _kept([1, 2, 3], keep_count=0, min_keep=0) == []


def test_min_keep_bounds_the_attributes_but_not_the_input() -> None:
    assert len(_kept([1, 2, 3], keep_count=0)) == 1
    assert len(_kept([1, 2, 3, 4], keep_ratio=0.25, min_keep=2)) == 2
    assert len(_kept([1, 2, 3, 4], keep=1, min_keep=2)) == 1


def test_ratio_rounds_up_but_not_for_the_float32_of_a_tenth() -> None:
    assert len(_kept([0.0] * 30, keep_ratio=0.1)) == 3
    assert len(_kept([0.0] * 31, keep_ratio=0.1)) == 4


def test_keep_of_n_or_more_and_no_request_are_the_identity() -> None:
    for given in ({"keep": 3}, {"keep": 99}, {"keep_count": 3}, {"keep_ratio": 1.0}, {}):
        for mode in MODES:
            assert _kept([NAN, 1, 2], mode=mode, **given) == [0, 1, 2]
    assert _kept([1, 2, 3], [0, -2, 0], keep=1, mode="none") == [0, 2]


def test_nan_scores_go_first_and_infinity_stays() -> None:
    assert _kept([NAN, 1, NAN, INF, -INF], keep=2) == [1, 3]
    assert _kept([NAN, -INF, 0], keep=2) == [0, 2]
    assert _kept([NAN] * 6, keep=2) == [1, 4]
    assert _kept([NAN] * 6, keep=2) == _kept([1.0] * 6, keep=2, mode="uniform")


def test_minus_zero_equals_zero_and_ties_go_to_the_lower_index() -> None:
    assert _kept([-0.0, 0.0, 0.0], keep=2) == [0, 1]


def test_uniform_takes_the_middle_of_equal_parts() -> None:
    assert _kept([0] * 10, keep=3, mode="uniform") == [1, 5, 8]


def test_maxmin_starts_with_the_best_score_or_the_longest_row() -> None:
    hidden = np.array([[[1, 0], [0, 1], [4, 0], [-1, 0]]], dtype=np.float32)
    assert _kept([0, 9, 1, 2], hidden=hidden, mode="maxmin", keep=1) == [1]
    result = reference_prune.token_prune(hidden, keep=np.array(2), mode="maxmin")
    assert result.kept_indices.tolist() == [[2, 3]]


def test_mmr_weighs_score_against_similarity() -> None:
    hidden = np.array([[[1, 0], [1, 0], [0, 1]]], dtype=np.float32)
    given: dict[str, Any] = {"hidden": hidden, "mode": "mmr", "keep": 2}
    assert _kept([1.0, 0.9, 0.0], theta=0.5, **given) == [0, 2]
    assert _kept([1.0, 0.9, 0.0], theta=1.0, **given) == [0, 1]


@pytest.mark.parametrize("mode", ["maxmin", "mmr"])
def test_rows_without_direction_resemble_nothing(mode: str) -> None:
    hidden = np.array([[[2, 0], [1, 0], [NAN, 0], [0, 0]]], dtype=np.float32)
    assert _kept([1, 1, 1, 1], hidden=hidden, mode=mode, keep=3) == [0, 2, 3]


@pytest.mark.parametrize("mode", ["dpp", "coverage"])
def test_rows_without_direction_add_nothing(mode: str) -> None:
    hidden = np.array([[[NAN, 0], [0, 0], [2, 0], [0, 1]]], dtype=np.float32)
    assert _kept([1, 1, 1, 1], hidden=hidden, mode=mode, keep=2) == [2, 3]
    assert _kept([1, 1, 1, 1], hidden=hidden, mode=mode, keep=3) == [0, 2, 3]


@pytest.mark.parametrize("mode", GREEDY)
def test_duplicates_are_not_chosen_twice(mode: str) -> None:
    hidden = np.tile(np.eye(5, dtype=np.float32), (4, 1))[None]
    for similarity in ("cosine", "dot"):
        kept = _kept([1.0] * 20, hidden=hidden, mode=mode, keep=10, similarity=similarity)
        # one of each first, then the lowest of what is left
        assert kept == list(range(10))


@pytest.mark.parametrize("seed", range(4))
def test_dpp_of_more_tokens_than_rank_goes_on_with_maxmin(seed: int) -> None:
    hidden = np.random.default_rng(seed).standard_normal((1, 64, 16)).astype(np.float32)
    given: dict[str, Any] = {"hidden": hidden, "mode": "dpp", "order": "score"}
    kept = _kept([1.0] * 64, keep=32, **given)
    assert len(set(kept)) == 32
    rows = hidden[0] / np.linalg.norm(hidden[0], axis=1, keepdims=True)
    assert np.linalg.matrix_rank(rows[kept[:16]], tol=1e-3) == 16
    nearest = (rows @ rows[kept[:16]].T).max(axis=1)
    nearest[kept[:16]] = INF
    assert kept[16] == np.argmin(nearest)


@pytest.mark.parametrize("theta", [0.0, 0.5, 0.9])
def test_dpp_takes_the_largest_determinant(theta: float) -> None:
    rng = np.random.default_rng(3)
    hidden, scores = rng.standard_normal((1, 12, 8)).astype(np.float32), rng.random(12)
    given: dict[str, Any] = {"hidden": hidden, "mode": "dpp", "order": "score", "theta": theta}
    kept = _kept(scores.tolist(), keep=6, **given)
    rows = hidden[0] / np.linalg.norm(hidden[0], axis=1, keepdims=True)
    z = (scores - scores.min()) / (scores.max() - scores.min())
    weight = np.exp(z * theta / (2 * (1 - theta)))
    kernel = weight[:, None] * (rows @ rows.T) * weight
    for step in range(6):
        others = [t for t in range(12) if t not in kept[:step]]
        sets = [[*kept[:step], t] for t in others]
        determinants = [np.linalg.det(kernel[np.ix_(chosen, chosen)]) for chosen in sets]
        assert others[int(np.argmax(determinants))] == kept[step]


def test_dpp_with_theta_one_weighs_by_the_score_alone() -> None:
    hidden = np.eye(4, dtype=np.float32)[None]
    given: dict[str, Any] = {"hidden": hidden, "mode": "dpp", "order": "score", "theta": 1.0}
    assert _kept([3.0, 9.0, 1.0, 5.0], keep=3, **given) == [1, 3, 0]


@pytest.mark.parametrize("weighted", [False, True])
def test_coverage_takes_the_largest_gain(weighted: bool) -> None:
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((1, 12, 4)).astype(np.float32)
    scores = rng.random((1, 12), dtype=np.float32)
    kept = reference_prune.token_prune(
        hidden, scores if weighted else None, mode="coverage", keep_count=5, order="score"
    ).kept_indices[0]
    rows = hidden[0] / np.linalg.norm(hidden[0], axis=1, keepdims=True)
    z = (scores[0] - scores.min()) / (scores.max() - scores.min()) if weighted else np.ones(12)

    def covered(chosen: list[int]) -> float:
        return float(z @ (rows @ rows[chosen].T).max(axis=1).clip(0))

    for step in range(5):
        taken = kept[:step].tolist()
        gains = [-1.0 if t in taken else covered([*taken, t]) for t in range(12)]
        assert kept[step] == np.argmax(gains)


def test_first_token_of_maxmin() -> None:
    hidden = np.array([[[1, 0], [3, 1], [9, 0], [0, 4]]], dtype=np.float32)
    given: dict[str, Any] = {"hidden": hidden, "mode": "maxmin", "keep": 1}
    for first, token in (("auto", 1), ("max_score", 1), ("max_norm", 2), ("farthest", 3)):
        assert _kept([0, 9, 1, 2], first=first, **given) == [token]
    # scores that do not count do not send it to `uniform`
    assert _kept([NAN] * 4, first="max_norm", **given) == [2]
    assert _kept([NAN] * 4, first="auto", **given) == [2]  # (2 * 0 + 1) * 4 // 2


def test_dot_similarity_knows_lengths() -> None:
    hidden = np.array([[[4, 0], [1, 0], [0, 2], [1, 1]]], dtype=np.float32)
    given: dict[str, Any] = {"hidden": hidden, "mode": "maxmin", "keep": 3}
    assert _kept([9, 0, 0, 0], similarity="cosine", **given) == [0, 2, 3]
    assert _kept([9, 0, 0, 0], similarity="dot", **given) == [0, 1, 2]


@pytest.mark.parametrize(("how", "kept"), [("mean", [0]), ("sum", [0]), ("max", [1])])
def test_scores_of_heads_are_reduced(how: str, kept: list[int]) -> None:
    scores = np.array([[[3, 0, 0], [3, 5, 0], [3, 3, NAN]]], dtype=np.float32)
    given: dict[str, Any] = {"mode": "topk_score", "keep_count": 1, "score_reduce": how}
    result = reference_prune.token_prune(_tokens(3), scores, **given)
    assert result.kept_indices.tolist() == [kept]
    scores[0, 0] = NAN
    result = reference_prune.token_prune(_tokens(3), scores, **given)
    assert result.kept_indices.tolist() == [[1]]  # (2 * 0 + 1) * 3 // 2


def test_two_images_have_quotas_of_their_own() -> None:
    segments = np.array([[0, 0, 0, -1, 1, 1, 1], [1, 1, 0, 0, 0, -1, -1]], dtype=np.int32)
    scores = np.array([[9, 8, 7, 0, 1, 2, 3], [1, 2, 3, 4, 5, 0, 0]], dtype=np.float32)
    hidden = _tokens(7, batch=2)

    def kept(keep: Any) -> list[list[int]]:
        result = reference_prune.token_prune(
            hidden, scores, segments, np.array(keep), mode="topk_score"
        )
        rows = zip(result.kept_indices, result.lengths, strict=True)
        return [row[:length].tolist() for row, length in rows]

    assert kept([[1]]) == [[0, 3, 6], [1, 4, 5, 6]]
    assert kept([1, 2]) == [[0, 3, 6], [0, 1, 3, 4, 5, 6]]
    assert kept([[2, 0], [0, 1]]) == [[0, 1, 3], [1, 5, 6]]
    for wrong in ([1, 1, 1], [[1, 1]], [[1], [1]], [[1, 1], [1, -1]]):
        with pytest.raises(ValueError, match="TokenPrune: keep"):
            kept(wrong)


def test_metric_of_int8_stands_for_its_values() -> None:
    metric = np.array([[[100, 0], [3, 0], [0, -128]]], dtype=np.int8)
    result = reference_prune.token_prune(
        _tokens(3), keep=np.array(2), metric=metric, mode="maxmin", merge="mean"
    )
    assert result.kept_indices.tolist() == [[0, 2]]
    assert result.token_map.tolist() == [[0, 0, 1]]


def test_order_of_scores_shares_the_slots_of_a_segment() -> None:
    segments = [0, -1, 0, 1, 1, -1, 0]
    kept = _kept([1, 0, 2, 3, 4, 0, 5], segments, keep=2, order="score")
    assert kept == [1, 6, 3, 4, 5, 2]  # all of image 1 are kept: the identity
    assert _kept([1, 0, 2, 3, 4, 0, 5], segments, keep=9, order="score") == list(range(7))


def test_merging_averages_into_the_most_similar_kept_token() -> None:
    hidden = np.array([[[4, 0], [0, 8], [2, 1], [1, 9], [0, 4], [5, 5]]], dtype=np.float32)
    scores = np.array([[9, 8, 3, 4, 2, 0]], dtype=np.float32)
    segments = np.array([[0, 0, 0, 0, 0, -1]], dtype=np.int32)
    given: dict[str, Any] = {"mode": "topk_score", "keep_count": 2}
    mean = reference_prune.token_prune(hidden, scores, segments, merge="mean", **given)
    assert mean.token_map.tolist() == [[0, 1, 0, 1, 1, 2]]
    expected = np.array([[3, 0.5], [1 / 3, 7], [5, 5]], dtype=np.float32)
    np.testing.assert_array_equal(mean.pruned[0], expected)
    weighted = reference_prune.token_prune(
        hidden, scores, segments, merge="score_weighted", **given
    )
    assert weighted.token_map.tolist() == mean.token_map.tolist()
    z = np.array([1, 6 / 7, 1 / 7, 2 / 7, 0])
    expected[0] = (hidden[0, 0] + z[2] * hidden[0, 2]) / (1 + z[2])
    expected[1] = (hidden[0, 1] + z[3] * hidden[0, 3]) / (1 + z[3])
    np.testing.assert_allclose(weighted.pruned[0], expected, rtol=1e-6)


def test_what_cannot_be_merged_is_dropped() -> None:
    hidden = np.array([[[4, 1], [NAN, 1], [0, 0], [2, 0], [INF, 0]]], dtype=np.float32)
    scores = np.array([[9, 0, 0, 0, 0]], dtype=np.float32)
    given: dict[str, Any] = {"mode": "topk_score", "keep_count": 1, "merge": "mean"}
    result = reference_prune.token_prune(hidden, scores, **given)
    assert result.token_map.tolist() == [[0, -1, -1, 0, -1]]
    np.testing.assert_array_equal(result.pruned, [[[3, 0.5]]])
    metric = np.array([[[0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]], dtype=np.float32)
    result = reference_prune.token_prune(hidden, scores, metric=metric, **given)
    assert result.token_map.tolist() == [[0, -1, -1, -1, -1]]
    np.testing.assert_array_equal(result.pruned, hidden[:, :1])
    result = reference_prune.token_prune(hidden, scores, keep=np.array(0), **given)
    assert result.token_map.tolist() == [[-1] * 5]


def test_random_depends_on_seed_and_segment_only() -> None:
    def draw(seed: int, segment: int) -> list[int]:
        given = {"mode": "random", "keep": 10, "seed": seed}
        return _kept([0] * 100, [segment] * 100, **given)

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, group)) for seed in (0, 1, 1 << 32) for group in (0, 1)}) == 6


def test_rows_of_a_batch_are_padded_on_the_right() -> None:
    hidden = _tokens(4, batch=2)
    segments = np.array([[0, 0, -2, -1], [-1, 3, 3, 5]], dtype=np.int32)
    scores = np.array([[1, 2, 9, 0], [0, 1, 2, 0]], dtype=np.float32)
    pruned, indices, lengths, token_map = reference_prune.token_prune(
        hidden, scores, segments, np.array([1]), mode="topk_score"
    )
    assert token_map.tolist() == [[-1, 0, -1, 1], [0, -1, 1, 2]]
    assert lengths.tolist() == [2, 3]
    assert indices.tolist() == [[1, 3, 0], [0, 2, 3]]
    np.testing.assert_array_equal(pruned[0], [hidden[0, 1], hidden[0, 3], [0, 0]])
    np.testing.assert_array_equal(pruned[1], hidden[1, [0, 2, 3]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "attention"},
        {"merge": "sum"},
        {"order": "random"},
        {"first": "last"},
        {"similarity": "l2"},
        {"score_reduce": "min"},
        {"keep": -1},
        {"keep_count": -2},
        {"keep_ratio": 1.5},
        {"keep_ratio": NAN},
        {"theta": -0.1},
        {"segments": [0, -3, 0]},
    ],
)
def test_requests_outside_the_contract_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="TokenPrune"):
        _kept([1, 2, 3], **wrong)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "topk_score"},
        {"mode": "mmr"},
        {"mode": "maxmin", "first": "max_score"},
        {"mode": "uniform", "merge": "score_weighted"},
    ],
)
def test_modes_without_their_scores_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs scores"):
        reference_prune.token_prune(_tokens(3), keep_count=1, **given)
