"""From a torch module to a graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn

from bivlm_edge.errors import UnsupportedModelError
from bivlm_edge.export import torch_ops


def trace(
    part: nn.Module,
    arguments: tuple[Any, ...],
    shapes: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
    opset: int,
    what: str,
) -> ir.Model:
    """Trace a module into a graph.

    Args:
        part: The module, in evaluation mode.
        arguments: What it is traced with.
        shapes: Axes that vary, by argument of its forward.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        opset: Version of the standard operators.
        what: For people.

    Raises:
        UnsupportedModelError: torch cannot.
    """
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                part,
                arguments,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table=torch_ops.translation_table(),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"torch cannot trace the {what} of this checkpoint: {first} "
            "Run again with --debug for the full report and file an issue with the model's name."
        ) from error
    if program is None:  # pragma: no cover - only for exports to a file
        raise UnsupportedModelError(f"torch returned no graph for the {what}.")
    optimizer.optimize_ir(program.model, should_fold=_fold_unless_it_grows)
    return program.model


def _fold_unless_it_grows(node: ir.Node) -> bool | None:
    """Leave the Cast of a stored float16 scale to load time: the file holds the small form."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    return False if source is not None and source.is_initializer() else None


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes about itself off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
