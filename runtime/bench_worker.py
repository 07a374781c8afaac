"""One model in a process of its own, measured on request (the child of benchmark.py).

Reads one JSON object per line: first the job, then {"measure": true} for each repeat, then
{"finish": true}. Answers each with one JSON object per line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.errors import BivlmError, RequestError
from bivlm_edge.runtime.answer import Answerer
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.runtime.kv_cache import KvCache
from bivlm_edge.runtime.process_memory import memory_bytes
from bivlm_edge.runtime.sampling import greedy
from bivlm_edge.runtime.session import load


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
    """

    model: str
    image: str | None
    prompt: str
    new_tokens: int
    threads: int | None
    custom_ops: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one repeat.

    Attributes:
        ttft_ms: Picture file and question to first token.
        preprocess_ms: Of it: decoding and preparing the picture, and tokenizing.
        first_run_ms: Of it: the first run of the graph (vision, pruning and prefill).
        prefill_ms: A run of the decoder alone on as many tokens as the first run kept.
        vision_ms: first_run_ms - prefill_ms: vision tower, projector, pruning.
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
        session = load(job.model, custom_ops=job.custom_ops, threads=job.threads)
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
        paths = session.paths
        self.facts = {
            "load_ms": load_ms,
            "prompt_tokens": tokens,
            "weight_bytes": sum(
                path.stat().st_size for path in (paths.graph, paths.data) if path.is_file()
            ),
            "kv_cache_bytes_per_token": KvCache.bytes_per_token(session),
            "dtype": session.manifest.dtype,
            "operators": _operators(session.library, session.manifest.uses_custom_ops),
        }

    def measure(self) -> Sample:
        """Run prompt and answer once, and the decoder's prefill once more by itself."""
        session = self.answerer.session
        start = time.perf_counter()
        token_ids, pixels = self._inputs()
        preprocess_ms = _ms_since(start)
        run_start = time.perf_counter()
        cache = KvCache(session, len(token_ids) + self.job.new_tokens)
        step = run_step(session, token_ids, cache, pixels)
        token = greedy(step.logits)
        first_run_ms, ttft_ms = _ms_since(run_start), _ms_since(start)
        decode_ms = self._decode(cache, token)
        kept = len(step.kept)
        self.facts["kept_tokens"] = kept
        self.facts["kv_cache_bytes"] = cache.used_bytes
        self.facts["kv_cache_allocated_bytes"] = cache.allocated_bytes
        prefill_ms = first_run_ms
        if pixels is not None:
            # The placeholder needs pixels; any other token costs the decoder the same.
            filler = np.full(kept, _other_token(session.manifest.image_token_id), dtype=np.int64)
            start = time.perf_counter()
            run_step(session, filler, KvCache(session))
            prefill_ms = _ms_since(start)
        vision_ms = first_run_ms - prefill_ms
        return Sample(ttft_ms, preprocess_ms, first_run_ms, prefill_ms, vision_ms, decode_ms)

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


def _other_token(token_id: int) -> int:
    return token_id - 1 if token_id else 1


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def serve() -> None:
    """Answer the parent until it says finish or goes away."""
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(Job(**request))
                _reply(worker.facts)
            elif "measure" in request:
                _reply(asdict(worker.measure()))
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
