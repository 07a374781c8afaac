"""Exports of known architectures at their real sizes, with random weights, in the user's cache.

For measuring speed and memory without a download. This module needs no torch; building does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from bivlm_edge import __version__
from bivlm_edge.bundle import BUNDLE_VERSION
from bivlm_edge.config import DEFAULT_VOCABULARY_BITS
from bivlm_edge.errors import OutputError, RequestError
from bivlm_edge.package_files import cache_folder
from bivlm_edge.quant.packed import FORMAT

Method = Literal["bivlm-edge", "nbits4"]
Progress = Callable[[str, int, int], None]

NAMES = ("smolvlm-256m", "smolvlm-500m", "llava-ov-0.5b", "qwen2.5-vl-3b", "llava-1.5-7b")
METHODS: tuple[Method, ...] = get_args(Method)
_WRITERS = ("export", "models", "quant", "synthetic")


def cached(
    name: str,
    method: Method,
    *,
    pruned: bool = False,
    vocabulary_bits: int = DEFAULT_VOCABULARY_BITS,
) -> Path:
    """Return where the export of an architecture lies, or will lie, in the cache.

    Args:
        name: One of NAMES.
        method: One of METHODS.
        pruned: Of the export whose runs choose their number of image tokens.
        vocabulary_bits: Of the token table and the head.

    Raises:
        RequestError: There is no such architecture.
    """
    if name not in NAMES:
        raise RequestError(f"--synthetic {name!r} is not known. Accepted: {', '.join(NAMES)}.")
    version = f"{__version__}-bundle{BUNDLE_VERSION}-format{FORMAT}-{_code_that_writes():08x}"
    stem = f"{name}-{method}-pruned" if pruned else f"{name}-{method}"
    if vocabulary_bits != DEFAULT_VOCABULARY_BITS:
        stem += f"-vocabulary{vocabulary_bits}"
    return cache_folder() / "synthetic" / version / f"{stem}.onnx"


@cache
def _code_that_writes() -> int:
    """A checksum of the modules that an export depends on: other code makes other graphs."""
    package, crc = Path(__file__).parent.parent, 0
    for part in _WRITERS:
        for path in sorted((package / part).rglob("*.py")):
            crc = zlib.crc32(path.read_bytes(), crc)
    return crc


def ensure(
    name: str,
    method: Method,
    *,
    pruned: bool = False,
    vocabulary_bits: int = DEFAULT_VOCABULARY_BITS,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the path of an export, which is built if the cache lacks it.

    Args:
        name: One of NAMES.
        method: One of METHODS.
        pruned: With pruning of image tokens; a run keeps half of them unless it asks otherwise.
        vocabulary_bits: Bits of the token table and the head, one of VOCABULARY_BITS.
        refresh: Build it anew.
        progress: Called with (what runs, steps done, steps in all).

    Raises:
        RequestError: There is no such architecture, or torch is not installed.
        OutputError: The cache is not writable, or the disk is full.
    """
    path = cached(name, method, pruned=pruned, vocabulary_bits=vocabulary_bits)
    if path.is_file() and not refresh:
        return path
    try:
        from bivlm_edge.synthetic.build import build
    except ModuleNotFoundError as error:
        raise RequestError(
            f"--synthetic {name} must be built first, which needs {error.name}: 'pip install .' in "
            f"the source tree installs it. Or build it elsewhere and copy '{path.parent}' here."
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write into '{path.parent}': {error.strerror}. Set XDG_CACHE_HOME to a folder "
            "with some gigabytes of space."
        ) from error
    build(
        name,
        method,
        path,
        pruned=pruned,
        vocabulary_bits=vocabulary_bits,
        overwrite=refresh,
        progress=progress,
    )
    return path
