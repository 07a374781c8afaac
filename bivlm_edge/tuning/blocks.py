"""Bring the outputs of each quantized block nearer to those of the float block, block by block."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.calls import Batch, Blocks, Call, advance, capture_all
from bivlm_edge.calibration.precision import fast_products
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.quantizer import linear_layers
from bivlm_edge.tuning.planes import PlaneWeight
from bivlm_edge.tuning.trainer import (
    Rates,
    State,
    Trainer,
    norms_and_biases,
    optimise,
    restore,
)

_JUDGEMENTS = 2


def tune_blocks(
    module: nn.Module,
    sequences: Sequence[Blocks],
    packed: Mapping[str, BinaryWeight],
    float_module: nn.Module,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    rates: Rates,
    epochs: int,
    seed: int,
    signs: bool,
    tell: Callable[[str, int, int], None],
) -> tuple[State, list[dict[str, float]]]:
    """Train coefficients, norms and biases of one block after the other, or signs as well.

    A block sees what the tuned blocks before it make of the inputs; it is to put out what the
    float block puts out on the float model's inputs. Its tuning is kept if that is nearer on the
    held-out batches. Nagel et al., "Up or Down?", 2020, reconstruct layers in this way, Li et
    al., "BRECQ", 2021, blocks.

    Args:
        module: The quantized model; modified.
        sequences: Its blocks.
        packed: Dotted layer name -> weight as stored.
        float_module: The model before it was quantized.
        batches: To train on.
        held_out: To judge by.
        rates: Learning rates.
        epochs: Passes over `batches` per block.
        seed: Seed of the order of the batches.
        signs: Whether to train the signs.
        tell: Called with (what runs, steps done, steps in all).

    Returns:
        All weights, norms and biases afterwards, and per block its mean squared error relative to
        the float block's outputs, held out, before and after.
    """
    floats = linear_layers(float_module)
    blocks = sum(len(sequence.blocks) for sequence in sequences)
    state = State(dict(packed), {})
    log: list[dict[str, float]] = []
    for sequence in sequences:
        if not sequence.blocks:
            continue
        with fast_products():
            calls, float_calls = (
                capture_all(
                    model,
                    [(name, model.get_submodule(name)) for name, _ in sequence.blocks],
                    (*batches, *held_out),
                )
                for model in (module, float_module)
            )
        for name, block in sequence.blocks:
            tell(f"tuning {name}", len(log), blocks)
            with fast_products():
                advance(float_module.get_submodule(name), float_calls)
            targets = [call.hidden for call in float_calls]
            own = {
                key: PlaneWeight(weight, floats[key].weight if signs else None)
                for key, weight in packed.items()
                if key.startswith(f"{name}.")
            }
            tuned, before, after = _tune_block(
                module, name, own, calls, targets, len(batches), rates, epochs, seed
            )
            if tuned is not None:
                state.packed.update(tuned.packed)
                state.vectors.update(tuned.vectors)
            log.append({"block": len(log), "before": before, "after": after})
            with fast_products():
                advance(block, calls)
    return state, log


def _tune_block(
    module: nn.Module,
    name: str,
    weights: Mapping[str, PlaneWeight],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    training: int,
    rates: Rates,
    epochs: int,
    seed: int,
) -> tuple[State | None, float, float]:
    """Tune one block on the first `training` calls; the rest judge. None: nothing was gained."""
    block = module.get_submodule(name)
    vectors = {f"{name}.{key}": value for key, value in norms_and_biases(block).items()}
    start = State(
        {key: weight.packed for key, weight in weights.items()},
        {key: value.detach().clone() for key, value in vectors.items()},
    )
    energy = sum(float(target.float().square().sum()) for target in targets[training:])
    feed = _feed(training, seed)

    def error(number: int) -> Tensor:
        with fast_products():
            output = calls[number].run(block)
        return (output.float() - targets[number].float()).square().sum()

    def backward() -> tuple[float, int]:
        number = next(feed)
        loss = error(number) / targets[number].float().square().sum().clamp_min(1e-30)
        torch.autograd.backward(loss)
        return float(loss.detach()), 1

    @torch.no_grad()
    def judge() -> float:
        total = sum(float(error(number)) for number in range(training, len(calls)))
        return total / max(energy, 1e-30)

    before = judge()
    if not weights and not vectors:
        return None, before, before
    steps = epochs * training
    trainer = Trainer(module, weights, vectors, rates, steps)
    try:
        state, _ = optimise(trainer, steps, _JUDGEMENTS, backward, judge, lambda _: None)
    except BaseException:
        restore(module, start)
        raise
    after = before
    if state is not None:
        restore(module, state)
        after = judge()
    if state is None or not after < before:
        restore(module, start)
        return None, before, before
    return state, before, after


def _feed(batches: int, seed: int) -> Iterator[int]:
    generator = random.Random(seed)
    while True:
        yield from generator.sample(range(batches), batches)
