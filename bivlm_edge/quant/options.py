"""What a quantization method may know about the layer besides its weight and Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Options of one layer for every method; each method reads the fields it needs.

    Attributes:
        name: Dotted name of the layer, for messages.
        part: "vision", "projector" or "decoder".
        bits: Code bits of `rtn` and `gptq`.
        group: Columns per scale; None: the method's rule.
        byte_budget: `bivlm-edge`: the most bytes that the packed layer may take.
        held_out: Hessian of inputs that the method must not fit, to choose between variants.
        seed: Seed of everything drawn for this layer.
        n_uns: `bivlm-paper`: number of unsalient groups.
    """

    name: str = "layer"
    part: str = "decoder"
    bits: float = 2.0
    group: int | None = None
    byte_budget: int | None = None
    held_out: Tensor | None = None
    seed: int = 0
    n_uns: int = 5
