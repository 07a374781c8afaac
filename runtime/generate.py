"""The loop: prefill, then one token after the other. Token ids only; no text, no pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.errors import BundleError, RequestError
from bivlm_edge.positions import position_rows, without_gaps
from bivlm_edge.runtime.kv_cache import GROWTH, BoundRun, KvCache
from bivlm_edge.runtime.ort_errors import RUN_ERRORS, ort_sentence
from bivlm_edge.runtime.sampling import Sampler, greedy
from bivlm_edge.runtime.session import VlmSession, pixel_batch

StopReason = Literal["end", "length", "context"]


@dataclass(frozen=True, slots=True)
class Step:
    """What one run of the graph returns.

    Attributes:
        logits: `[vocabulary]` of the last position.
        kept: int64 `[kept tokens]`: which of the given tokens pruning kept.
    """

    logits: NDArray[np.floating[Any]]
    kept: NDArray[np.int64]


def run_step(
    session: VlmSession,
    token_ids: NDArray[np.int64],
    cache: KvCache,
    pixels: NDArray[np.float32] | None = None,
) -> Step:
    """Run the graph on the next tokens.

    Args:
        session: The model.
        token_ids: int64 `[tokens]`, the positions right behind `cache`.
        cache: What came before; the tokens are appended to it.
        pixels: float32 `[images, 3, H, W]` of the images whose placeholders `token_ids` holds.

    Raises:
        RequestError: The tokens do not fit into the context.
        BundleError: ONNX Runtime refuses the run.
    """
    count = len(token_ids)
    context = session.manifest.context_length
    if cache.position + count > context:
        raise RequestError(
            f"{count:,} tokens behind position {cache.position:,} do not fit into the context: "
            f"the model takes {context:,} in all. Shorten the prompt or the answer."
        )
    cache.reserve(cache.tokens + count)
    is_single = count == 1 and pixels is None
    run = cache.single if is_single else None
    if run is None:
        run = BoundRun(cache, count, pixel_batch(session, pixels), kept=not is_single)
    run.token_ids[0] = token_ids
    manifest = session.manifest
    positions, following = position_rows(
        token_ids, cache.position, manifest.image_token_id, manifest.image_grid
    )
    try:
        run.run(positions, cache.tokens)
    except RUN_ERRORS as error:
        raise BundleError(
            f"'{session.paths.graph}' failed in ONNX Runtime on {count} tokens behind "
            f"{cache.tokens} cached ones: {ort_sentence(error)}."
        ) from error
    kept = np.zeros(1, np.int64) if is_single else run.kept_indices()
    if manifest.contiguous:
        _, following = without_gaps(positions, kept)
    cache.advance(len(kept), following)
    if is_single:
        cache.single = run
    return Step(run.logits[0, 0].copy(), kept)


class Generation(Iterator[int]):
    """The tokens of one answer, each computed when it is asked for.

    Attributes:
        prompt_tokens: Tokens of the prompt, image placeholders included.
        kept_tokens: Those that pruning left in the KV cache; 0 before the first token.
        kept_indices: int64 `[kept_tokens]`: which of the prompt these are; empty before.
        new_tokens: Tokens yielded so far.
        stop_reason: Why it ended: "end" (an end token), "length" (max_new_tokens), "context" (no
            position left); None while it has not.
    """

    def __init__(
        self,
        session: VlmSession,
        prompt_ids: NDArray[np.int64],
        pixels: NDArray[np.float32] | None = None,
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler = greedy,
    ) -> None:
        """Check the request; nothing runs yet.

        Args:
            session: The model.
            prompt_ids: int64 `[tokens]`, with every image placeholder repeated.
            pixels: float32 `[images, 3, H, W]`, or None without an image.
            max_new_tokens: Longest answer; None: the manifest's.
            sampler: Logits to token.

        Raises:
            RequestError: The prompt is empty, fills the context or has placeholders for other
                images than `pixels`, or max_new_tokens < 1.
        """
        manifest = session.manifest
        limit = manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise RequestError(
                f"--max-new-tokens {limit} leaves nothing to answer. Give 1 or more."
            )
        if len(prompt_ids) == 0:
            raise RequestError("the prompt has no tokens. Give a question.")
        of_images = int(np.count_nonzero(prompt_ids == manifest.image_token_id))
        if len(prompt_ids) >= manifest.context_length:
            raise RequestError(
                f"the prompt has {len(prompt_ids):,} tokens ({of_images:,} of them for images); "
                f"the model takes {manifest.context_length:,} in all, and the "
                "answer needs at least one. Shorten the prompt."
            )
        images = 0 if pixels is None else len(pixels)
        if of_images != images * manifest.image_tokens:
            raise RequestError(
                f"the prompt has {of_images:,} image placeholders; {images} images of "
                f"{manifest.image_tokens:,} tokens need {images * manifest.image_tokens:,}. Give "
                "every image its run of placeholders, and no others."
            )
        self.prompt_tokens = len(prompt_ids)
        self.kept_tokens = 0
        self.kept_indices: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.new_tokens = 0
        self.stop_reason: StopReason | None = None
        self._session = session
        self._prompt: NDArray[np.int64] | None = prompt_ids
        self._pixels = pixels
        self._limit = limit
        self._sampler = sampler
        self._end = frozenset(manifest.eos_token_ids)
        capacity = min(len(prompt_ids) + min(limit, GROWTH), manifest.context_length)
        self._cache = KvCache(session, capacity)
        self._last = -1

    def __next__(self) -> int:
        if self.stop_reason is None and self.new_tokens == self._limit:
            self.stop_reason = "length"
        if self.stop_reason is None and self._is_context_full():
            self.stop_reason = "context"
        if self.stop_reason is not None:
            raise StopIteration
        token = self._sampler(self._run().logits)
        if token in self._end:
            self.stop_reason = "end"
            raise StopIteration
        self.new_tokens += 1
        self._last = token
        return token

    def _is_context_full(self) -> bool:
        return self.prompt_tokens + self.new_tokens >= self._session.manifest.context_length

    def _run(self) -> Step:
        if self._prompt is None:
            last = np.array([self._last], dtype=np.int64)
            return run_step(self._session, last, self._cache)
        step = run_step(self._session, self._prompt, self._cache, self._pixels)
        self.kept_tokens = self._cache.tokens
        self.kept_indices = step.kept
        self._prompt = self._pixels = None
        return step
