"""What leads a decoder's attention in training: words, classes, and where they are to look."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bivlm_edge.reference.architecture import build_tokenizer
from bivlm_edge.reference.grounding import Pointing, match_words, named_classes
from bivlm_edge.reference.packing import Packer
from bivlm_edge.reference.task import UNKNOWN

CLASSIFIERS = ("color", "size", "shape")
WORDS = {"color": {"red": 1, "blue": 2}, "shape": {"circle": 1, "circles": 1, "square": 2}}
QUESTIONS = (("what is the red shape?", "circle"), ("is a blue circle there?", "no"))
LABELS = np.array([[[0, 0, 0], [1, 5, 1], [2, 5, 2], [2, UNKNOWN, UNKNOWN]]])  # one of four patches


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [text for pair in QUESTIONS for text in pair]
    return build_tokenizer([*texts, "red", "blue square circles"])


@pytest.fixture(scope="module")
def pointing(tokenizer: PreTrainedTokenizerFast) -> Pointing:
    packer = Packer(tokenizer, LABELS.shape[1])
    named = named_classes(tokenizer, WORDS, CLASSIFIERS)
    return Pointing(packer.pack([QUESTIONS]), LABELS, named, packer.image_start)


def looks(pointing: Pointing, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Each word that names something with the positions that it is to look at."""
    rows, columns, targets = pointing._words()
    words = tokenizer.convert_ids_to_tokens(pointing.packed.ids[rows, columns].tolist())
    return [
        [word.strip("\u0120"), *np.flatnonzero(target).tolist()]
        for word, target in zip(words, targets, strict=True)
    ]


def test_words_name_their_classes_wherever_they_stand(tokenizer: PreTrainedTokenizerFast) -> None:
    named = named_classes(tokenizer, WORDS, CLASSIFIERS)
    for text, classifier, number in (("red", 0, 1), ("a red", 0, 1), ("two circles", 2, 1)):
        token = tokenizer.encode(text)[-1]
        assert named[:, token].tolist() == [
            number if row == classifier else UNKNOWN for row in range(3)
        ]
    assert (named[1] == UNKNOWN).all()


def test_words_look_at_what_they_name_with_the_word_before_them(
    pointing: Pointing, tokenizer: PreTrainedTokenizerFast
) -> None:
    start = pointing.image_start
    assert looks(pointing, tokenizer) == [
        ["red", start + 1],
        ["circle", start + 1],  # the answer
        ["blue", start + 2, start + 3],
        ["circle", 0],  # there is no blue one
    ]


def test_answers_look_at_the_names_in_their_own_question(
    pointing: Pointing, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows, columns, targets = pointing._answers()
    ids = pointing.packed.ids
    following = ids[rows, columns + 1]
    assert [tokenizer.decode(token) for token in following] == [
        "circle",
        "no",
    ]
    seen = [
        tokenizer.decode(ids[row][target]).split()
        for row, target in zip(rows, targets, strict=True)
    ]
    assert seen == [["red"], ["blue", "circle"]]


def test_only_words_that_name_something_see_patches(pointing: Pointing) -> None:
    hidden = pointing.hidden()[0]
    patches = slice(pointing.image_start, pointing.image_start + LABELS.shape[1])
    asked = pointing.packed.blocks[0] > 0
    names = pointing.names[0]
    assert hidden[asked & ~names][:, patches].all()
    assert not hidden[names].any()
    assert not hidden[~asked].any()
    hidden[:, patches] = False
    assert not hidden.any()


def test_loss_is_the_logarithm_of_what_is_attended_to(pointing: Pointing) -> None:
    length = pointing.packed.ids.shape[1]
    even = torch.full((1, 3, length, length), 1 / length)
    words = np.log([1 / length, 1 / length, 2 / length, 1 / length]).mean()
    answers = np.log([1 / length, 2 / length]).mean()
    loss = pointing.loss([torch.zeros(0), even, even])
    assert loss.item() == pytest.approx(-words - answers, rel=1e-5)  # float32


def test_patches_are_matched_with_all_forms_of_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    named = named_classes(tokenizer, WORDS, CLASSIFIERS)
    embeddings = torch.zeros(len(tokenizer), 2)
    embeddings[torch.from_numpy((named[0] == 1) | (named[2] == 1)), 0] = 50.0
    embeddings[torch.from_numpy((named[0] == 2) | (named[2] == 2)), 1] = 50.0
    patches = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    forms = [(named[0] == 1).sum(), (named[2] == 1).sum(), (named[2] == 2).sum()]
    # a patch gives its class everything, in equal parts to its forms; both blues are alike
    expected = np.log(forms[0]) + np.log([forms[1], forms[2]]).mean()
    loss = match_words(patches, embeddings, torch.from_numpy(LABELS), named)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
