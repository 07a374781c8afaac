"""The float model beside the one that is being quantized, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bivlm_edge.calibration.calls import Batch, Blocks, Call, capture_all, output_hidden
from bivlm_edge.calibration.place import HOME, Place
from bivlm_edge.calibration.precision import fast_products


class FloatStream:
    """What the float model's blocks get and what their layers see, after layers were changed.

    Holds the arguments of one block of each sequence for all batches, and the float weights of
    one block. To be made before any layer of the model changes.

    Args:
        module: The whole float model.
        sequences: Its block sequences.
        batches: See `walk`.
        place: Likewise.
    """

    def __init__(
        self,
        module: nn.Module,
        sequences: Sequence[Blocks],
        batches: Sequence[Batch],
        place: Place = HOME,
    ) -> None:
        self._calls = {
            sequence.name: capture_all(module, sequence.blocks, batches)
            for sequence in sequences
            if sequence.blocks
        }
        for calls in self._calls.values():
            place.bring(calls)
        self._current: list[Call] = []
        self._weights: dict[str, Tensor] = {}

    def enter(self, part: str, block: nn.Module) -> None:
        """Keep the weights of the next block of `part`, which are those of the float model."""
        self._current = self._calls[part]
        self._weights = {name: tensor.detach().clone() for name, tensor in block.named_parameters()}

    def run(self, block: nn.Module, batch: int) -> Tensor:
        """The output of the block entered last in the float model; layers' hooks are called."""
        call = self._current[batch]
        with fast_products():
            output = functional_call(block, self._weights, call.args, call.kwargs)
        return output_hidden(output, call.hidden.dtype)

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Go on behind the block entered last."""
        for number, call in enumerate(self._current):
            call.go_on(self.run(block, number))
