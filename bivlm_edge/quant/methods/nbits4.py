"""ONNX Runtime's usual 4 bits: `rtn` in groups of 32, the peer that benchmarks compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bivlm_edge.quant.methods import rtn
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import GroupWeight

GROUP = 32

_BITS = 4


def quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> list[GroupWeight]:
    """Round every weight to the nearest of 16 codes."""
    return rtn.quantize(layers, replace(options, bits=_BITS, group=GROUP))
