"""Where calibration runs: on the processor, or with one block at a time on a GPU.

All moves to a device go through here; back come moments and token weights alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.calls import Call
from bivlm_edge.errors import RequestError

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Place:
    """A device for passes through blocks; the model itself stays in the processor's memory."""

    device: torch.device = _CPU

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Inside, a module's parameters and buffers are copies on the device.

        Afterwards they are the very tensors that they were: changes of the copies are lost.
        """
        homes: list[tuple[nn.Module, str, Tensor]] = []
        known: dict[int, tuple[Any, Any]] = {}
        try:
            if self.device != _CPU:
                for owner in module.modules():
                    for name, value in _own_tensors(owner):
                        homes.append((owner, name, value))
                        setattr(owner, name, self._moved(value, known))
            yield
        finally:
            for owner, name, value in homes:
                setattr(owner, name, value)

    def moved(self, value: Any) -> Any:
        """Tensors on the device, also those in tuples, lists and dictionaries."""
        return self._moved(value, {})

    def bring(self, calls: Sequence[Call]) -> None:
        """Move the arguments of calls, of this block and of later ones; shared ones once."""
        known: dict[int, tuple[Any, Any]] = {}
        for call in calls:
            for one in (call, *call.later):
                one.args = self._moved(one.args, known)
                one.kwargs = self._moved(one.kwargs, known)

    def _moved(self, value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
        if self.device == _CPU:
            return value
        if id(value) in known:
            return known[id(value)][1]
        found = value
        if isinstance(value, nn.Parameter):
            copied = value.detach().to(self.device)
            found = nn.Parameter(copied, requires_grad=value.requires_grad)
        elif isinstance(value, Tensor):
            found = value.to(self.device)
        elif type(value) in (tuple, list):
            found = type(value)(self._moved(item, known) for item in value)
        elif type(value) is dict:
            found = {key: self._moved(item, known) for key, item in value.items()}
        known[id(value)] = value, found  # the value as well: its id stays its own
        return found


HOME = Place()


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def find_place(device: str) -> Place:
    """Return the place of this process; of several that torchrun started each has its own GPU.

    Args:
        device: One of `config.DEVICES`.

    Raises:
        RequestError: There is no such GPU.
    """
    if device == "cpu":
        return HOME
    if torch.version.cuda is None:
        raise RequestError(
            f"--device cuda: this PyTorch ({torch.__version__}) was built without CUDA. Install "
            "one with CUDA (pytorch.org), or leave --device out."
        )
    if not torch.cuda.is_available():
        raise RequestError(
            "--device cuda: PyTorch finds no NVIDIA GPU or no driver for one (nvidia-smi should "
            "list it). Leave --device out to calibrate on the processor."
        )
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise RequestError(
            f"--device cuda: process {number} of this machine has no GPU of its own, there are "
            f"{count}. Start torchrun with --nproc-per-node {count}."
        )
    return Place(torch.device("cuda", number))
