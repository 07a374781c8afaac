"""The quantization methods: one file each, found by its name (dashes for underscores).

A method's file defines

    quantize(layers: Sequence[CalibratedLayer], options: LayerOptions) -> Sequence[QuantizedWeight]

for layers that see the same input, and declares at its head, as literals,

    BITS           values that --bits accepts; () or absent: the method has bits of its own
    BIT_RANGE      instead of BITS: least and largest true bits per weight
    EXPORTED_BITS  the values of BITS that have an operator; absent: all of them
    NEEDS          what the walk over the model does for it: names of `NEEDS` here
    OPTIONS        fields of QuantConfig that only some methods read; absent: none of them
    STAGES         names of its stages that --without switches off; absent: none

Nothing else registers a method. Importing this package loads no torch: declarations are read from
the source, so that a wrong option is answered at once.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from bivlm_edge.quant.options import LayerOptions
    from bivlm_edge.quant.transform import CalibratedLayer
    from bivlm_edge.quant.weights import QuantizedWeight

NEEDS = {
    "hessian": "reads the second moments of the layer's inputs",
    "importance": "wants them weighted by the importance of tokens, if nothing else is asked for",
    "budget": "takes `options.byte_budget`, its share of one budget for the whole model",
    "propagation": "rounds the weight that makes the float output of the quantized model's inputs",
    "bias": "rounds for inputs around their mean: the bias takes up the mean error",
}


@dataclass(frozen=True, slots=True)
class Declaration:
    """The literals at the head of a method's file; see the package."""

    bits: tuple[float, ...] = ()
    bit_range: tuple[float, float] | None = None
    exported_bits: tuple[float, ...] = ()
    needs: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    stages: tuple[str, ...] = ()


class Method(Protocol):
    """The module of a method."""

    def quantize(
        self, layers: Sequence[CalibratedLayer], options: LayerOptions
    ) -> Sequence[QuantizedWeight]:
        """Quantize layers with the same input, one weight for each in the same order."""


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    folder = str(Path(__file__).parent)
    modules = (module.name for module in pkgutil.iter_modules([folder]))
    return tuple(sorted(name.replace("_", "-") for name in modules if not name.startswith("_")))


@cache
def declaration(name: str) -> Declaration:
    """What the file of a method declares, read without running it."""
    source = Path(__file__).with_name(f"{_module(name)}.py").read_text(encoding="utf-8")
    found = {
        target.id: statement.value
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    literals = {
        key: ast.literal_eval(found[key])
        for key in ("BITS", "BIT_RANGE", "EXPORTED_BITS", "NEEDS", "OPTIONS", "STAGES")
        if key in found
    }
    bits = literals.get("BITS", ())
    return Declaration(
        bits=bits,
        bit_range=literals.get("BIT_RANGE"),
        exported_bits=literals.get("EXPORTED_BITS", bits),
        needs=frozenset(literals.get("NEEDS", ())),
        options=frozenset(literals.get("OPTIONS", ())),
        stages=literals.get("STAGES", ()),
    )


def load(name: str) -> Method:
    """Import a method of `names()`; loads torch."""
    return cast(Method, importlib.import_module(f"{__name__}.{_module(name)}"))


def _module(name: str) -> str:
    return name.replace("-", "_")
