"""What a method is told of layers with the same input: weights to approximate, Hessians, a seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from bivlm_edge.calibration.capture import LayerGroup
from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import DataError
from bivlm_edge.quant import methods
from bivlm_edge.quant.linalg import IndefiniteError, concerning, output_energy
from bivlm_edge.quant.propagation import second_moment, target_weight, varies
from bivlm_edge.quant.transform import CalibratedLayer


def calibrated_layer(name: str, group: LayerGroup, config: QuantConfig) -> CalibratedLayer:
    """A layer with Hessians in the scale in which errors of all layers of a model compare."""
    layer = group.layers[name]
    weight = layer.weight.detach().float().clone()
    statistics = group.statistics(name)
    fit = statistics.fit
    if name in group.weighted:
        scale = fit.weight
    else:  # no gradient: the relative error is what layers have in common
        scale = 1 / max(output_energy(weight, fit.hessian), 1e-30)
    held_out = statistics.held_out
    is_centred = corrects_bias(layer, config) and varies(fit)
    with naming([name]):
        target = target_weight(weight, statistics, is_centred)
    return CalibratedLayer(
        name=name,
        weight=target,
        hessian=second_moment(fit, fit, is_centred) * scale,
        held_out=None if held_out is None else second_moment(held_out, fit, is_centred) * scale,
    )


def corrects_bias(layer: nn.Linear, config: QuantConfig) -> bool:
    is_wanted = "bias" in methods.declaration(config.method).needs
    return is_wanted and "bias-correction" not in config.without and has_bias(layer)


def has_bias(layer: nn.Linear) -> bool:
    return any(name == "bias" for name, _ in layer.named_parameters(recurse=False))


def group_seed(config: QuantConfig, group: LayerGroup) -> int:
    """One seed for all layers of a group, so that they share the signs of the transform."""
    return zlib.crc32(f"{config.seed}:{next(iter(group.layers))}".encode())


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Say of which layers with the same input the Hessian needs more damping, or has no factor."""
    subject = "the inputs of " + ", ".join(f"'{name}'" for name in names)
    try:
        with concerning(subject):
            yield
    except IndefiniteError as error:
        raise DataError(
            f"{subject}: {error} Check the calibration data, or choose --method rtn, "
            "which needs none."
        ) from error
