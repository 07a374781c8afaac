"""Finished runs on disk, each keyed by all that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bivlm_edge.errors import DataError, OutputError

# Measured by other means, or not at all: their code does not change a row.
_OTHER_CODE = ("cli", "synthetic", "export", "report.py", "compare")
_COMPARE_CODE = ("job.py", "evaluation.py")
_LIBRARIES = ("torch", "transformers", "numpy", "scipy")
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

    def __init__(self, folder: Path) -> None:
        """Make the folder.

        Raises:
            OutputError: It cannot be made.
        """
        self._folder = folder
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
            is_whole = content["identity"] == _plain(identity) and set(row) >= REQUIRED
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
        text = json.dumps(_plain(identity), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._folder / f"{file_name(name)}-{digest}.json"


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


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: an interrupt leaves the old one or the new one.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror}. Free some space or choose another place."
        ) from error


def fingerprint(source: str) -> str:
    """Tell whether a model or data set is the same: SHA-256 of its files; else its name."""
    path = Path(source)
    if not path.exists():
        return source
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path.parent)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@cache
def code_version() -> str:
    """Tell whether the code that measures is the same: SHA-256 of its files."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts[0] not in _OTHER_CODE or (parts[0] == "compare" and path.name in _COMPARE_CODE):
            digest.update("/".join(parts).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute the numbers."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; sets in order."""
    return json.loads(json.dumps(value, default=sorted))
