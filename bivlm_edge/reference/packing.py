"""Packing of questions: all those on one picture behind one prefix with its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from bivlm_edge.reference.architecture import ASSISTANT, END, IMAGE, USER
from bivlm_edge.reference.task import UNKNOWN

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences with one image prefix each and all questions on that image behind it.

    A question sees the prefix and itself, and counts its positions from the end of the prefix:
    each block has the tokens and positions that it has when asked alone.

    Attributes:
        ids: int64 ``(sequences, length)``, padded at the end.
        positions: int64 ``(sequences, length)``.
        blocks: int64 ``(sequences, length)``: 0 prefix, 1.. questions, -1 padding.
        targets: int64 ``(sequences, length)``: the token that must follow, UNKNOWN where any may.
        question: int64 ``(sequences, length)``: running number of the question within the batch
            where there is a target, else -1.
    """

    ids: Ids
    positions: Ids
    blocks: Ids
    targets: Ids
    question: Ids


class Packer:
    """Turns questions into packed token sequences; remembers the tokens of each text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[tuple[str, str], tuple[list[int], int]] = {}
        self.image_start = len(self._encode(USER))
        self.prefix = self._encode(USER + IMAGE * image_tokens)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def block(self, question: str, answer: str) -> tuple[list[int], int]:
        """The tokens of one question with its answer, and how many of them are the prompt."""
        key = question, answer
        if key not in self._cache:
            prompt = self._encode(question + ASSISTANT)
            self._cache[key] = (prompt + self._encode(answer + END), len(prompt))
        return self._cache[key]

    def pack(self, questions: Sequence[Sequence[tuple[str, str]]]) -> PackedBatch:
        """One sequence per picture, from the questions on each."""
        blocks = [[self.block(*pair) for pair in pairs] for pairs in questions]
        start = len(self.prefix)
        length = start + max(sum(len(ids) for ids, _ in row) for row in blocks)
        shape = (len(blocks), length)
        ids = np.full(shape, self._tokenizer.pad_token_id, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        block = np.full(shape, -1, dtype=np.int64)
        targets = np.full(shape, UNKNOWN, dtype=np.int64)
        question = np.full(shape, -1, dtype=np.int64)
        ids[:, :start] = self.prefix
        positions[:, :start] = np.arange(start)
        block[:, :start] = 0
        number = 0
        for row, members in enumerate(blocks):
            at = start
            for index, (tokens, prompt) in enumerate(members, start=1):
                end = at + len(tokens)
                ids[row, at:end] = tokens
                positions[row, at:end] = np.arange(start, start + len(tokens))
                block[row, at:end] = index
                targets[row, at + prompt - 1 : end - 1] = tokens[prompt:]
                question[row, at + prompt - 1 : end - 1] = number
                number += 1
                at = end
        return PackedBatch(ids, positions, block, targets, question)
