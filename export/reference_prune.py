"""`TokenPrune` of OPS.md in numpy, as plain as the text; see reference.py.

Everything is float64 but what OPS.md rounds to float32: reduced scores, similarities, residuals,
gains and merged tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.export.schemas import (
    PRUNE_FIRST,
    PRUNE_MERGES,
    PRUNE_MODES,
    PRUNE_ORDERS,
    PRUNE_SCORE_REDUCTIONS,
    PRUNE_SIMILARITIES,
)

Array = NDArray[Any]
Floats = NDArray[np.float64]

_LARGEST = float(np.finfo(np.float32).max)


class Pruned(NamedTuple):
    """The outputs of the operator."""

    pruned: Array
    kept_indices: NDArray[np.int64]
    lengths: NDArray[np.int64]
    token_map: NDArray[np.int64]


def token_prune(
    hidden: Array,
    scores: Array | None = None,
    segments: Array | None = None,
    keep: Array | None = None,
    metric: Array | None = None,
    *,
    mode: str = "mmr",
    keep_count: int = -1,
    keep_ratio: float = -1.0,
    min_keep: int = 1,
    theta: float = 0.5,
    seed: int = 0,
    score_reduce: str = "mean",
    first: str = "auto",
    similarity: str = "cosine",
    merge: str = "none",
    order: str = "input",
) -> Pruned:
    """Return `pruned`, `kept_indices`, `lengths` and `token_map`.

    Raises:
        ValueError: The request is none of OPS.md.
    """
    _check_words(mode, score_reduce, first, similarity, merge, order)
    _check_scores(scores is not None, mode, first, merge)
    if keep_count < -1:
        raise ValueError(f"TokenPrune: keep_count is {keep_count}")
    if not (keep_ratio == -1 or 0 <= keep_ratio <= 1) or not 0 <= theta <= 1:
        raise ValueError(f"TokenPrune: keep_ratio {keep_ratio} or theta {theta} outside 0..1")
    batch, tokens, width = hidden.shape
    groups = np.zeros((batch, tokens), dtype=np.int64) if segments is None else segments
    if (groups < -2).any():
        raise ValueError("TokenPrune: a segment id is below -2")
    if keep is not None:
        keep = np.asarray(keep)
        if (keep < 0).any():
            raise ValueError(f"TokenPrune: keep is {keep.min()}")
        if keep.size != 1 and (keep.ndim not in (1, 2) or len(keep) != batch):
            raise ValueError(f"TokenPrune: keep has shape {keep.shape}: one, [B] or [B, G] counts")
    features = hidden if metric is None else metric
    reduced = None if scores is None else _reduced(scores, score_reduce)
    theta = float(np.float32(theta))

    kept: list[list[int]] = []
    merges: list[dict[int, tuple[int, float]]] = []  # of each row: token -> (kept token, weight)
    for b in range(batch):
        row = [t for t in range(tokens) if groups[b, t] == -1]
        slots: list[tuple[list[int], list[int]]] = []
        merges.append({})
        for g in sorted({int(group) for group in groups[b] if group >= 0}):
            members = np.flatnonzero(groups[b] == g)
            given = None if keep is None else _wanted(keep, b, g)
            k = _count(len(members), given, keep_count, keep_ratio, min_keep, mode)
            s = None if reduced is None else reduced[b, members]
            alike = _similarity(features[b, members], similarity)
            chosen = list(_select(mode, k, s, alike, theta, seed, g, first))
            row += [int(members[t]) for t in chosen]
            slots.append(
                ([int(members[t]) for t in chosen], sorted(int(members[t]) for t in chosen))
            )
            if merge != "none" and k < len(members):
                weights = np.ones(len(members))
                if merge == "score_weighted":
                    assert s is not None
                    weights = _relevance(np.where(np.isnan(s), -np.inf, s).astype(np.float64))
                usable = alike.usable & np.isfinite(hidden[b, members]).all(axis=1)
                for t, best in _targets(sorted(chosen), alike, usable).items():
                    merges[b][int(members[t])] = (int(members[best]), float(weights[t]))
        row.sort()
        if order == "score":
            place = {token: slot for slot, token in enumerate(row)}
            for ranked, rising in slots:
                for token, slot in zip(ranked, [place[t] for t in rising], strict=True):
                    row[slot] = token
        kept.append(row)

    lengths = np.array([len(row) for row in kept], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    pruned = np.zeros((batch, longest, width), dtype=hidden.dtype)
    indices = np.zeros((batch, longest), dtype=np.int64)
    token_map = np.full((batch, tokens), -1, dtype=np.int64)
    for b, row in enumerate(kept):
        pruned[b, : len(row)] = hidden[b, row]
        indices[b, : len(row)] = row
        token_map[b, row] = np.arange(len(row))
        for slot, token in enumerate(row):
            parts = [(t, weight) for t, (into, weight) in merges[b].items() if into == token]
            if not parts:
                continue
            total, sum_of_weights = hidden[b, token].astype(np.float64), 1.0
            for t, weight in sorted(parts):
                total = total + weight * hidden[b, t].astype(np.float64)
                sum_of_weights += weight
                token_map[b, t] = slot
            pruned[b, slot] = (total / sum_of_weights).astype(np.float32).astype(hidden.dtype)
    return Pruned(pruned, indices, lengths, token_map)


def _check_words(
    mode: str, score_reduce: str, first: str, similarity: str, merge: str, order: str
) -> None:
    for name, word, words in (
        ("mode", mode, PRUNE_MODES),
        ("score_reduce", score_reduce, PRUNE_SCORE_REDUCTIONS),
        ("first", first, PRUNE_FIRST),
        ("similarity", similarity, PRUNE_SIMILARITIES),
        ("merge", merge, PRUNE_MERGES),
        ("order", order, PRUNE_ORDERS),
    ):
        if word not in words:
            raise ValueError(f"TokenPrune: {name} '{word}' is none of {', '.join(words)}")


def _check_scores(given: bool, mode: str, first: str, merge: str) -> None:
    for name, word, needs in (
        ("mode", mode, mode in ("topk_score", "mmr")),
        ("first", first, mode == "maxmin" and first == "max_score"),
        ("merge", merge, merge == "score_weighted"),
    ):
        if needs and not given:
            raise ValueError(f"TokenPrune: {name} '{word}' needs scores")


def _wanted(keep: Array, row: int, group: int) -> int:
    """Return what `keep` says of a segment of a row."""
    if keep.size == 1:
        return int(keep.reshape(()))
    if keep.ndim == 1:
        return int(keep[row])
    if group >= keep.shape[1]:
        raise ValueError(f"TokenPrune: keep has counts of {keep.shape[1]} segments, not {group}")
    return int(keep[row, group])


def _reduced(scores: Array, how: str) -> NDArray[np.float32]:
    """Return scores `[B, S]`; a NaN in any head gives NaN."""
    if scores.ndim == 2:
        return scores.astype(np.float32)
    heads = scores.shape[1]
    if heads == 0:
        raise ValueError("TokenPrune: scores of 0 heads")
    total = scores[:, 0].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, as OPS.md says
        for h in range(1, heads):
            total = np.maximum(total, scores[:, h]) if how == "max" else total + scores[:, h]
        return (total / heads if how == "mean" else total).astype(np.float32)


def _count(
    n: int, keep: int | None, keep_count: int, keep_ratio: float, min_keep: int, mode: str
) -> int:
    if mode == "none":
        return n
    if keep is not None:
        return min(n, keep)
    if keep_count != -1:
        return min(n, max(min_keep, keep_count))
    if keep_ratio != -1:
        return min(n, max(min_keep, math.ceil(n * float(np.float32(keep_ratio)) - 1e-6)))
    return n


class _Similarity(NamedTuple):
    between: Floats  # (n, n), values of float32
    squares: Floats  # (n,) squared norms, 0 where not usable
    usable: NDArray[np.bool_]  # (n,) what has a direction


def _similarity(metric: Array, kind: str) -> _Similarity:
    rows = metric.astype(np.float64)
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    squares = (rows**2).sum(axis=1)
    with np.errstate(over="ignore"):
        lengths = np.sqrt(squares).astype(np.float32)
    usable = np.isfinite(lengths) & (lengths > 0)
    rows = np.where(usable[:, None], rows, 0.0)
    squares = np.where(usable, squares, 0.0)
    dots = rows @ rows.T
    if kind == "cosine":
        dots /= np.sqrt(np.where(usable, squares, 1)[:, None] * np.where(usable, squares, 1))
    between = dots.clip(-_LARGEST, _LARGEST).astype(np.float32).astype(np.float64)
    return _Similarity(between, squares, usable)


def _select(
    mode: str,
    k: int,
    scores: Array | None,
    alike: _Similarity,
    theta: float,
    seed: int,
    group: int,
    first: str,
) -> Sequence[int]:
    """Return k positions inside a segment, in the order of their choice."""
    n = len(alike.squares)
    if k == n:
        return range(n)
    if k == 0:
        return []
    by_score = first == "max_score" or (first == "auto" and scores is not None)
    if scores is not None and (
        mode in ("topk_score", "mmr", "dpp", "coverage") or (mode == "maxmin" and by_score)
    ):
        if np.isnan(scores).all():
            mode = "uniform"
        scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64)
    if mode == "uniform":
        return [(2 * i + 1) * n // (2 * k) for i in range(k)]
    if mode == "random":
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        return _largest([philox4x32_10((t, group, 0, 0), key)[0] for t in range(n)], k)
    if mode == "topk_score":
        assert scores is not None
        return _largest(scores.tolist(), k)
    if mode == "maxmin":
        if by_score:
            assert scores is not None
            start = scores
        elif first == "farthest":
            others = np.where(np.eye(n, dtype=bool), -np.inf, alike.between)
            start = -others.max(axis=1)
        else:
            start = alike.squares
        return _farthest([int(np.argmax(start))], k, np.zeros(n), 0.0, alike.between)
    z = np.ones(n) if scores is None else _relevance(scores)
    if mode == "mmr":
        return _farthest([int(np.argmax(z))], k, z, theta, alike.between)
    if mode == "dpp":
        return _determinantal(k, z, theta, alike.between)
    return _covering(k, z, alike.between)


def _largest(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda t: (-values[t], t))[:k]


def _farthest(
    chosen: list[int], k: int, bonus: Floats, theta: float, similarity: Floats
) -> list[int]:
    """Add the largest theta * bonus - (1 - theta) * (similarity to the nearest chosen token)."""
    chosen = list(chosen)
    while len(chosen) < k:
        nearest = similarity[:, chosen].max(axis=1, initial=-_LARGEST)
        gain = theta * bonus - (1 - theta) * nearest
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    return chosen


def _determinantal(k: int, z: Floats, theta: float, similarity: Floats) -> list[int]:
    """Greedy MAP of a determinantal point process, then `_farthest`."""
    n = len(similarity)
    weight = theta / (1 - theta) * z if theta < 1 else 2 * np.log(z + 1e-6)
    own = similarity.diagonal()
    residual = own.copy()
    factors = np.zeros((0, n))
    chosen: list[int] = []
    while len(chosen) < k:
        left = residual > 1e-4 * own
        left[chosen] = False
        candidates = np.flatnonzero(left)
        if len(candidates) == 0:
            return _farthest(chosen, k, np.zeros(n), 0.0, similarity)
        with np.errstate(divide="ignore"):
            gain = weight[candidates] + np.log(residual[candidates].astype(np.float32), dtype=float)
        best = int(candidates[np.argmax(gain)])
        row = similarity[best] - factors[:, best] @ factors
        row /= np.sqrt(residual[best])
        factors = np.vstack([factors, row])
        residual = residual - row**2
        chosen.append(best)
    return chosen


def _covering(k: int, weight: Floats, similarity: Floats) -> list[int]:
    """Greedy facility location: every token counts by its most similar chosen one."""
    covered = np.zeros(len(similarity))
    chosen: list[int] = []
    while len(chosen) < k:
        with np.errstate(over="ignore"):
            gain = np.maximum(similarity - covered, 0) @ weight
            gain = gain.astype(np.float32)
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
        covered = np.maximum(covered, similarity[chosen[-1]])
    return chosen


def _relevance(scores: Floats) -> Floats:
    """Return z: the scores moved to 0..1."""
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    z = np.full(len(scores), 0.5) if high == low else (scores - low) / (high - low)
    return np.where(scores == np.inf, 1.0, np.where(scores == -np.inf, 0.0, z))


def _targets(
    kept: Sequence[int], alike: _Similarity, mergeable: NDArray[np.bool_]
) -> dict[int, int]:
    """Return for each dropped token that is merged the kept one that it is most similar to."""
    targets = [t for t in kept if alike.usable[t]]
    dropped = sorted(set(range(len(mergeable))) - set(kept))
    if not targets:
        return {}
    return {t: targets[int(np.argmax(alike.between[t, targets]))] for t in dropped if mergeable[t]}


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (J. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011)."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d
