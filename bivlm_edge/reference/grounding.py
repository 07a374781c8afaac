"""What teaches a decoder from scratch where to look: words that match patches, led attention.

With answers alone the decoder of scenes had not come past naming what is frequent in the picture
after 600 steps: finding the one circle and then its color are two steps of attention, and neither
helps without the other. `match_words` gives patches and the words for what they show similar
vectors; `look_for_alike` starts attention as a look for similar vectors (Trockman and Kolter,
"Mimetic Initialization of Self-Attention Layers", 2023); `Pointing` asks some heads for the two
steps, and closes the short way from the answer to the picture. The last stage trains without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from bivlm_edge.reference.packing import PackedBatch
from bivlm_edge.reference.task import UNKNOWN

_WORD_LAYER, _ANSWER_LAYER = 1, 2
_HEADS = 2  # of each of the two layers
_QUERY_SCALE = 2.0  # times the weights' usual deviation: similar vectors stand out
_COPY_SCALE = 0.5  # of a value that comes back out of attention
_KEY_NOISE = 0.1  # of the queries' weights

Ids = NDArray[np.int64]


def named_classes(
    tokenizer: PreTrainedTokenizerFast,
    words: Mapping[str, Mapping[str, int]],
    classifiers: Sequence[str],
) -> Ids:
    """Which class of each classifier a token names.

    Args:
        tokenizer: Has one token per word, at the start of a text and behind a space.
        words: Classifier -> word -> class.
        classifiers: All of them, in their order.

    Returns:
        int64 (classifiers, vocabulary), UNKNOWN where a token names none.
    """
    named = np.full((len(classifiers), len(tokenizer)), UNKNOWN, dtype=np.int64)
    for name, classes in words.items():
        for word, number in classes.items():
            for text in (word, f"the {word}"):
                token = tokenizer.encode(text, add_special_tokens=False)[-1]
                named[classifiers.index(name), token] = number
    return named


def match_words(patches: Tensor, embeddings: Tensor, labels: Tensor, named: Ids) -> Tensor:
    """Cross entropy of the words for what a patch shows, over the words of each classifier.

    All tokens that name a class share its probability evenly.

    Args:
        patches: Projected patches (images, tokens, width).
        embeddings: Of the vocabulary, (vocabulary, width).
        labels: int64 (images, tokens, classifiers); class 0 is the background's and has no word.
        named: See `named_classes`.
    """
    losses = []
    for number, classes in enumerate(torch.from_numpy(named)):
        tokens = torch.nonzero(classes != UNKNOWN)[:, 0]
        if not len(tokens):
            continue
        truth = labels[..., number].flatten()
        shown = truth > 0
        logits = patches.flatten(0, 1)[shown] @ embeddings[tokens].T
        right = (classes[tokens] == truth[shown][:, None]).float()
        likelihood = (logits.float().log_softmax(dim=-1) * right).sum(dim=-1)
        losses.append(-(likelihood / right.sum(dim=-1)).mean())
    return torch.stack(losses).sum()


@torch.no_grad()
def look_for_alike(llava: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    """Draw the decoder's attention anew: keys as queries, values that come out as they went in."""
    for layer in llava.model.language_model.layers:
        attention = layer.self_attn
        width = attention.q_proj.in_features
        deviation = _QUERY_SCALE * llava.config.text_config.initializer_range
        queries = torch.randn(attention.q_proj.weight.shape, generator=generator) * deviation
        attention.q_proj.weight.copy_(queries)
        noise = torch.randn(queries.shape, generator=generator) * deviation
        attention.k_proj.weight.copy_(queries + _KEY_NOISE * noise)
        values = torch.randn(attention.v_proj.weight.shape, generator=generator) / width**0.5
        attention.v_proj.weight.copy_(values)
        attention.o_proj.weight.copy_(_COPY_SCALE * values.T)


@dataclass(frozen=True, slots=True)
class Pointing:
    """Where the words of packed questions, and the answers to them, are to look.

    A word means what it names together with the word before it: "red" all that is red, the
    "circle" of "red circle" what is both. It is to look at the patches that show that, or at the
    first token where the picture has no such thing. The position before an answer is to look at
    its question's words that name something.

    Attributes:
        packed: The questions.
        labels: int64 (sequences, patches, classifiers).
        named: See `named_classes`.
        image_start: Position of the first patch.
    """

    packed: PackedBatch
    labels: Ids
    named: Ids
    image_start: int

    @property
    def names(self) -> NDArray[np.bool_]:
        """Which tokens of the questions name something, (sequences, length)."""
        names: NDArray[np.bool_] = (self.named[:, self.packed.ids] != UNKNOWN).any(axis=0)
        return names & (self.packed.blocks > 0)

    def hidden(self) -> NDArray[np.bool_]:
        """What may not be looked at, (sequences, length, length): all but names see no patch."""
        blind = (self.packed.blocks > 0) & ~self.names
        is_patch = np.zeros(blind.shape[1], dtype=np.bool_)
        is_patch[self.image_start : self.image_start + self.labels.shape[1]] = True
        found: NDArray[np.bool_] = blind[:, :, None] & is_patch
        return found

    def loss(self, attentions: Sequence[Tensor]) -> Tensor:
        """Mean negative logarithm of the attention that goes where it should, of both steps.

        Args:
            attentions: Per layer, probabilities (sequences, heads, length, length).
        """
        return _missed(attentions[_WORD_LAYER], *self._words()) + _missed(
            attentions[_ANSWER_LAYER], *self._answers()
        )

    def _words(self) -> tuple[Ids, Ids, NDArray[np.bool_]]:
        """Sequence, position and targets (words, length) of all words that name something."""
        rows, columns = np.nonzero(self.names)
        before = np.pad(self.packed.ids[:, :-1], ((0, 0), (1, 0)))
        shown = np.ones((len(rows), self.labels.shape[1]), dtype=np.bool_)
        for number, classes in enumerate(self.named):
            for ids in (self.packed.ids, before):
                wanted = classes[ids[rows, columns]][:, None]
                shown &= (wanted == UNKNOWN) | (self.labels[rows, :, number] == wanted)
        targets = np.zeros((len(rows), self.packed.ids.shape[1]), dtype=np.bool_)
        targets[:, self.image_start : self.image_start + self.labels.shape[1]] = shown
        targets[~shown.any(axis=1), 0] = True
        return rows, columns, targets

    def _answers(self) -> tuple[Ids, Ids, NDArray[np.bool_]]:
        """The same of all positions before an answer whose question names something."""
        answers = self.packed.targets != UNKNOWN
        answers[:, 1:] &= self.packed.targets[:, :-1] == UNKNOWN
        rows, columns = np.nonzero(answers)
        blocks = self.packed.blocks
        earlier = np.arange(blocks.shape[1]) < columns[:, None]
        targets = self.names[rows] & earlier & (blocks[rows] == blocks[rows, columns][:, None])
        has_any = targets.any(axis=1)
        return rows[has_any], columns[has_any], targets[has_any]


def _missed(attention: Tensor, rows: Ids, columns: Ids, targets: NDArray[np.bool_]) -> Tensor:
    probabilities = attention[:, :_HEADS][torch.from_numpy(rows), :, torch.from_numpy(columns)]
    hits = (probabilities.float() * torch.from_numpy(targets)[:, None]).sum(dim=-1)
    return -hits.clamp_min(1e-6).log().mean()
