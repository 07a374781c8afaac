"""How many image tokens a fraction keeps. No torch: exporter and runtime share it."""

from __future__ import annotations

import math

from bivlm_edge.errors import RequestError

KEEP_TOKENS = "keep_tokens"  # optional input of a graph that prunes: tokens kept per image


def check_fraction(fraction: float) -> None:
    """Refuse what `--keep-tokens` does not take.

    Raises:
        RequestError: `fraction` is outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise RequestError(
            f"--keep-tokens {fraction:g} is not a fraction in (0, 1]. "
            "0.25 keeps a quarter of the image tokens."
        )


def tokens_to_keep(fraction: float, tokens: int) -> int:
    """Return ceil(tokens * fraction), at least 1: the count of TokenPrune's keep_ratio (OPS.md).

    Without the millionth that is taken off, 0.1 of 30 would be 4.
    """
    return min(tokens, max(1, math.ceil(tokens * fraction - 1e-6)))
