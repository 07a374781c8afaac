"""Walk through a model block by block and hand out the inputs that its linear layers see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.moments import InputStatistics, StatisticsCollector
from bivlm_edge.errors import DataError, UnsupportedModelError

Batch = Mapping[str, Tensor]
TokenWeights = Mapping[str, Sequence[Tensor]]
LABELS = "labels"


class Blocks(Protocol):
    """What the walk needs of `models.BlockSequence`."""

    @property
    def name(self) -> str:
        """Name of the part: vision, projector or decoder."""

    @property
    def blocks(self) -> Sequence[tuple[str, nn.Module]]:
        """Dotted names and modules, each run on the output of the one before."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Linear layers that see the same tensor, with the statistics of that tensor.

    Attributes:
        part: Name of the block sequence.
        layers: Dotted name -> layer, in order of execution.
        inputs: Statistics with all rows weighing alike.
        weighted: Dotted name -> statistics with the layer's token weights, for layers that have
            such weights.
    """

    part: str
    layers: dict[str, nn.Linear]
    inputs: InputStatistics
    weighted: dict[str, InputStatistics]


@dataclass(slots=True)
class Call:
    """One block's arguments for one batch; the hidden states are exchanged from block to block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the block takes."""
        value = self.args[0] if self.args else self.kwargs.get("hidden_states")
        if not isinstance(value, Tensor):
            raise UnsupportedModelError(
                "a block of this model does not take its hidden states as first argument or as "
                "'hidden_states', so it cannot be calibrated block by block."
            )
        return value

    def run(self, block: nn.Module) -> Tensor:
        """Return the hidden states that the block makes of them."""
        output = block(*self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def replace_hidden(self, hidden: Tensor) -> None:
        """Exchange the hidden states, all other arguments stay."""
        if self.args:
            self.args = (hidden, *self.args[1:])
        else:
            self.kwargs["hidden_states"] = hidden


class Weighting(Protocol):
    """Tells how much each token counts in the statistics of each layer, block by block."""

    def weigh(
        self, part: str, name: str, block: nn.Module, calls: Sequence[Call]
    ) -> Mapping[str, Sequence[Tensor]]:
        """Weigh the input rows of a block's layers before any layer in it is changed.

        Called once per block, in order of execution; the blocks before it compute what their
        quantized layers do, and so the hidden states of `calls` are those of the quantized model.

        Args:
            part: Name of the block sequence.
            name: Dotted name of the block in the whole model.
            block: The block with float weights; to be left as it is.
            calls: Its arguments, one per batch; to be left as they are.

        Returns:
            Dotted layer name in the whole model -> per batch float (rows,), the weight of each
            input row. Rows of a layer that is missing weigh alike.
        """


@dataclass(frozen=True, slots=True)
class FixedWeights:
    """Token weights that were found beforehand, for the whole model.

    Attributes:
        weights: Dotted layer name -> per batch float (rows,).
    """

    weights: TokenWeights

    def weigh(
        self,
        part: str,  # noqa: ARG002 - see Weighting
        name: str,  # noqa: ARG002
        block: nn.Module,  # noqa: ARG002
        calls: Sequence[Call],  # noqa: ARG002
    ) -> TokenWeights:
        """Return all weights, whichever block it is."""
        return self.weights


class Reference(Protocol):
    """The float model beside the one that is walked through: `float_stream.FloatStream`."""

    def enter(self, part: str, block: nn.Module) -> None:
        """Begin with a block of `part`, before any layer in it is changed."""

    def run(self, block: nn.Module, batch: int) -> Tensor:
        """Run the block as in the float model."""

    def advance(self, block: nn.Module) -> None:
        """Go on behind the block."""


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """Everything wanted of this forward pass has been seen."""


def walk(
    module: nn.Module,
    sequences: Sequence[Blocks],
    batches: Sequence[Batch],
    weighting: Weighting | None = None,
    restore: Callable[[Mapping[str, nn.Linear]], bool] | None = None,
    held: Callable[[str], AbstractContextManager[None]] | None = None,
    reference: Reference | None = None,
) -> Iterator[LayerGroup]:
    """Yield the groups of linear layers in order of execution, each with fresh statistics.

    Whoever consumes the iterator may change a group's weights before asking for the next one: the
    statistics of every later group are collected on what the changed layers produce. Holds the
    hidden states of one block for all batches, and the statistics of one group. Layers that the
    batches do not reach are not yielded.

    Args:
        module: The whole model; called as `module(**batch)`.
        sequences: Block sequences in order of execution.
        batches: Arguments of the model; "labels" is left out.
        weighting: Gives the weight of every input row of a layer in its statistics; None weighs
            all rows alike.
        restore: Called with the layers of every group before anything is measured; true if their
            final weights were known and are in place now, so that the group is not yielded.
        held: Called with a block's name; the block's weights are in memory inside what it returns
            (`models.streaming`). None: they always are.
        reference: Gives what the layers see in the float model; with it the statistics hold
            `Moments.cross`.

    Raises:
        DataError: The input of a layer is not finite; the message names layer and batch.
    """
    for sequence in sequences:
        if not sequence.blocks:
            continue
        calls = [capture(module, sequence.blocks[0][1], batch) for batch in batches]
        last = sequence.blocks[-1][0]
        for name, block in sequence.blocks:
            with held(name) if held else nullcontext():
                yield from _walk_block(
                    sequence.name, name, block, calls, weighting, restore, reference
                )
                if name != last:
                    advance(block, calls)
                    if reference is not None:
                        reference.advance(block)


def _walk_block(
    part: str,
    name: str,
    block: nn.Module,
    calls: Sequence[Call],
    weighting: Weighting | None,
    restore: Callable[[Mapping[str, nn.Linear]], bool] | None,
    reference: Reference | None,
) -> Iterator[LayerGroup]:
    """Yield the groups of one block; see `walk`."""
    prefix = f"{name}." if name else ""
    weights = weighting.weigh(part, name, block, calls) if weighting else {}
    if reference is not None:
        reference.enter(part, block)
    for layers in _shared_inputs(block, calls[0]):
        named = {prefix + local: layer for local, layer in layers.items()}
        if restore is not None and restore(named):
            continue
        inputs, weighted = _collect(block, calls, named, weights, reference)
        yield LayerGroup(part, named, inputs, weighted)


@torch.no_grad()
def capture(module: nn.Module, block: nn.Module, batch: Batch) -> Call:
    """The arguments with which the model calls `block`; nothing behind it runs."""
    captured: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(Call(args, dict(kwargs)))
        raise Stopped

    handle = block.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with suppress(Stopped):
            module(**{key: value for key, value in batch.items() if key != LABELS})
    finally:
        handle.remove()
    if not captured:
        raise UnsupportedModelError(
            f"the calibration inputs never reach a {type(block).__name__} block. Each sample needs "
            "an image and a text."
        )
    call = captured[0]
    for cache in ("past_key_values", "past_key_value"):  # a cache would grow with every rerun
        if cache in call.kwargs:
            call.kwargs[cache] = None
    if "use_cache" in call.kwargs:
        call.kwargs["use_cache"] = False
    return call


@torch.no_grad()
def _shared_inputs(block: nn.Module, call: Call) -> list[dict[str, nn.Linear]]:
    """The block's linear layers in order of execution, those with the same input together."""
    groups: dict[int, dict[str, nn.Linear]] = {}
    seen: set[str] = set()
    alive: list[Tensor] = []  # keeps the ids of the inputs apart

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in seen and isinstance(layer, nn.Linear):
                seen.add(name)
                alive.append(args[0])
                groups.setdefault(id(args[0]), {})[name] = layer

        return hook

    handles = [
        layer.register_forward_pre_hook(remember(name))
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        call.run(block)
    finally:
        for handle in handles:
            handle.remove()
    return list(groups.values())


@torch.no_grad()
def _collect(
    block: nn.Module,
    calls: Sequence[Call],
    layers: Mapping[str, nn.Linear],
    token_weights: TokenWeights,
    reference: Reference | None,
) -> tuple[InputStatistics, dict[str, InputStatistics]]:
    """Statistics of the input that `layers` share: plain, and by name with token weights.

    A layer that runs several times in its block is measured at its first run.
    """
    first = next(iter(layers.values()))
    plain = StatisticsCollector(first.in_features, len(calls))
    weighted = {
        name: StatisticsCollector(first.in_features, len(calls))
        for name in layers
        if name in token_weights
    }
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(-1, first.in_features))
        raise Stopped

    def input_during(run: Callable[[], Tensor]) -> Tensor | None:
        seen.clear()
        with suppress(Stopped):
            run()
        return seen[0] if seen else None

    handle = first.register_forward_pre_hook(hook)
    try:
        for number, call in enumerate(calls):
            rows = input_during(partial(call.run, block))
            if rows is None:
                continue
            _check_finite(rows, next(iter(layers)), number)
            original = input_during(partial(reference.run, block, number)) if reference else None
            plain.add(rows, number, reference=original)
            for name, collector in weighted.items():
                collector.add(rows, number, token_weights[name][number], original)
    finally:
        handle.remove()
    statistics = plain.finish()
    if not bool(torch.isfinite(statistics.fit.hessian).all()):
        raise DataError(
            f"the squares of the inputs of '{next(iter(layers))}' exceed what float32 holds. "
            "Check the checkpoint: activations above 1e19 come from broken weights."
        )
    return statistics, {name: collector.finish() for name, collector in weighted.items()}


def _check_finite(rows: Tensor, name: str, batch: int) -> None:
    bad = int((~torch.isfinite(rows)).any(dim=1).sum())
    if bad:
        raise DataError(
            f"calibration batch {batch} makes NaN or infinity in the input of '{name}' "
            f"({bad} of {len(rows)} tokens). Check the samples of this batch, and that the "
            "checkpoint's layers before this one are sound."
        )


@torch.no_grad()
def advance(block: nn.Module, calls: Sequence[Call]) -> None:
    """Replace each call's hidden states by the block's output."""
    for call in calls:
        call.replace_hidden(call.run(block))
