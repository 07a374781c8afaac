"""Planes of all layers of a model under one budget, from one walk through the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from bivlm_edge.calibration.capture import LayerGroup
from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import RequestError
from bivlm_edge.memory import release_freed
from bivlm_edge.quant.allocation import Plan, allocate, group_plans
from bivlm_edge.quant.calibrated import calibrated_layer, group_seed, naming
from bivlm_edge.quant.work_folder import WorkFolder


@torch.no_grad()
def plan_planes(
    walk_once: Callable[..., Iterator[LayerGroup]],
    skipped: Mapping[str, str],
    config: QuantConfig,
    work: WorkFolder,
) -> dict[str, Plan]:
    """Planes of every group of layers, from the float model: one budget for all of them together.

    Without the weights of `loss` the errors of layers are taken relative to their outputs.

    Args:
        walk_once: `walk`, all arguments but `restore` given.
        skipped: Names of layers that are not quantized.
        config: Bits and seed.
        work: Keeps what is planned.

    Returns:
        Name of the group's first layer that is quantized -> plan.

    Raises:
        RequestError: even one plane per layer exceeds the budget.
    """
    chosen = work.load("plans")
    if chosen is not None:
        return {name: _read_plan(values) for name, values in chosen.values.items()}
    candidates: dict[str, list[Plan]] = {}
    weights = 0

    def restore(layers: Mapping[str, nn.Linear]) -> bool:
        nonlocal weights
        names = [name for name in layers if name not in skipped]
        if names:
            step = work.load(f"plans.{names[0]}")
            if step is None:
                return False
            candidates[names[0]] = [_read_plan(values) for values in step.values]
            weights += sum(layers[name].weight.numel() for name in names)
        return True

    for group in walk_once(restore=restore):
        names = [name for name in group.layers if name not in skipped]
        layers = [calibrated_layer(name, group, config) for name in names]
        weights += sum(layer.weight.numel() for layer in layers)
        with naming(names):
            found = group_plans(layers, group_seed(config, group), config.without)
        candidates[names[0]] = found
        work.save(f"plans.{names[0]}", [astuple(plan) for plan in found], {})
        release_freed()
    budget = int(config.bits * weights / 8)
    plans = allocate(candidates, budget)
    if plans is None:
        least = 8 * sum(min(plan.nbytes for plan in found) for found in candidates.values())
        raise RequestError(
            f"--bits {config.bits:g} is below what one plane per layer takes in this model. "
            f"Choose at least {math.ceil(100 * least / weights) / 100:g}."
        )
    work.save("plans", {name: astuple(plan) for name, plan in plans.items()}, {})
    return plans


def _read_plan(values: Sequence[Any]) -> Plan:
    planes, nbytes, error = values
    return Plan(tuple(planes), nbytes, error)
