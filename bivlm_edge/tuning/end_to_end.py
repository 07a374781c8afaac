"""Distil the float model's answers into the quantized model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bivlm_edge.calibration.calls import Batch
from bivlm_edge.calibration.precision import fast_products
from bivlm_edge.tuning.objective import Teacher, divergence, mean_divergence, pieces
from bivlm_edge.tuning.trainer import State, Trainer, optimise

_TOKENS_AT_ONCE = 1024
_TOKENS_PER_STEP = 2048
_BATCHES_PER_STEP = 4
_JUDGEMENTS = 6


def tune_end_to_end(
    module: nn.Module,
    trainer: Trainer,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    teacher: Teacher,
    steps: int,
    seed: int,
    tell: Callable[[int], None],
) -> tuple[State | None, list[dict[str, float]]]:
    """Lower the KL divergence from the float model over batches; see `optimise`.

    Args:
        module: The quantized model.
        trainer: What of it is trained.
        batches: To train on.
        held_out: To judge by.
        teacher: The float model.
        steps: Steps, each of the batches that reach 2,048 tokens but of four at most.
        seed: Seed of the order of the batches.
        tell: Called with the steps done.
    """
    feed = _feed(batches, seed)
    return optimise(
        trainer,
        steps,
        _JUDGEMENTS,
        lambda: _backward(module, next(feed), teacher),
        lambda: mean_divergence(module, held_out, teacher),
        tell,
    )


def _backward(module: nn.Module, parts: Sequence[Batch], teacher: Teacher) -> tuple[float, int]:
    """Add the gradients of a batch's mean divergence; returns its sum and the positions."""
    positions = sum(len(teacher.hidden(part)) for part in parts)
    total = 0.0
    for part in parts:
        with fast_products():
            value, _ = divergence(module, part, teacher.hidden(part))
        torch.autograd.backward(value / max(positions, 1))
        total += float(value.detach())
    return total, positions


def _feed(batches: Sequence[Batch], seed: int) -> Iterator[list[Batch]]:
    """The batches of each step: every batch once, shuffled, before any comes again."""
    parts = [pieces(batch, _TOKENS_AT_ONCE) for batch in batches]
    generator = random.Random(seed)
    step: list[Batch] = []
    tokens = taken = 0
    while True:
        for number in generator.sample(range(len(parts)), len(parts)):
            step += parts[number]
            tokens += batches[number]["input_ids"].numel()
            taken += 1
            if tokens >= _TOKENS_PER_STEP or taken == _BATCHES_PER_STEP:
                yield step
                step, tokens, taken = [], 0, 0
