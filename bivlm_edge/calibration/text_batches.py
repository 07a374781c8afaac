"""Token windows of a language model's tokenizer: calibration batches and evaluation texts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bivlm_edge.calibration.calls import LABELS
from bivlm_edge.errors import DataError, RequestError
from bivlm_edge.texts import (
    CALIBRATION_TEXTS,
    TEST_TEXT,
    load_conversations,
    load_text,
)

WINDOW = 512
CALIBRATION_WINDOWS = 64
EVALUATION_WINDOWS = 64
_CHAT = "chat"
_SHARES: Mapping[str, float] = {
    CALIBRATION_TEXTS[0]: 0.5,
    CALIBRATION_TEXTS[1]: 0.375,
    _CHAT: 0.125,
}
_BATCH_SIZE = 2  # more would only hold larger logits


class TextModel(Protocol):
    """What this module needs of `models.LanguageModel`."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""

    def render(self, conversation: Sequence[str]) -> str:
        """Return a conversation in the chat format."""


def windows(model: TextModel, text: str, length: int = WINDOW) -> Tensor:
    """Cut a text into windows that do not overlap; what is left at the end is dropped.

    The text is tokenized as a whole, as the tokenizer does by default: one that puts a begin token
    before a text puts it into the first window only.

    Returns:
        int64 (windows, length).

    Raises:
        RequestError: The model cannot take windows of this length.
        DataError: The text is shorter than one window.
    """
    if length > model.context_length:
        raise RequestError(
            f"windows of {length} tokens exceed the model's context of {model.context_length}. "
            "Choose shorter ones."
        )
    ids = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"])
    count = len(ids) // length
    if not count:
        raise DataError(
            f"the text has {len(ids)} tokens, less than one window of {length}. Give a longer one."
        )
    return ids[: count * length].reshape(count, length)


def evaluation_windows(
    model: TextModel,
    text: str | Path = TEST_TEXT,
    limit: int | None = EVALUATION_WINDOWS,
    length: int = WINDOW,
) -> Tensor:
    """Return windows spread evenly over a text, the same ones in every run.

    Args:
        model: Whose tokenizer.
        text: `texts.TEST_TEXT` to report, `texts.VALIDATION_TEXT` to tune and choose, or a file.
        limit: How many windows at most; None: all.
        length: Tokens in a window.

    Returns:
        int64 (windows, length).
    """
    found = windows(model, load_text(text), length)
    if limit is None or limit >= len(found):
        return found
    return found[torch.arange(limit) * len(found) // limit]


def calibration_batches(
    model: TextModel,
    samples: int = CALIBRATION_WINDOWS,
    seed: int = 0,
    length: int = WINDOW,
    source: str | Path | None = None,
) -> list[dict[str, Tensor]]:
    """Draw windows at random: a novel, a textbook and conversations in the model's chat format.

    Args:
        model: Whose tokenizer.
        samples: How many windows.
        seed: The same seed draws the same windows.
        length: Tokens in a window.
        source: A text file or folder of one's own instead.

    Returns:
        Batches of `input_ids` and `labels`, both int64 (2, length): every token is predicted.

    Raises:
        DataError: The texts hold fewer windows than asked for.
    """
    if source is not None:
        drawn = _drawn(windows(model, load_text(source), length), samples, seed, str(source))
    else:
        chat = "".join(model.render(talk) for talk in _shuffled(load_conversations(), seed))
        counts = {name: int(samples * share) for name, share in _SHARES.items()}
        pools = {name: windows(model, load_text(name), length) for name in CALIBRATION_TEXTS}
        pools[_CHAT] = windows(model, chat, length)
        counts[_CHAT] = min(counts[_CHAT], len(pools[_CHAT]))
        counts[CALIBRATION_TEXTS[0]] = samples - counts[CALIBRATION_TEXTS[1]] - counts[_CHAT]
        parts = [_drawn(pools[name], count, seed, name) for name, count in counts.items()]
        drawn = torch.cat(parts)
    order = torch.tensor(_shuffled(range(len(drawn)), seed))
    return [
        {"input_ids": ids, LABELS: ids.clone()} for ids in torch.split(drawn[order], _BATCH_SIZE)
    ]


def _drawn(pool: Tensor, count: int, seed: int, name: str) -> Tensor:
    if count > len(pool):
        raise DataError(
            f"calibration asks for {count} windows of {pool.shape[1]} tokens from '{name}', which "
            f"has {len(pool)}. Ask for fewer samples or give a longer text."
        )
    return pool[sorted(random.Random(seed).sample(range(len(pool)), count))]


def _shuffled(values: Iterable[Any], seed: int) -> list[Any]:
    shuffled = list(values)
    random.Random(seed).shuffle(shuffled)
    return shuffled
