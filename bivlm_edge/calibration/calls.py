"""The arguments with which a model calls its blocks, found without running them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.precision import fast_products
from bivlm_edge.errors import DataError, UnsupportedModelError
from bivlm_edge.models.decoder_blocks import without_cache

Batch = Mapping[str, Tensor]
LABELS = "labels"
IGNORED = -100  # the label of positions that predict no answer


class Blocks(Protocol):
    """What calibration needs of `models.BlockSequence`."""

    @property
    def name(self) -> str:
        """Name of the part: vision, projector or decoder."""

    @property
    def blocks(self) -> Sequence[tuple[str, nn.Module]]:
        """Dotted names and modules, each run on the output of the one before."""


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """Everything wanted of this forward pass has been seen."""


@dataclass(slots=True)
class Call:
    """The arguments of one block for one batch, and those of the blocks behind it.

    The hidden states go from block to block; masks, positions and the like are each block's own.

    Attributes:
        args: Positional arguments.
        kwargs: Named arguments.
        later: The following blocks' calls in order, without hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    later: deque[Call] = field(default_factory=deque)

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

    def run(self, block: nn.Module, *, exact: bool = False) -> Tensor:
        """Return the hidden states that the block makes of them, in their type.

        Unless `exact`, matrix products are `fast_products`: averages over thousands of tokens do
        not feel the rounding of each.
        """
        with nullcontext() if exact else fast_products():
            return output_hidden(block(*self.args, **self.kwargs), self.hidden.dtype)

    def replace_hidden(self, hidden: Tensor | None) -> None:
        """Exchange the hidden states, all other arguments stay."""
        if self.args:
            self.args = (hidden, *self.args[1:])
        else:
            self.kwargs["hidden_states"] = hidden

    def go_on(self, hidden: Tensor) -> None:
        """Become the next block's call, if there is one, with the hidden states it gets."""
        if self.later:
            following = self.later.popleft()
            self.args, self.kwargs = following.args, following.kwargs
        self.replace_hidden(hidden)


def output_hidden(output: Any, dtype: torch.dtype) -> Tensor:
    """The hidden states among what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden.to(dtype)


@torch.no_grad()
def advance(block: nn.Module, calls: Sequence[Call]) -> None:
    """Run a block on its calls and make them those of the next one."""
    for call in calls:
        call.go_on(call.run(block))


@torch.no_grad()
def capture(module: nn.Module, block: nn.Module, batch: Batch) -> Call:
    """The arguments with which the model calls `block`; neither it nor what is behind it runs."""
    captured: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(Call(*without_cache(args, kwargs)))
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
    return captured[0]


@torch.no_grad()
def capture_all(
    module: nn.Module, blocks: Sequence[tuple[str, nn.Module]], batches: Sequence[Batch]
) -> list[Call]:
    """The arguments with which the model calls each block of a sequence.

    All blocks but the last are put out of the model for that time, so that none runs, or needs
    its weights; the first alone runs once, to see in which form it returns hidden states.

    Args:
        module: The whole model.
        blocks: Dotted names and blocks, each run on the output of the one before; at least one.
        batches: Arguments of the model.

    Returns:
        Per batch the call of the first block, those of the others in `later`. Tensors that the
        model passes to several blocks are the same objects.

    Raises:
        UnsupportedModelError: Blocks pass on more than hidden states, or the model changes these
            between blocks.
    """
    *earlier, (_, last) = blocks
    if not earlier or not batches:
        return [capture(module, last, batch) for batch in batches]
    first = capture(module, earlier[0][1], batches[0])
    output = earlier[0][1](*first.args, **first.kwargs)
    rest = tuple(output[1:]) if isinstance(output, tuple | list) else None
    calls = []
    with _stand_ins(module, earlier, rest) as stand_ins:
        for batch in batches:
            final = capture(module, last, batch)
            calls.append(_chained(blocks, [*(one.taken() for one in stand_ins), final], rest or ()))
    return calls


class _StandIn(nn.Module):
    """Takes the place of a block: keeps its arguments and gives the hidden states back unchanged.

    Args:
        block: The block; what a model asks its blocks about themselves is answered by it.
        rest: What the block returns behind the hidden states; None: it returns a tensor.
    """

    def __init__(self, block: nn.Module, rest: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.block = block
        self._rest = rest
        self._call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._call = Call(*without_cache(args, kwargs))
        hidden = self._call.hidden
        return hidden if self._rest is None else (hidden, *self._rest)

    def taken(self) -> Call | None:
        """The arguments of the last call, None without one."""
        call, self._call = self._call, None
        return call


@contextmanager
def _stand_ins(
    module: nn.Module, blocks: Sequence[tuple[str, nn.Module]], rest: tuple[Any, ...] | None
) -> Iterator[list[_StandIn]]:
    """Inside, every block is replaced by a stand-in."""
    found = [_StandIn(block, rest) for _, block in blocks]
    try:
        for (name, _), stand_in in zip(blocks, found, strict=True):
            module.set_submodule(name, stand_in)
        yield found
    finally:
        for name, block in blocks:
            module.set_submodule(name, block)


def _chained(
    blocks: Sequence[tuple[str, nn.Module]], calls: Sequence[Call | None], rest: Sequence[Any]
) -> Call:
    """One batch's calls as one; all of them got the hidden states of the first."""
    hidden: Tensor | None = None
    passed_on = {id(value) for value in rest if isinstance(value, Tensor)}
    chain: deque[Call] = deque()
    for (name, block), call in zip(blocks, calls, strict=True):
        kind = f"'{name}' ({type(block).__name__})"
        if call is None:
            raise UnsupportedModelError(
                f"the model does not run {kind} before the blocks behind it, so it cannot be "
                "calibrated block by block."
            )
        if hidden is not None and call.hidden is not hidden:
            raise UnsupportedModelError(
                f"the model changes the hidden states between the block before and {kind}, so it "
                "cannot be calibrated block by block."
            )
        if chain and any(id(value) in passed_on for value in (*call.args, *call.kwargs.values())):
            raise UnsupportedModelError(
                f"{kind} takes more than hidden states from the block before it, so it cannot be "
                "calibrated block by block."
            )
        hidden = call.hidden
        call.replace_hidden(None)
        chain.append(call)
    first = chain.popleft()
    first.later = chain
    first.replace_hidden(hidden)
    return first


def require_finite(rows: Tensor, what: str, name: str, batch: int) -> None:
    """Refuse what a layer has per token where it is not finite.

    Args:
        rows: float (tokens, values).
        what: Of the layer: "input", ...
        name: The layer's.
        batch: Number of the calibration batch.

    Raises:
        DataError: Some of it is NaN or infinity.
    """
    bad = int((~torch.isfinite(rows)).any(dim=1).sum())
    if bad:
        raise DataError(
            f"calibration batch {batch} makes NaN or infinity in the {what} of '{name}' "
            f"({bad} of {len(rows)} tokens). Check the samples of this batch, and that the "
            "checkpoint's layers before this one are sound."
        )
