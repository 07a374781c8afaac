"""Logits of one position to a token: pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.errors import BundleError, RequestError

Logits = NDArray[np.floating[Any]]
Sampler = Callable[[Logits], int]


def greedy(logits: Logits) -> int:
    """Return the most likely token of `logits` [vocabulary]; the lowest id if several are.

    Raises:
        BundleError: The logits hold NaN or infinity, as after an overflow in float16.
    """
    token = int(np.argmax(logits))  # argmax returns the first NaN if there is one
    if not np.isfinite(logits[token]):
        raise BundleError(
            f"the model computed {logits[token]} as a logit, so no token can be chosen. If it was "
            "exported with --dtype fp16, export it with --dtype fp32."
        )
    return token


def top_p_sampler(temperature: float, top_p: float = 1.0, seed: int | None = None) -> Sampler:
    """Return a sampler that draws from the smallest set of tokens with probability `top_p`.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_p: Probability mass to draw from, 0 < top_p <= 1. The most likely token is always in.
        seed: Of the draws; None: a different one each time.

    Raises:
        RequestError: A value is outside its range.
    """
    if not (np.isfinite(temperature) and temperature >= 0):
        raise RequestError(f"--temperature {temperature:g} is not 0 or more. 0 is greedy.")
    if not 0 < top_p <= 1:
        raise RequestError(f"--top-p {top_p:g} is outside (0, 1]. 1 draws from all tokens.")
    if temperature == 0:
        return greedy
    generator = np.random.default_rng(seed)

    def draw(logits: Logits) -> int:
        top = logits[greedy(logits)]
        weights = np.exp((logits.astype(np.float64) - float(top)) / temperature)
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order])
        kept = int(np.searchsorted(mass, top_p * mass[-1])) + 1
        drawn = int(np.searchsorted(mass[:kept], generator.random() * mass[:kept][-1], "right"))
        return int(order[min(drawn, kept - 1)])

    return draw
