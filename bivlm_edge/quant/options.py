"""What a baseline method may know about the layer besides its weight and Hessian."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Options of one layer for every baseline; each method reads the fields it needs.

    Attributes:
        part: "vision", "projector" or "decoder".
        bits: Code bits of `rtn` and `gptq`.
        group: Columns per scale; None: the method's rule.
        n_uns: `bivlm-paper`: number of unsalient groups.
    """

    part: str = "decoder"
    bits: float = 2.0
    group: int | None = None
    n_uns: int = 5
