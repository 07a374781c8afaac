"""What a method may know about layers besides their weights and Hessians."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Options of layers with the same input; each method reads the fields it needs.

    Attributes:
        part: "vision", "projector" or "decoder".
        bits: Code bits of `rtn` and `gptq`.
        group: Columns per scale; None: the method's rule.
        grid: `gptq`: "minmax" or "lloyd".
        n_uns: `bivlm-paper`: number of unsalient groups.
        paper_exact: `bivlm-paper`: salient codes by equation 14.
        byte_budget: `bivlm-edge`: most bytes of all these layers together.
        seed: Seed of everything that is drawn.
        without: `bivlm-edge`: its stages that are switched off.
    """

    part: str = "decoder"
    bits: float = 2.0
    group: int | None = None
    grid: str = "minmax"
    n_uns: int = 5
    paper_exact: bool = False
    byte_budget: int = 0
    seed: int = 0
    without: Collection[str] = ()
