"""Another selector in an exported graph: the node is edited in memory, the weights stay mapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.errors import RequestError
from bivlm_edge.redundancy.plan import RANDOM

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_OPERATOR = "TokenPrune"
_DEFAULT_MODE = "mmr"  # of the operator
_SCORES, _SEGMENTS = 1, 2  # inputs
_STEPS_PER_UNIT = 4096.0  # of a normalised pixel
_MOST_HASHES = 1 << 30
# TokenPrune has no form of these without scores
_NEED_SCORES = ("mmr", "topk_score")


class PruneGraph:
    """The graph of an exported model, whose external data are never read.

    Attributes:
        mode: The selector that it was exported with.
    """

    def __init__(self, paths: BundlePaths) -> None:
        """Read the graph.

        Raises:
            RequestError: It has no TokenPrune, or the package onnx is missing.
        """
        onnx = _onnx()
        self._paths = paths
        self._model: ModelProto = onnx.load(str(paths.graph), load_external_data=False)
        nodes = list(_prune_nodes(self._model.graph))
        if not nodes:
            raise RequestError(
                f"'{paths.graph}' drops no image tokens, so that nothing can be varied. Export "
                "the model with --keep-tokens, e.g. --keep-tokens 0.5: any other number of tokens "
                "is then chosen at run time."
            )
        self.mode = _mode(nodes[0][1])

    def with_mode(self, mode: str, seed: int) -> bytes:
        """Return the graph with another selector, serialized.

        `random` draws for every picture anew: numbers of images, which its generator counts by,
        start at a hash of the pixels. In an exported file they start at 0, so that one seed takes
        the same places in all pictures, and a few seeds are a few samples only.

        Args:
            mode: A mode of TokenPrune.
            seed: Of `random`.

        Raises:
            RequestError: The mode needs scores or numbers of pictures, and the graph has none.
        """
        onnx = _onnx()
        model: Any = onnx.ModelProto()
        model.CopyFrom(self._model)
        for graph, node in list(_prune_nodes(model.graph)):
            if mode in _NEED_SCORES and not _has_input(node, _SCORES):
                raise RequestError(
                    f"mode {mode} needs scores of the image tokens, and '{self._paths.graph}' "
                    f"computes none (it was exported with --prune-mode {self.mode}). Leave {mode} "
                    f"out of --modes, or export the model with --prune-mode {mode}."
                )
            _set(node, "mode", mode)
            if mode == RANDOM:
                if not _has_input(node, _SEGMENTS):
                    raise RequestError(
                        f"random cannot draw for each picture in '{self._paths.graph}', whose "
                        "TokenPrune does not tell pictures apart (no input segments). Leave "
                        "random out of --modes, or export the model with this version."
                    )
                _set(node, "seed", seed)
                _number_by_pixels(graph, node)
        # fallbacks of the old mode; without them a missing library cannot go unnoticed
        kept = [function for function in model.functions if function.name != _OPERATOR]
        del model.functions[:]
        model.functions.extend(kept)
        serialized: bytes = model.SerializeToString()
        return serialized


def _number_by_pixels(graph: GraphProto, node: NodeProto) -> None:
    """Let the numbers of images in `segments` start at a hash of the pixels."""
    from onnx import TensorProto, numpy_helper

    helper = _onnx().helper
    segments = node.input[_SEGMENTS]

    def name(value: str) -> str:
        return f"{node.name}/by_pixels/{value}"

    constants: dict[str, NDArray[Any]] = {
        "steps": np.array(_STEPS_PER_UNIT, np.float32),
        "most": np.array(_MOST_HASHES, np.int64),
        "zero": np.array(0, np.int32),
    }
    steps: list[tuple[str, list[str], str, dict[str, int]]] = [
        ("Cast", ["pixel_values"], name("pixels"), {"to": TensorProto.FLOAT}),
        ("Mul", [name("pixels"), name("steps")], name("scaled"), {}),
        # integers: the sum is the same in any order
        ("Cast", [name("scaled")], name("rounded"), {"to": TensorProto.INT64}),
        ("ReduceSum", [name("rounded")], name("sum"), {"keepdims": 0}),
        ("Mod", [name("sum"), name("most")], name("hash_64"), {}),
        ("Cast", [name("hash_64")], name("hash"), {"to": TensorProto.INT32}),
        ("Add", [segments, name("hash")], name("shifted"), {}),
        ("GreaterOrEqual", [segments, name("zero")], name("is_image"), {}),
        ("Where", [name("is_image"), name("shifted"), segments], name("segments"), {}),
    ]
    nodes = [
        helper.make_node("Constant", [], [name(key)], value=numpy_helper.from_array(value))
        for key, value in constants.items()
    ]
    nodes += [
        helper.make_node(operator, inputs, [output], name=output, **attributes)
        for operator, inputs, output, attributes in steps
    ]
    place = list(graph.node).index(node)
    for offset, new in enumerate(nodes):
        graph.node.insert(place + offset, new)
    node.input[_SEGMENTS] = name("segments")


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise RequestError(
            "bivlm-redundancy edits the graph, which needs the package onnx, and its statistics "
            "need scipy: pip install onnx scipy, or run it on the host instead of the device."
        ) from error
    return onnx


def _prune_nodes(graph: GraphProto) -> Iterator[tuple[GraphProto, NodeProto]]:
    """Yield each TokenPrune with the graph that it stands in."""
    for node in graph.node:
        if node.op_type == _OPERATOR:
            yield graph, node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _prune_nodes(attribute.g)


def _mode(node: NodeProto) -> str:
    found = [attribute.s.decode() for attribute in node.attribute if attribute.name == "mode"]
    return found[0] if found else _DEFAULT_MODE


def _set(node: NodeProto, name: str, value: str | int) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, _onnx().helper.make_attribute(name, value)])


def _has_input(node: NodeProto, index: int) -> bool:
    return len(node.input) > index and node.input[index] != ""
