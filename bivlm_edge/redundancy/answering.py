"""One run: every question asked, each picture computed once for all of its questions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.errors import RequestError
from bivlm_edge.redundancy.plan import FULL, NO_IMAGE, RANDOM, RARE_TEXT, SHUFFLED, TEXT, Run
from bivlm_edge.redundancy.questions import (
    Questions,
    derangement,
    kept_of_question,
    rarest_of_question,
    token_frequencies,
)
from bivlm_edge.redundancy.selectors import PruneGraph
from bivlm_edge.runtime import Answerer, KvCache, Picture, VlmSession, greedy, load
from bivlm_edge.runtime.generate import Step, run_step

_MOST_CACHED_BYTES = 1 << 28  # of preprocessed pictures
_CHECKED_PICTURES = 4
_ROUNDING = 0.05  # of logits: products of few and of many tokens round differently (OPS.md)
_TIMED_ROUNDS = 15
_WHOLE = (FULL, SHUFFLED, TEXT, RARE_TEXT)  # runs with all tokens of a picture

Ids = NDArray[np.int64]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a run gave.

    Attributes:
        texts: One answer per question.
        kept_tokens: Mean tokens of a prompt in the KV cache.
        seconds: Of the whole run.
    """

    texts: tuple[str, ...]
    kept_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a prompt of one picture and one question costs.

    Attributes:
        prefill_ms: Median time of preprocessed picture and tokens to the first logits.
        kv_bytes: Of the KV cache behind it.
        prompt_tokens: In the KV cache.
    """

    prefill_ms: float
    kv_bytes: int
    prompt_tokens: int


class Model:
    """An exported model that answers the questions under any selector.

    Attributes:
        mode: Selector of the file.
        image_tokens: Tokens of one image before pruning.
        session: The graph as it is in the file.
    """

    def __init__(
        self,
        path: Path | str,
        questions: Questions,
        *,
        threads: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            path: The `model.onnx`.
            questions: What will be asked.
            threads: Threads of one operator.
            max_new_tokens: Longest answer; None: the manifest's.

        Raises:
            RequestError: The file prunes nothing, or has a rule that keeps a number of tokens of
                its own of each picture, or max_new_tokens < 1.
            BundleError: It does not load.
            OpsLibraryError: The operator library is missing: other selectors exist only there.
        """
        self.session = load(path, threads=threads)
        manifest = self.session.manifest
        self._graph = PruneGraph(self.session.paths)
        prune = manifest.config.get("prune", {})
        if rule := prune.get("keep_rule"):
            raise RequestError(
                f"'{self.session.paths.graph}' was exported with --keep-rule {rule}, which keeps "
                "fewer tokens of easy pictures than it is asked for, so that no number of tokens "
                "can be tested. Export the model without --keep-rule to analyse it; bivlm-eval "
                "measures the rule."
            )
        # the layers before the pruning show the question what is dropped
        self._is_inside = bool(prune.get("layer"))
        self.mode = self._graph.mode
        self.image_tokens = manifest.image_tokens
        self._limit = manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        if self._limit < 1:
            raise RequestError(
                f"--max-new-tokens {self._limit} leaves nothing to answer. Give 1 or more."
            )
        self._path = path
        self._questions = questions
        self._answerer = Answerer(self.session)
        self._pictures: dict[int, Picture] = {}
        self._cached_bytes = 0
        self._frequencies: Mapping[int, int] | None = None
        self._edited: tuple[tuple[str, int], VlmSession] | None = None

    def answers(self, run: Run, on_progress: Progress | None = None) -> Answers:
        """Ask every question.

        Args:
            run: How.
            on_progress: Called with the number of questions done.

        Raises:
            RequestError: A prompt does not fit the context, or the selector does not fit the file.
            DataError: A picture cannot be read.
        """
        start = time.perf_counter()
        questions = self._questions
        session = self._session(run).keeping(self._kept(run))
        shown = np.arange(len(questions.pictures))
        if run.selector == SHUFFLED:
            shown = derangement(len(questions.pictures), run.seed)
        by_picture: list[list[int]] = [[] for _ in questions.pictures]
        for number, picture in enumerate(questions.picture_of):
            by_picture[shown[picture]].append(number)
        texts = [""] * len(questions.items)
        kept = done = checked = 0
        selects = run.selector not in (*_WHOLE, NO_IMAGE)
        can_share = not (selects and self._is_inside)
        for index, numbers in enumerate(by_picture):
            if not numbers:
                continue
            picture = self._picture(index)
            prompts = [self._prompt(run, number, picture) for number in numbers]
            asking = _Asking(session, picture, self._limit)
            if run.selector == NO_IMAGE and self._is_inside and not asking.has_text(prompts[0]):
                raise RequestError(
                    f"'{self.session.paths.graph}' was exported with --prune-layer and its prompts "
                    "begin with the picture, so that it cannot be asked without one. Export the "
                    "model without --prune-layer to analyse it."
                )
            if selects and can_share and checked < _CHECKED_PICTURES:
                checked += 1
                can_share = asking.can_share(prompts[0])
            for number, (tokens, answer) in zip(
                numbers, asking.all(prompts, shared=can_share), strict=True
            ):
                kept += tokens
                texts[number] = self._answerer.prompts.decode(answer)
                done += 1
                if on_progress is not None:
                    on_progress(done)
        return Answers(tuple(texts), kept / len(texts), time.perf_counter() - start)

    def costs(self, numbers: Sequence[int]) -> dict[int, Cost]:
        """Measure prompts with `numbers` of image tokens, in turn, with the file's selector."""
        picture = self._picture(0)
        first = int(np.flatnonzero(self._questions.picture_of == 0)[0])
        prompt = self._prompt(Run(FULL, self.image_tokens), first, picture)
        times: dict[int, list[float]] = {number: [] for number in numbers}
        caches: dict[int, KvCache] = {}
        for turn in range(_TIMED_ROUNDS + 1):
            for number in numbers:
                session = self.session.keeping(number)
                cache = KvCache(session, len(prompt))
                start = time.perf_counter()
                run_step(session, prompt, cache, picture.pixels)
                if turn:  # the first round warms up
                    times[number].append(1e3 * (time.perf_counter() - start))
                caches[number] = cache
        return {
            number: Cost(
                float(np.median(times[number])), caches[number].used_bytes, caches[number].tokens
            )
            for number in numbers
        }

    def _session(self, run: Run) -> VlmSession:
        """The file's own session where the selector has no say, else one with the node edited."""
        if run.selector in (*_WHOLE, NO_IMAGE) or (
            run.selector == self.mode and run.selector != RANDOM
        ):
            return self.session
        key = (run.selector, run.seed)
        if self._edited is not None and self._edited[0] == key:
            return self._edited[1]
        self._edited = None  # one edited graph in memory at a time
        gc.collect()
        graph = self._graph.with_mode(run.selector, run.seed)
        session = load(self._path, threads=self.session.threads, graph=graph)
        self._edited = (key, session)
        return session

    def _kept(self, run: Run) -> int:
        return self.image_tokens if run.selector in _WHOLE else run.kept

    def _picture(self, index: int) -> Picture:
        if index in self._pictures:
            return self._pictures[index]
        picture = self._answerer.picture(self._questions.pictures[index].open())
        if self._cached_bytes + picture.pixels.nbytes <= _MOST_CACHED_BYTES:
            self._pictures[index] = picture
            self._cached_bytes += picture.pixels.nbytes
        return picture

    def _prompt(self, run: Run, number: int, picture: Picture) -> Ids:
        question = self._questions.items[number].question
        if run.selector not in (TEXT, RARE_TEXT):
            return self._answerer.prompts.encode(question, picture)
        ids, marked = self._answerer.prompts.encode_marked(question, picture)
        places = np.flatnonzero(marked)
        share = run.kept / self.image_tokens
        if run.selector == TEXT:
            kept = kept_of_question(len(places), share, run.seed, number)
        else:
            kept = rarest_of_question(ids[places], share, self._token_frequencies(picture))
        stays = ~marked
        stays[places[kept]] = True
        return ids[stays]

    def _token_frequencies(self, picture: Picture) -> Mapping[int, int]:
        """How many of the distinct questions have a token; any picture serves the template."""
        if self._frequencies is None:
            questions = {item.question for item in self._questions.items}
            encoded = (self._answerer.prompts.encode_marked(q, picture) for q in questions)
            self._frequencies = token_frequencies(ids[marked] for ids, marked in encoded)
        return self._frequencies


