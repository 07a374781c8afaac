"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def release_freed() -> None:
    """Return freed pages: glibc keeps those of blocks below 32 MB, for every thread apart.

    Does nothing where the C library has no `malloc_trim`.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
