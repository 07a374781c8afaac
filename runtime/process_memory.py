"""Memory of this process: what Linux counts, and what malloc holds back of it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_STATUS = Path("/proc/self/status")
_SMAPS_ROLLUP = Path("/proc/self/smaps_rollup")
_M_TRIM_THRESHOLD = -1  # malloc.h
_TRIM_BYTES = 128 << 10  # glibc's own threshold, before it adapts


def memory_bytes() -> dict[str, int]:
    """Return the memory of this process in bytes; empty where there is no /proc.

    Keys: `vm_hwm` (highest resident size so far), `rss_anon` (private: activations, copies),
    `rss_file` (mapped files, such as the weights: clean pages that the system can drop), `pss`
    (resident, shared pages divided by their users).
    """
    wanted = {"VmHWM": "vm_hwm", "RssAnon": "rss_anon", "RssFile": "rss_file", "Pss": "pss"}
    found = {}
    for path in (_STATUS, _SMAPS_ROLLUP):
        try:
            lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in wanted:
                found[wanted[name]] = int(value.split()[0]) * 1024
    return found


def keep_no_freed_memory() -> None:
    """Have malloc give freed memory back to the system for as long as this process lives.

    With every large block that is freed glibc raises, up to 64 MiB, what it keeps for later: after
    a picture of 16 MiB was resized, 15 to 40 MiB at the peak of the run behind it. A threshold of
    one's own ends that. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
