"""Finished runs on disk, each keyed by all that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from bivlm_edge.datasets import ImageSource, load_jsonl
from bivlm_edge.errors import DataError, OutputError
from bivlm_edge.files import write_text

REQUIRED = frozenset(
    {
        "method",
        "budget",
        "claimed_bits",
        "true_bits",
        "accuracy",
        "open_ended_accuracy",
        "perplexity",
        "seconds",
        "peak_mb",
    }
)


class RowFolder:
    """One JSON file per finished run."""

    def __init__(self, folder: Path, required: Set[str] = REQUIRED) -> None:
        """Make the folder.

        Args:
            folder: Where the files lie.
            required: What every row holds.

        Raises:
            OutputError: It cannot be made.
        """
        self._folder = folder
        self._required = required
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder '{folder}': {error.strerror}. Choose another --output."
            ) from error

    def load(self, name: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row of a run, or None if it has not finished.

        Raises:
            DataError: Its file is damaged.
        """
        path = self._path(name, identity)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            row: dict[str, Any] = content["row"]
            is_whole = content["identity"] == _plain(identity) and set(row) >= self._required
        except (OSError, ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise DataError(
                f"the row of run '{name}' in '{path}' is damaged. Delete this file and start the "
                "command again: it repeats this run only."
            )
        return row

    def save(self, name: str, identity: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Keep a finished run.

        Raises:
            OutputError: The folder is not writable or the disk full.
        """
        content = {"identity": _plain(identity), "row": row}
        write_text(self._path(name, identity), json.dumps(content, indent=1, allow_nan=False))

    def _path(self, name: str, identity: Mapping[str, Any]) -> Path:
        return self._folder / f"{file_name(name)}-{identity_digest(identity)}.json"


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return 12 digits that stand for all that a row depends on."""
    text = json.dumps(_plain(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_name(run: str) -> str:
    """Return the name of a run in letters that every file system takes."""
    return "".join(sign if sign.isalnum() or sign in "-@." else "_" for sign in run)[:80]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `bivlm-compare --json` wrote.

    Raises:
        DataError: It is missing or something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        is_whole = bool(rows) and all(set(row) >= REQUIRED for row in rows)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a file of --json.") from error
    if not is_whole:
        raise DataError(f"{path} holds no rows of bivlm-compare. Give a file of --json.")
    return list(rows)


def rows_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a JSON list with one row per line."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def fingerprint(source: str) -> str:
    """Tell whether a model or data set is the same: SHA-256 of its files; else its name.

    Pictures that a .jsonl file names belong to it, wherever they lie.

    Raises:
        DataError: A .jsonl file or one of its pictures cannot be read.
    """
    path = Path(source)
    if not path.exists():
        return source
    digest = hashlib.sha256()
    for file in _files(path):
        name = os.path.relpath(file, path.parent)
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256")
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}.") from error
        digest.update(f"{name}\0{file.stat().st_size}\0".encode() + content.digest())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    own = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    yield from own
    lists = [file for file in own if file.suffix == ".jsonl"]
    images = (item.image for file in lists for item in load_jsonl(file))
    named = {image.path for image in images if isinstance(image, ImageSource)}
    yield from sorted(named - set(own))


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; sets in order."""
    return json.loads(json.dumps(value, default=sorted))
