"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bivlm_edge.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: an interrupt leaves the old one or the new one.

    Raises:
        OutputError: It cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: an interrupt leaves the old one or the new one.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror}. Free some space or choose another place."
        ) from error
