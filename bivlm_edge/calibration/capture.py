"""Walk through a model block by block and hand out the inputs that its linear layers see."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.calls import (
    Batch,
    Blocks,
    Call,
    Stopped,
    advance,
    capture_all,
    require_finite,
)
from bivlm_edge.calibration.moments import ALONE, InputStatistics, StatisticsCollector
from bivlm_edge.calibration.place import HOME, Place
from bivlm_edge.calibration.precision import exact_products
from bivlm_edge.distributed import Team
from bivlm_edge.errors import DataError

TokenWeights = Mapping[str, Sequence[Tensor]]
_PLAIN = ""  # no layer has this name


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Linear layers that see the same tensor, with the statistics of that tensor.

    Attributes:
        part: Name of the block sequence.
        layers: Dotted name -> layer, in order of execution.
        plain: Statistics with all rows weighing alike; None where nobody asked for them.
        weighted: Dotted name -> statistics with the layer's token weights, for layers that have
            such weights.
    """

    part: str
    layers: dict[str, nn.Linear]
    plain: InputStatistics | None
    weighted: dict[str, InputStatistics]

    @property
    def inputs(self) -> InputStatistics:
        """Statistics with all rows weighing alike."""
        if self.plain is None:
            raise ValueError("a frozen walk measures no rows alike where all layers have weights.")
        return self.plain

    def statistics(self, name: str) -> InputStatistics:
        """Statistics of a layer with its token weights, or with all rows alike without any."""
        weighted = self.weighted.get(name)
        return self.inputs if weighted is None else weighted


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


