"""Large tensors lie in large pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ANSWER = """
from bivlm_edge.memory import take_huge_pages
take_huge_pages()
import torch
tensor = torch.ones(16 << 20)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")))
"""


def _huge_kib(environment: dict[str, str]) -> int:
    result = subprocess.run(
        [sys.executable, "-c", _ANSWER],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.skipif(
    not _SETTING.is_file() or "[madvise]" not in _SETTING.read_text(),
    reason="the system does not leave it to programs whether they take huge pages",
)
def test_torch_takes_huge_pages_unless_the_user_says_otherwise() -> None:
    assert _huge_kib({}) >= 32 << 10  # of 64 MiB
    assert _huge_kib({"THP_MEM_ALLOC_ENABLE": "0"}) == 0
