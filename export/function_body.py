"""A small writer for ONNX function bodies: one call per node, numbers become constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, NodeProto, helper, numpy_helper

from bivlm_edge.export.schemas import DOMAIN, MICROSOFT_DOMAIN, OPSET_VERSION

Operand = str | int | Sequence[int] | NDArray[Any] | np.generic
"""A value's name, an array, or integers (an int64 tensor: a scalar, or a vector from a list)."""


class FunctionBody:
    """Nodes in the order of their calls; every call returns the name of the new value.

    `body("Add", x, y)` appends `Add(x, y)`. A string is the name of a value, "" an absent input.
    The body of a loop is a FunctionBody of its own, with another prefix for its names.
    """

    def __init__(self, prefix: str = "v") -> None:
        self._prefix = prefix
        self.nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def __call__(
        self, operator: str, *operands: Operand, domain: str = "", **attributes: Any
    ) -> str:
        return self.several(1, operator, *operands, domain=domain, **attributes)[0]

    def several(
        self, outputs: int, operator: str, *operands: Operand, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with `outputs` outputs."""
        inputs = [self.operand(operand) for operand in operands]
        names = [self.new_name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, domain=domain, **attributes))
        return names

    def operand(self, operand: Operand) -> str:
        """Return the name of a value; arrays and integers become constants, equal ones shared."""
        if isinstance(operand, str):
            return operand
        typed = isinstance(operand, np.ndarray | np.generic)
        array = np.asarray(operand, dtype=None if typed else np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self.new_name()
            tensor = numpy_helper.from_array(array)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return self._constants[key]

    def rename_last(self, name: str) -> None:
        """Give the only output of the newest node its name in the signature."""
        self.nodes[-1].output[0] = name

    def new_name(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}"

    def function(
        self,
        operator: str,
        overload: str,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Sequence[str] = (),
        defaults: Sequence[AttributeProto] = (),
        opset: int,
        doc: str,
    ) -> FunctionProto:
        """Return the nodes so far as the function `operator` of our domain."""
        return helper.make_function(
            DOMAIN,
            operator,
            list(inputs),
            list(outputs),
            self.nodes,
            opset_imports=[
                helper.make_opsetid("", opset),
                helper.make_opsetid(MICROSOFT_DOMAIN, 1),
                helper.make_opsetid(DOMAIN, OPSET_VERSION),
            ],
            attributes=list(attributes),
            attribute_protos=list(defaults),
            doc_string=doc,
            overload=overload,
        )