def walk(
    module: nn.Module,
    sequences: Sequence[Blocks],
    batches: Sequence[Batch],
    weighting: Weighting | None = None,
    restore: Callable[[Mapping[str, nn.Linear]], bool] | None = None,
    held: Callable[[str], AbstractContextManager[None]] | None = None,
    reference: Reference | None = None,
    team: Team = ALONE,
    place: Place = HOME,
    *,
    frozen: bool = False,
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
        team: The processes that walk together, `batches` being this one's share; statistics are
            those of all batches.
        place: Where blocks run and statistics are added up. Hidden states and arguments of all
            batches are there, and a block's weights while it runs; what is yielded is not.
        frozen: Whoever consumes the iterator changes nothing, so that one run of a block measures
            all its groups; statistics with all rows alike are left out where all layers of a group
            have token weights.

    Raises:
        DataError: The input of a layer is not finite; the message names layer and batch.
    """
    count = team.total(len(batches))
    for sequence in sequences:
        if not sequence.blocks:
            continue
        calls = capture_all(module, sequence.blocks, batches)
        place.bring(calls)
        last = sequence.blocks[-1][0]
        for name, block in sequence.blocks:
            with held(name) if held else nullcontext():
                prefix = f"{name}." if name else ""
                weights: TokenWeights = {}
                with place.holding(block):
                    if weighting is not None:
                        weights = weighting.weigh(sequence.name, name, block, calls)
                    if reference is not None:
                        reference.enter(sequence.name, block)
                    shared = _shared_inputs(block, calls, team)
                measure = _Measurement(
                    block, calls, weights, reference, team, place, count, frozen=frozen
                )
                named = [
                    {prefix + local: layer for local, layer in layers.items()} for layers in shared
                ]
                if frozen:
                    wanted = [layers for layers in named if not (restore and restore(layers))]
                    for layers, found in zip(wanted, measure.run(wanted), strict=True):
                        yield LayerGroup(sequence.name, layers, *found)
                    continue
                for layers in named:
                    if restore is None or not restore(layers):
                        yield LayerGroup(sequence.name, layers, *measure.run([layers])[0])
                if name != last:
                    with place.holding(block):
                        advance(block, calls)
                        if reference is not None:
                            reference.advance(block)


def _shared_inputs(
    block: nn.Module, calls: Sequence[Call], team: Team
) -> list[dict[str, nn.Linear]]:
    """The block's linear layers in order of execution, those with the same input together.

    The same in all processes. Goes on to further calls as long as there are layers that none has
    reached.
    """
    layers = {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    groups: list[list[str]] = []
    for call in calls:
        _merge(groups, _reached(block, layers, call))
        if sum(map(len, groups)) == len(layers):
            break
    if team.size > 1:
        lines = "\n".join(json.dumps(names) for names in groups) + "\n"
        characters = torch.tensor(list(lines.encode()), dtype=torch.uint8)
        everyones = bytes(team.concatenate(characters).numpy()).decode()
        groups = []
        _merge(groups, [json.loads(line) for line in everyones.splitlines() if line])
    return [{name: layers[name] for name in names} for names in groups]


def _merge(groups: list[list[str]], found: Sequence[Sequence[str]]) -> None:
    """Add layers that no group has, behind the group that ran before them.

    They are a group of their own even if they share an input with known ones: those ran without
    them.
    """
    known = {name: names for names in groups for name in names}
    place = 0
    for names in found:
        for name in names:
            if name in known:
                place = groups.index(known[name]) + 1
        added = [name for name in names if name not in known]
        if added:
            groups.insert(place, added)
            known.update(dict.fromkeys(added, added))
            place += 1


@torch.no_grad()
def _reached(block: nn.Module, layers: Mapping[str, nn.Linear], call: Call) -> list[list[str]]:
    """Names of the layers that run in one call, in order, those with the same input together."""
    groups: dict[int, list[str]] = {}
    seen: set[str] = set()
    alive: list[Tensor] = []  # keeps the ids of the inputs apart

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in seen:
                seen.add(name)
                alive.append(args[0])
                groups.setdefault(id(args[0]), []).append(name)

        return hook

    handles = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
    try:
        call.run(block)
    finally:
        for handle in handles:
            handle.remove()
    return list(groups.values())


class _Collected(NamedTuple):
    """Statistics of one group of layers, see `LayerGroup`."""

    plain: InputStatistics | None
    weighted: dict[str, InputStatistics]


class _Measurement:
    """Runs a block on its calls and collects what groups of its layers see."""

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        weights: TokenWeights,
        reference: Reference | None,
        team: Team,
        place: Place,
        count: int,
        *,
        frozen: bool,
    ) -> None:
        self._block, self._calls, self._weights, self._place = block, calls, weights, place
        self._reference, self._team, self._count, self._frozen = reference, team, count, frozen
        self._numbers = team.numbers(len(calls))  # of this process's batches among all
        self._current = 0
        self._original: Tensor | None = None

    @torch.no_grad()
    def run(self, groups: Sequence[Mapping[str, nn.Linear]]) -> list[_Collected]:
        """Statistics of each group; a frozen block's output replaces the hidden states as well.

        With a reference there is one group, as its layers change before the next is measured.
        A layer that runs several times in its block is measured at its first run.
        """
        collectors = [self._collectors(layers) for layers in groups]
        handles = [
            next(iter(layers.values())).register_forward_pre_hook(self._watch(layers, found))
            for layers, found in zip(groups, collectors, strict=True)
        ]
        try:
            with self._place.holding(self._block):
                for number, call in enumerate(self._calls):
                    self._current = number
                    if self._reference is not None:
                        self._original = self._input_in(self._reference, groups[0])
                    with suppress(Stopped):
                        hidden = call.run(self._block)
                        if self._frozen:
                            call.go_on(hidden)
        finally:
            for handle in handles:
                handle.remove()
        return [
            self._finish(next(iter(layers)), found)
            for layers, found in zip(groups, collectors, strict=True)
        ]

    def _collectors(self, layers: Mapping[str, nn.Linear]) -> dict[str, StatisticsCollector]:
        """By layer name, and the one with all rows alike under the empty name.

        Where all layers have weights the latter only judges what came out, and needs no reference.
        """
        names = [name for name in layers if name in self._weights]
        only_judges = len(names) == len(layers)
        if not (self._frozen and only_judges):
            names.append(_PLAIN)
        k = next(iter(layers.values())).in_features
        return {
            name: StatisticsCollector(
                k,
                self._count,
                self._team,
                self._place.device,
                crossed=self._reference is not None and not (name == _PLAIN and only_judges),
            )
            for name in names
        }

    def _input_in(self, reference: Reference, layers: Mapping[str, nn.Linear]) -> Tensor | None:
        """What the layers see in the float model for the current batch; None: not reached."""
        found: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].reshape(-1, args[0].shape[-1]))
            raise Stopped

        handle = next(iter(layers.values())).register_forward_pre_hook(hook, prepend=True)
        try:
            with suppress(Stopped):
                reference.run(self._block, self._current)
        finally:
            handle.remove()
        return found[0] if found else None

    def _watch(
        self, layers: Mapping[str, nn.Linear], collectors: Mapping[str, StatisticsCollector]
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        seen: set[int] = set()

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self._current in seen:
                return
            seen.add(self._current)
            number = self._numbers[self._current]
            rows = args[0].reshape(-1, args[0].shape[-1])
            require_finite(rows, "input", next(iter(layers)), number)
            with exact_products():
                for name, collector in collectors.items():
                    weights = None
                    if name != _PLAIN:
                        weights = self._place.moved(self._weights[name][self._current])
                    original = self._original if collector.crossed else None
                    collector.add(rows, number, weights, original)
            if not self._frozen:
                raise Stopped

        return hook

    def _finish(self, first: str, collectors: Mapping[str, StatisticsCollector]) -> _Collected:
        found = {name: collector.finish() for name, collector in collectors.items()}
        if not all(bool(torch.isfinite(one.fit.hessian).all()) for one in found.values()):
            raise DataError(
                f"the squares of the inputs of '{first}' exceed what float32 holds. "
                "Check the checkpoint: activations above 1e19 come from broken weights."
            )
        return _Collected(found.pop(_PLAIN, None), found)
