"""Answers, their accuracy and perplexity from a model in torch: what its export would score."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from bivlm_edge.datasets import PictureSource, VqaItem
from bivlm_edge.errors import DataError, RequestError
from bivlm_edge.models import VisionLanguageModel
from bivlm_edge.models.language_model import LanguageModel
from bivlm_edge.runtime.evaluate import Scores

_PICTURES_AT_ONCE = 256
_PICTURES_IN_A_BATCH = 16
_QUESTIONS_AT_ONCE = 64
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Sum of the negative log-likelihoods of tokens, in nats."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exp of the mean; infinite where it overflows or the model computes NaN."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True, slots=True)
class Answers:
    """A model's greedy answers, and how likely it finds the expected ones.

    Attributes:
        texts: One per question, in the order they were given.
        expected: Likelihood of the expected answers' tokens (an end token is not counted).
    """

    texts: list[str]
    expected: Likelihood


@dataclass(frozen=True, slots=True)
class _Question:
    number: int
    item: VqaItem
    prompt: list[int]
    answer: list[int]


@torch.no_grad()
def answer(
    vlm: VisionLanguageModel,
    items: Sequence[VqaItem],
    *,
    max_new_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> Answers:
    """Answer every question greedily, as the exported model does.

    Each picture's features are computed once; questions of equal length share a batch, so that
    nothing is padded.

    Args:
        vlm: The model; pruning is not applied.
        items: The questions.
        max_new_tokens: Longest answer; None: the model's own.
        on_progress: Called with the number of questions done.

    Raises:
        RequestError: There are no questions, or one does not fit the context.
        DataError: A picture cannot be read, or an expected answer has no tokens.
    """
    if not items:
        raise RequestError("there are no questions to ask. Give --limit 1 or more.")
    limit = vlm.max_new_tokens if max_new_tokens is None else max_new_tokens
    texts = [""] * len(items)
    nats, tokens, done = 0.0, 0, 0
    for pictures in _by_picture(vlm, items):
        features = dict(_features(vlm, list(pictures)))
        for batch in _batches([question for asked in pictures.values() for question in asked]):
            found, likelihood = _answer_batch(vlm, batch, features, limit)
            for question, ids in zip(batch, found, strict=True):
                texts[question.number] = vlm.tokenizer.backend_tokenizer.decode(
                    ids, skip_special_tokens=True
                )
            nats, tokens = nats + likelihood.nats, tokens + likelihood.tokens
            done += len(batch)
            if on_progress is not None:
                on_progress(done)
    return Answers(texts, Likelihood(nats, tokens))


def score(items: Sequence[VqaItem], answers: Answers) -> Scores:
    """Compare answers with the expected ones as `bivlm-eval` does."""
    return Scores.of(list(zip(items, answers.texts, strict=True)))


@torch.no_grad()
def text_likelihood(
    model: LanguageModel, windows: Tensor, on_progress: Progress | None = None
) -> Likelihood:
    """Return the likelihood of every token of a window but its first, given those before it.

    Args:
        model: The model.
        windows: int64 ``(windows, length)``; nothing is carried over from one to the next.
        on_progress: Called with the number of windows done.
    """
    nats = 0.0
    for number, window in enumerate(windows):
        logits = model.module(input_ids=window[None], use_cache=False).logits[0, :-1]
        nats += _nats(logits, window[1:])
        if on_progress is not None:
            on_progress(number + 1)
    return Likelihood(nats, windows.shape[0] * (windows.shape[1] - 1))


def _nats(logits: Tensor, expected: Tensor) -> float:
    """Negative log-likelihood of tokens (T,) under logits (T, vocab); infinite instead of NaN."""
    nats = float(functional.cross_entropy(logits.float(), expected, reduction="sum"))
    return math.inf if math.isnan(nats) else nats


def _by_picture(
    vlm: VisionLanguageModel, items: Sequence[VqaItem]
) -> Iterator[dict[PictureSource, list[_Question]]]:
    """Tokenized questions by picture, a number of pictures at a time."""
    by_picture: dict[PictureSource, list[tuple[int, VqaItem]]] = defaultdict(list)
    for number, item in enumerate(items):
        by_picture[item.image].append((number, item))
    pictures = iter(by_picture.items())
    while chunk := list(islice(pictures, _PICTURES_AT_ONCE)):
        yield {
            source: [_question(vlm, number, item) for number, item in asked]
            for source, asked in chunk
        }


def _features(
    vlm: VisionLanguageModel, sources: Sequence[PictureSource]
) -> Iterator[tuple[PictureSource, Tensor]]:
    """Image features (image_tokens, hidden) of each picture."""
    for start in range(0, len(sources), _PICTURES_IN_A_BATCH):
        batch = sources[start : start + _PICTURES_IN_A_BATCH]
        pixels = torch.stack([torch.from_numpy(vlm.pixels(source.open())) for source in batch])
        yield from zip(batch, vlm.image_features(pixels), strict=True)


def _question(vlm: VisionLanguageModel, number: int, item: VqaItem) -> _Question:
    prompt = vlm.encode(vlm.prompt(item.question))
    expected = vlm.tokenizer(item.answer, add_special_tokens=False)["input_ids"]
    if not expected:
        raise DataError(f"the answer {item.answer!r} to {item.question!r} has no tokens.")
    context = int(vlm.text_config.max_position_embeddings)
    if len(prompt) + len(expected) > context:
        raise RequestError(
            f"the question {item.question!r} and its answer take {len(prompt) + len(expected)} "
            f"tokens with the picture; the model takes {context}. Leave it out of the data."
        )
    return _Question(number, item, prompt, expected)


def _batches(questions: Sequence[_Question]) -> Iterator[list[_Question]]:
    """Questions with prompts of equal length and expected answers of equal length."""
    by_length: dict[tuple[int, int], list[_Question]] = defaultdict(list)
    for question in questions:
        by_length[len(question.prompt), len(question.answer)].append(question)
    for alike in by_length.values():
        for start in range(0, len(alike), _QUESTIONS_AT_ONCE):
            yield alike[start : start + _QUESTIONS_AT_ONCE]


def _answer_batch(
    vlm: VisionLanguageModel,
    batch: Sequence[_Question],
    features: dict[PictureSource, Tensor],
    limit: int,
) -> tuple[list[list[int]], Likelihood]:
    """Greedy tokens of each question, the end token left out, and the expected ones' likelihood."""
    positions, following = zip(*(vlm.positions(question.prompt) for question in batch), strict=True)
    cache = DynamicCache()
    embeddings = vlm.embed(
        torch.tensor([question.prompt for question in batch]),
        torch.stack([features[question.item.image] for question in batch]),
    )
    prompt_length = embeddings.shape[1]
    first = vlm.decode(embeddings, torch.cat(positions, dim=-2), cache)[:, -1]
    expected = torch.tensor([question.answer for question in batch])
    nats = _nats(first, expected[:, 0])
    # position of the token behind the prompt, shaped as `decode` takes it
    start = torch.tensor(following)[:, None].expand(*positions[0].shape[:-2], len(batch), 1)
    if expected.shape[1] > 1:
        steps = torch.arange(expected.shape[1] - 1)
        logits = vlm.decode(_embedded(vlm, expected[:, :-1]), start + steps, cache)
        nats += _nats(logits.flatten(0, 1), expected[:, 1:].flatten())
        cache.crop(prompt_length)
    room = int(vlm.text_config.max_position_embeddings) - prompt_length
    found = _greedy(vlm, first, start, cache, min(limit, room))
    return found, Likelihood(nats, expected.numel())


def _greedy(
    vlm: VisionLanguageModel, logits: Tensor, start: Tensor, cache: DynamicCache, limit: int
) -> list[list[int]]:
    """Tokens until every row has ended or holds `limit` of them."""
    end = torch.tensor(vlm.end_token_ids, dtype=torch.long)
    rows: list[list[int]] = [[] for _ in logits]
    has_ended = torch.zeros(len(rows), dtype=torch.bool)
    for step in range(limit):
        tokens = logits.argmax(dim=-1)
        has_ended |= torch.isin(tokens, end)
        for row, token, ended in zip(rows, tokens.tolist(), has_ended.tolist(), strict=True):
            if not ended:
                row.append(token)
        if bool(has_ended.all()) or step + 1 == limit:
            break
        logits = vlm.decode(_embedded(vlm, tokens[:, None]), start + step, cache)[:, -1]
    return rows


def _embedded(vlm: VisionLanguageModel, ids: Tensor) -> Tensor:
    embeddings: Tensor = vlm.module.get_input_embeddings()(ids)
    return embeddings