class _Asking:
    """Questions on one picture, answered greedily."""

    def __init__(self, session: VlmSession, picture: Picture, limit: int) -> None:
        self._session = session
        self._pixels = picture.pixels
        self._limit = limit
        self._image = session.manifest.image_token_id
        self._end = frozenset(session.manifest.eos_token_ids)

    def can_share(self, prompt: Ids) -> bool:
        """Whether it makes no difference that the picture is computed before the question.

        It does where tokens are chosen with an eye on the question.
        """
        length = self._prefix_length(prompt)
        _, whole = self._prefill(prompt)
        cache, prefix = self._prefill(prompt[:length])
        if not np.array_equal(whole.kept[whole.kept < length], prefix.kept):
            return False
        if length == len(prompt):
            return True
        parts = run_step(self._session, prompt[length:], cache)
        error = np.linalg.norm((parts.logits - whole.logits).astype(np.float64))
        return bool(error <= _ROUNDING * np.linalg.norm(whole.logits.astype(np.float64)))

    def all(self, prompts: Sequence[Ids], *, shared: bool) -> list[tuple[int, list[int]]]:
        """Return for each prompt the tokens of it that were kept, and its answer.

        Args:
            prompts: Token ids, alike up to the end of the picture.
            shared: Compute them up to there once. Else each whole, as bivlm-run does.
        """
        length = self._prefix_length(prompts[0])
        has_text = self.has_text(prompts[0])
        # no token at all may be left of a prefix that is nothing but pictures
        if not shared or not has_text:
            return [self._answer(prompt, *self._prefill(prompt)) for prompt in prompts]
        cache, prefix = self._prefill(prompts[0][:length])
        start = (cache.tokens, cache.position)
        found = []
        for prompt in prompts:
            cache.rewind(*start)
            rest = prompt[length:]
            step = run_step(self._session, rest, cache) if len(rest) else prefix
            found.append(self._answer(prompt, cache, step))
        return found

    def has_text(self, prompt: Ids) -> bool:
        """Whether text stands before the end of the pictures."""
        return bool((prompt[: self._prefix_length(prompt)] != self._image).any())

    def _prefix_length(self, prompt: Ids) -> int:
        return int(np.flatnonzero(prompt == self._image)[-1]) + 1

    def _prefill(self, ids: Ids) -> tuple[KvCache, Step]:
        cache = KvCache(self._session, min(2 * len(ids), self._session.manifest.context_length))
        return cache, run_step(self._session, ids, cache, self._pixels)

    def _answer(self, prompt: Ids, cache: KvCache, step: Step) -> tuple[int, list[int]]:
        """The prompt's kept tokens and the answer's tokens, by the rules of `Generation`."""
        kept = cache.tokens
        answer: list[int] = []
        room = self._session.manifest.context_length - len(prompt)
        for _ in range(min(self._limit, room)):
            if answer:
                step = run_step(self._session, np.array(answer[-1:], dtype=np.int64), cache)
            token = greedy(step.logits)
            if token in self._end:
                break
            answer.append(token)
        return kept, answer
