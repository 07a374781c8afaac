"""Several processes on one quantization: who takes which batches and rows, and what they exchange.

Started by `torchrun --nproc-per-node N -m bivlm_edge.cli.export ...`. Tensors on the CPU go over
gloo; with `--device cuda` moments are summed between the GPUs over NCCL. Batches are divided for
calibration and rows of a weight for solving; all else every process computes alike, from sums that
are the same bit by bit everywhere.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bivlm_edge.errors import RequestError

T = TypeVar("T")
_CPU = torch.device("cpu")
_FAILED = "bivlm-edge failed"
_PATIENCE = datetime.timedelta(hours=12)  # the first process writes alone at the end
EXIT_PEER_FAILED = 1


class PeerFailedError(SystemExit):
    """Another process ended; it has said why."""

    def __init__(self) -> None:
        super().__init__(EXIT_PEER_FAILED)


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those that share the work.

    Attributes:
        rank: Number of this process; 0 alone writes files and prints.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item, beginning with this process's number.

        Raises:
            RequestError: There are fewer items than processes.
        """
        if len(items) < self.size:
            raise RequestError(
                f"{len(items)} calibration batches cannot be divided over {self.size} processes. "
                f"Start at most {len(items)}, or give more samples."
            )
        return list(items[self.rank :: self.size])

    def numbers(self, count: int) -> range:
        """The places of `share` among all items, of which this process has `count`."""
        return range(self.rank, self.rank + count * self.size, self.size)

    def total(self, count: int) -> int:
        """How many items all processes have together, of which this one has `count`."""
        return int(self.sum(torch.tensor([float(count)], dtype=torch.float64)))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.size == 1:
            return values
        total = values.contiguous().clone()
        with _peers():
            dist.reduce(total, 0)
            dist.broadcast(total, 0)
        return total

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows of all processes one after the other; they may differ in number."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.sum(counts)
        whole = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
        parts = list(torch.split(whole, counts.tolist()))
        parts[self.rank].copy_(rows)
        with _peers():
            for source, part in enumerate(parts):
                if part.numel():
                    dist.broadcast(part, source)
        return whole

    def bytes_of_first(self, data: bytes | None) -> bytes | None:
        """What the first process has; the others' arguments are ignored."""
        if self.size == 1:
            return data
        length = torch.tensor([-1 if data is None else len(data)])
        with _peers():
            dist.broadcast(length, 0)
            if int(length) < 0:
                return None
            content = torch.empty(int(length), dtype=torch.uint8)
            if self.rank == 0 and data:
                content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if len(content):
                dist.broadcast(content, 0)
        return bytes(content.numpy())


@contextmanager
def _peers() -> Iterator[None]:
    """Leave without a word where the exchange fails: the process that failed says why."""
    try:
        yield
    except RuntimeError as error:
        logging.getLogger(__name__).debug("exchange failed: %s", error)
        raise PeerFailedError from error


def current() -> Team:
    """This process's team; of one where torchrun started nothing."""
    if not (dist.is_available() and dist.is_initialized()):
        return Team()
    return Team(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined(device: torch.device = _CPU) -> Iterator[Team]:
    """Inside, the processes that torchrun started are a team. The first error ends them all.

    Only the process that fails first lets its error through; all others end silently.

    Args:
        device: On which this process has moments to sum; other tensors are on the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    backends = "gloo"
    if device != _CPU:
        torch.cuda.set_device(device)
        backends = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backends, timeout=_PATIENCE)
    team = current()
    if team.rank:
        logging.getLogger("bivlm_edge").setLevel(logging.ERROR)  # the first process says it
    try:
        yield team
    except PeerFailedError:
        raise
    except BaseException as error:
        if not _is_first_to_fail(team.rank):
            raise PeerFailedError from error
        raise
    finally:
        dist.destroy_process_group()


def _is_first_to_fail(rank: int) -> bool:
    store = dist.distributed_c10d._get_default_store()
    try:
        return bool(store.compare_set(_FAILED, "", str(rank)) == str(rank).encode())
    except RuntimeError:  # the store is gone with the first process, which kept it and has ended
        return rank == 0
