"""Memory of this process as Linux counts it."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_SMAPS_ROLLUP = Path("/proc/self/smaps_rollup")


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
