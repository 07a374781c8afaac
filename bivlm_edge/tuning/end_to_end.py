"""Train coefficients, norms and biases, and optionally signs, towards the float model's answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.capture import Batch
from bivlm_edge.errors import TuningError
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.tuning.objective import (
    Teacher,
    divergence,
    fast_products,
    mean_divergence,
    pieces,
)
from bivlm_edge.tuning.planes import PlaneWeight

Progress = Callable[[str, int, int], None]

_TOKENS_AT_ONCE = 1024
_WARM_UP = 0.05
_JUDGEMENTS = 6


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates, relative to the root mean square of the tensor that is trained.

    Attributes:
        coefficients: Of row coefficients.
        latent: Of latent weights, relative to the rms of the layer's weight.
        vectors: Of norms and biases.
    """

    coefficients: float = 2e-3
    latent: float = 2e-3
    vectors: float = 2e-3


@dataclass(frozen=True, slots=True)
class State:
    """Everything that tuning changes, at one moment."""

    packed: dict[str, BinaryWeight]
    vectors: dict[str, Tensor]


class Trainer:
    """Adam over the parts of a quantized model that the format leaves open.

    Args:
        module: The quantized model.
        weights: Dotted layer name -> its planes.
        vectors: Name -> norm weight or bias in `module`.
        rates: Learning rates.
        steps: Steps in all, for the schedule.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, PlaneWeight],
        vectors: Mapping[str, nn.Parameter],
        rates: Rates,
        steps: int,
    ) -> None:
        self._layers = {name: module.get_submodule(name) for name in weights}
        self.weights = weights
        self.vectors = vectors
        groups = []
        for weight in weights.values():
            rms = float(weight.coefficients.square().mean().sqrt())
            groups.append(_group(weight.coefficients, rates.coefficients * rms))
            if weight.latent is not None:
                rms = float(weight.latent.square().mean().sqrt())
                groups.append(_group(weight.latent, rates.latent * rms))
        for vector in vectors.values():
            rms = float(vector.detach().square().mean().sqrt())
            groups.append(_group(vector, rates.vectors * rms))
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, steps)
        )

    def enable_gradients(self, enabled: bool) -> None:
        """Let gradients flow to layers, norms and biases, or stop them."""
        for layer in self._layers.values():
            layer.weight.requires_grad_(enabled)
        for vector in self.vectors.values():
            vector.requires_grad_(enabled)

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients in the module, which are used up."""
        for name, layer in self._layers.items():
            if layer.weight.grad is None:
                continue
            weight = self.weights[name]
            weight.coefficients.grad, latent = weight.project(layer.weight.grad)
            if weight.latent is not None:
                weight.latent.grad = latent
            layer.weight.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self.install()

    @torch.no_grad()
    def install(self) -> None:
        """Leave the present weights in the layers."""
        for name, layer in self._layers.items():
            layer.weight.copy_(self.weights[name].weight())

    @torch.no_grad()
    def state(self) -> State:
        """The present weights, rounded as they will be stored, and vectors."""
        return State(
            {name: weight.pack() for name, weight in self.weights.items()},
            {name: vector.detach().clone() for name, vector in self.vectors.items()},
        )


def _group(tensor: Tensor, rate: float) -> dict[str, object]:
    return {"params": [tensor], "lr": max(rate, 1e-12)}


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def restore(module: nn.Module, state: State) -> None:
    """Leave a state's dequantized weights, norms and biases in a module."""
    for name, packed in state.packed.items():
        module.get_submodule(name).weight.copy_(torch.from_numpy(packed.dequantize()))
    for name, vector in state.vectors.items():
        module.get_parameter(name).copy_(vector)


def train(
    module: nn.Module,
    trainer: Trainer,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    teacher: Teacher,
    steps: int,
    seed: int,
    tell: Progress,
) -> tuple[State | None, list[dict[str, float]]]:
    """Distil the float model into the quantized one; one step per batch.

    Returns:
        The state with the least divergence on `held_out`, None if none beats the start, and the
        log: steps done, divergence on the batches since the last entry, divergence held out.

    Raises:
        TuningError: the divergence is no longer finite.
    """
    best = mean_divergence(module, held_out, teacher)
    log = [{"steps": 0, "held_out": best}]
    state: State | None = None
    parts = [pieces(batch, _TOKENS_AT_ONCE) for batch in batches]
    order = _order(len(batches), steps, seed)
    every = max(1, steps // _JUDGEMENTS)
    total, positions = 0.0, 0
    trainer.enable_gradients(True)
    try:
        for step, number in enumerate(order, start=1):
            tell("tuning end to end", step - 1, steps)
            loss, count = _backward(module, parts[number], teacher)
            if not math.isfinite(loss):
                raise TuningError(
                    f"the divergence from the float model became {loss} at step {step} of {steps}. "
                    "Lower --tune-rate, or use --tune none."
                )
            total, positions = total + loss, positions + count
            trainer.step()
            if step % every == 0 or step == steps:
                judged = mean_divergence(module, held_out, teacher)
                log.append({"steps": step, "training": total / max(positions, 1), "held_out": judged})
                total, positions = 0.0, 0
                if judged < best:
                    best, state = judged, trainer.state()
    finally:
        trainer.enable_gradients(False)
    return state, log


def _backward(module: nn.Module, parts: Sequence[Batch], teacher: Teacher) -> tuple[float, int]:
    """Add the gradients of a batch's mean divergence; returns its sum and the positions."""
    positions = sum(len(teacher.hidden(part)) for part in parts)
    total = 0.0
    for part in parts:
        with fast_products():
            value, _ = divergence(module, part, teacher.hidden(part))
        (value / max(positions, 1)).backward()
        total += float(value)
    return total, positions


def _order(batches: int, steps: int, seed: int) -> list[int]:
    """Numbers of batches for all steps: every batch once, shuffled, before any comes again."""
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < steps:
        order += generator.sample(range(batches), batches)
    return order[:steps]
