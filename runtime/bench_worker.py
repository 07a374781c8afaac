"""One model in a process of its own, measured on request (the child of benchmark.py).

Reads one JSON object per line: first the job, then {"measure": true} for each repeat or
{"profile": true} once, then {"finish": true}. Answers each with one JSON object per line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.errors import BivlmError, RequestError
from bivlm_edge.memory import keep_no_freed_memory
from bivlm_edge.runtime.answer import Answerer
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.runtime.idle import wait_until_idle
from bivlm_edge.runtime.kv_cache import KvCache
from bivlm_edge.runtime.operator_profile import Stage, operator_profile
from bivlm_edge.runtime.process_memory import memory_bytes
from bivlm_edge.runtime.providers import CPU
from bivlm_edge.runtime.sampling import greedy
from bivlm_edge.runtime.session import VlmSession, load

_PROFILED_PREFILLS = 5
_PROFILED_DECODES = 20


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure.

    Attributes:
        model: Path of the `model.onnx`.
        image: Path of the picture; None for text only.
        prompt: The question.
        new_tokens: Tokens to decode per repeat, the first one included; end tokens are ignored.
        threads: Threads of one operator; None: ONNX Runtime's choice.
        custom_ops: Whether to use the operator library.
        context: Tokens in the KV cache when decoding starts; None: those of the prompt.
        keep_tokens: Fraction of the image tokens to keep; None: as exported.
        profile_folder: Record the time of every node, in a file there; None: do not. Recording
            slows the runs.
        provider: Where the graph runs: "cpu" or "cuda".
    """

    model: str
    image: str | None
    prompt: str
    new_tokens: int
    threads: int | None
    custom_ops: bool
    context: int | None = None
    keep_tokens: float | None = None
    profile_folder: str | None = None
    provider: str = CPU


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one repeat.

    Attributes:
        ttft_ms: Picture file and question to first token.
        preprocess_ms: Of it: decoding and preparing the picture, and tokenizing.
        first_run_ms: Of it: the first run of the graph (vision, pruning and prefill).
        prefill_ms: A run of the decoder alone on as many tokens as the first run kept.
        vision_ms: first_run_ms - prefill_ms: vision tower, projector, pruning; with --prune-layer
            also what the layers before it compute for the dropped tokens.
        decode_ms: Mean time of a token behind the first.
    """

    ttft_ms: float
    preprocess_ms: float
    first_run_ms: float
    prefill_ms: float
    vision_ms: float
    decode_ms: float


class Worker:
    """A loaded model and what a repeat needs."""

    def __init__(self, job: Job) -> None:
        """Load the model.

        Raises:
            BivlmError: It does not load, or prompt and answer do not fit the context.
        """
        before = memory_bytes()
        start = time.perf_counter()
        folder = job.profile_folder
        session = load(
            job.model,
            provider=job.provider,
            custom_ops=job.custom_ops,
            threads=job.threads,
            profile_prefix=None if folder is None else Path(folder) / "nodes",
        ).keeping_fraction(job.keep_tokens)
        load_ms = _ms_since(start)
        self.job = job
        self.answerer = Answerer(session)
        self.memory = {"before_load": before, "after_load": memory_bytes()}
        tokens = len(self._inputs()[0])
        context = session.manifest.context_length
        if tokens + job.new_tokens > context:
            raise RequestError(
                f"'{job.model}' takes {context:,} tokens; the prompt has {tokens:,} and "
                f"--new-tokens is {job.new_tokens:,}. Lower one of them."
            )
        if job.context is not None:
            self._check_context(job.context, job.context)
        paths = session.paths
        self.facts = {
            "load_ms": load_ms,
            "prompt_tokens": tokens,
            "weight_bytes": sum(
                path.stat().st_size for path in (paths.graph, paths.data) if path.is_file()
            ),
            "kv_cache_bytes_per_token": KvCache.bytes_per_token(session),
            "dtype": session.manifest.dtype,
            "provider": session.provider,
            "operators": _operators(session.library, session.manifest.uses_custom_ops),
        }

    def measure(self) -> Sample:
        """Run prompt and answer once, and the decoder's prefill once more by itself."""
        session = self.answerer.session
        start = time.perf_counter()
        token_ids, pixels = self._inputs()
        preprocess_ms = _ms_since(start)
        run_start = time.perf_counter()
        cache = self._new_cache(len(token_ids))
        step = run_step(session, token_ids, cache, pixels)
        token = greedy(step.logits)
        first_run_ms, ttft_ms = _ms_since(run_start), _ms_since(start)
        self._fill(cache)
        decode_ms = self._decode(cache, token)
        kept = len(step.kept)
        self.facts["kept_tokens"] = kept
        self.facts["kv_cache_bytes"] = cache.used_bytes
        self.facts["kv_cache_allocated_bytes"] = cache.allocated_bytes
        del cache, step  # no answer ever needs two caches
        prefill_ms = first_run_ms
        if pixels is not None:
            filler = _filler(session, kept)
            start = time.perf_counter()
            run_step(session, filler, KvCache(session))
            prefill_ms = _ms_since(start)
        vision_ms = first_run_ms - prefill_ms
        return Sample(ttft_ms, preprocess_ms, first_run_ms, prefill_ms, vision_ms, decode_ms)

    def profile(self) -> dict[str, dict[str, Any]]:
        """Return the time by operator of the first run of the graph and of a decode step.

        Raises:
            BivlmError: A run fails, or ONNX Runtime recorded too little.
        """
        session = self.answerer.session
        token_ids, pixels = self._inputs()
        prefills, decodes = [], []
        run = 0
        for turn in range(1 + _PROFILED_PREFILLS):  # the first is a warm-up
            cache = self._new_cache(len(token_ids))
            token = greedy(run_step(session, token_ids, cache, pixels).logits)
            prefills += [run] if turn else []
            run += 1
        run += self._fill(cache)
        cached = cache.tokens
        for turn in range(min(1 + _PROFILED_DECODES, self.job.new_tokens - 1)):
            following = np.array([token], dtype=np.int64)
            token = greedy(run_step(session, following, cache).logits)
            decodes += [run] if turn else []
            run += 1
        path = Path(session.ort.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        stages = (
            Stage("prefill", prefills, len(token_ids), 0),
            Stage("decode", decodes, 1, cached + 1),
        )
        return operator_profile(events, stages)

    def _check_context(self, context: int, tokens: int) -> None:
        """Refuse `context` cached tokens, of `tokens` that were given, if no answer fits behind."""
        limit = self.answerer.session.manifest.context_length
        if tokens + self.job.new_tokens > limit:
            dropped = f" ({tokens:,} with those that pruning dropped)" if tokens > context else ""
            raise RequestError(
                f"'{self.job.model}' takes {limit:,} tokens; --context is {context:,}{dropped} and "
                f"--new-tokens {self.job.new_tokens:,}. Lower one of them."
            )

    def _new_cache(self, tokens: int) -> KvCache:
        """An empty cache with room for a prompt of `tokens`, the filler and the answer."""
        room = max(tokens, self.job.context or 0) + self.job.new_tokens
        return KvCache(self.answerer.session, room)

    def _fill(self, cache: KvCache) -> int:
        """Put as much other text behind the prompt as --context asks for; return the runs made."""
        context = self.job.context
        if context is None or context == cache.tokens:
            return 0
        if context < cache.tokens:
            raise RequestError(
                f"--context {context:,} is less than the {cache.tokens:,} tokens of the prompt "
                f"that '{self.job.model}' keeps. Give at least that, or a shorter --prompt."
            )
        more = context - cache.tokens
        self._check_context(context, cache.position + more)
        session = self.answerer.session
        run_step(session, _filler(session, more), cache)
        return 1

    def _decode(self, cache: KvCache, token: int) -> float:
        start = time.perf_counter()
        for _ in range(self.job.new_tokens - 1):
            following = np.array([token], dtype=np.int64)
            token = greedy(run_step(self.answerer.session, following, cache).logits)
        return _ms_since(start) / max(1, self.job.new_tokens - 1)

    def _inputs(self) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        image = self.job.image
        picture = None if image is None else self.answerer.picture(image)
        ids = self.answerer.prompts.encode(self.job.prompt, picture)
        return ids, None if picture is None else picture.pixels


def _operators(library: str | None, uses_custom_ops: bool) -> str:
    if not uses_custom_ops:
        return "standard"
    return "fallback" if library is None else "library"


def _filler(session: VlmSession, count: int) -> NDArray[np.int64]:
    """Tokens of text: the placeholder needs pixels, any other costs the decoder the same."""
    image = session.manifest.image_token_id
    return np.full(count, image - 1 if image else 1, dtype=np.int64)


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def serve() -> None:
    """Answer the parent until it says finish or goes away."""
    keep_no_freed_memory()
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(Job(**request))
                _reply(worker.facts)
            elif "measure" in request:
                sample = worker.measure()
                wait_until_idle()
                _reply(asdict(sample))
            elif "profile" in request:
                _reply(worker.profile())
            else:
                _reply({**worker.facts, "memory": {**worker.memory, "after_run": memory_bytes()}})
                return
        except BivlmError as error:
            _reply({"error": str(error), "exit_code": error.exit_code})
            return


def _reply(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
