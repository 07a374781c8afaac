"""How many image tokens a fraction keeps. No torch: exporter and runtime share it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bivlm_edge.errors import RequestError

KEEP_TOKENS = "keep_tokens"  # optional input of a graph that prunes: tokens kept per image


AUTO = "auto"  # --keep-tokens: the exporter chooses


@dataclass(frozen=True, slots=True)
class KeepChoice:
    """How many tokens of each image an export keeps, by what was measured.

    Attributes:
        kept: Tokens.
        account: What was measured and why, ready for JSON.
    """

    kept: int
    account: dict[str, Any]


def parse_fraction(text: str) -> float | None:
    """Return the fraction that `--keep-tokens` names, None for AUTO.

    Raises:
        RequestError: It is neither.
    """
    if text == AUTO:
        return None
    try:
        fraction = float(text)
    except ValueError:
        raise RequestError(
            f"--keep-tokens {text!r} is neither a fraction in (0, 1] nor {AUTO}. 0.25 keeps a "
            f"quarter of the image tokens; {AUTO} finds the smallest fraction that is enough."
        ) from None
    check_fraction(fraction)
    return fraction


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
