"""What a function body of `TokenPrune` depends on; see fallback_prune.py."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from bivlm_edge.errors import RequestError
from bivlm_edge.export import schemas


@dataclass(frozen=True, slots=True)
class TokenPruneConfiguration:
    """What the body depends on: attributes, and which optional inputs and outputs there are."""

    mode: str = "mmr"
    scores: bool = False
    segments: bool = False
    keep: bool = False
    metric: bool = False
    lengths: bool = True
    token_map: bool = False
    keep_count: int = -1
    keep_ratio: float = -1.0
    min_keep: int = 1
    theta: float = 0.5
    score_reduce: str = "mean"
    first: str = "auto"
    similarity: str = "cosine"
    merge: str = "none"
    order: str = "input"

    def __post_init__(self) -> None:
        for name, word, words in (
            ("mode", self.mode, schemas.PRUNE_MODES),
            ("score_reduce", self.score_reduce, schemas.PRUNE_SCORE_REDUCTIONS),
            ("first", self.first, schemas.PRUNE_FIRST),
            ("similarity", self.similarity, schemas.PRUNE_SIMILARITIES),
            ("merge", self.merge, schemas.PRUNE_MERGES),
            ("order", self.order, schemas.PRUNE_ORDERS),
        ):
            if word not in words:
                raise RequestError(f"TokenPrune {name} '{word}' is none of {', '.join(words)}")
        if self.mode == "random":
            raise RequestError(
                "TokenPrune mode 'random' has no fallback in standard operators: run it with the "
                "operator library (export with --fallback none), or use mode 'uniform'"
            )
        if self.order != "input":
            raise RequestError(
                f"TokenPrune order '{self.order}' has no fallback in standard operators: run it "
                "with the operator library (export with --fallback none), or use order 'input'"
            )
        for name, word, needs_scores in (
            ("mode", self.mode, self.mode in ("topk_score", "mmr")),
            ("first", self.first, self.mode == "maxmin" and self.first == "max_score"),
            ("merge", self.merge, self.merge == "score_weighted"),
        ):
            if needs_scores and not self.scores:
                raise RequestError(f"TokenPrune {name} '{word}' needs the input 'scores'")
        if self.keep_count < -1:
            raise RequestError(f"TokenPrune keep_count is {self.keep_count}: 0 or more, or -1")
        if not (self.keep_ratio == -1 or 0 <= self.keep_ratio <= 1) or not 0 <= self.theta <= 1:
            raise RequestError(
                f"TokenPrune needs keep_ratio in 0..1 (or -1) and theta in 0..1, not "
                f"{self.keep_ratio} and {self.theta}"
            )

    @property
    def keeps_all(self) -> bool:
        counted = self.keep or self.keep_count != -1 or self.keep_ratio != -1
        return self.mode == "none" or not counted

    @property
    def selects_by_scores(self) -> bool:
        """Whether the mode looks at scores, so that segments without any go to `uniform`."""
        if self.mode == "maxmin":
            return self.scores and self.first in ("auto", "max_score")
        return self.scores and self.mode in ("topk_score", "mmr", "dpp", "coverage")

    @property
    def overload(self) -> str:
        """A short name, the same in every process: mode, inputs, outputs, hash of the others."""
        given = (self.scores, self.segments, self.keep, self.metric, self.lengths, self.token_map)
        signature = "".join(name for name, there in zip("sgkmlt", given, strict=True) if there)
        numbers = (self.keep_count, self.keep_ratio, self.min_keep, self.theta)
        words = (self.score_reduce, self.first, self.similarity, self.merge)
        return f"{self.mode}_{signature}_{crc32(repr((numbers, words)).encode()):08x}"
