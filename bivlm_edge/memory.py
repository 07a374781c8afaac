"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_M_TRIM_THRESHOLD = -1  # malloc.h
_TRIM_BYTES = 128 << 10  # glibc's own threshold, before it adapts


def release_freed() -> None:
    """Return freed pages: glibc keeps those of blocks below 32 MB, for every thread apart.

    Does nothing where the C library has no `malloc_trim`.
    """
    trim = _malloc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_no_freed_memory() -> None:
    """Have malloc give freed memory back to the system for as long as this process lives.

    With every large block that is freed glibc raises, up to 64 MiB, what it keeps for later: after
    a picture of 16 MiB was resized, 15 to 40 MiB at the peak of the run behind it. A threshold of
    one's own ends that. Other C libraries are left as they are.
    """
    mallopt = _malloc("mallopt")
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


@cache
def _malloc(name: str) -> Any:
    """Return a function of glibc's malloc, or None."""
    return getattr(ctypes.CDLL(None), name, None)
