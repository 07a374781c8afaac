"""How far a model's next-token distributions are from those of the float model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.calls import IGNORED, LABELS, Batch, Stopped
from bivlm_edge.calibration.precision import compute_dtype, fast_products
from bivlm_edge.errors import UnsupportedModelError

_CHUNK = 512


def head_of(module: nn.Module) -> nn.Module:
    """The layer that turns hidden states into logits.

    Raises:
        UnsupportedModelError: the model has none.
    """
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(
            f"a {type(module).__name__} has no output embeddings, so that its answers cannot be "
            "compared with those of the float model, by which fine-tuning is judged. "
            "Use --tune none."
        )
    return head


def head_inputs(module: nn.Module, batch: Batch) -> Tensor:
    """What the head sees at the positions that count: float32 (positions, hidden).

    Counted are the positions that predict a label; without labels, all that are not masked.
    """
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise Stopped

    handle = head_of(module).register_forward_pre_hook(stop)
    try:
        with suppress(Stopped):
            module(**{name: value for name, value in batch.items() if name != LABELS})
    finally:
        handle.remove()
    hidden = seen[0]
    return hidden[_counted(batch, hidden)].float()


def _counted(batch: Batch, hidden: Tensor) -> Tensor:
    """Mask (samples, tokens) of the positions that count."""
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    if LABELS in batch:
        counted[:, :-1] = batch[LABELS][:, 1:] != IGNORED
        counted[:, -1] = False
    elif "attention_mask" in batch:
        counted &= batch["attention_mask"].bool()
    return counted


def pieces(batch: Batch, tokens: int) -> list[Batch]:
    """A batch in parts of at most `tokens` tokens, where all its tensors go by samples."""
    samples, length = batch["input_ids"].shape
    if any(len(value) != samples for value in batch.values()):
        return [batch]
    size = max(1, tokens // length)
    return [
        {name: value[start : start + size] for name, value in batch.items()}
        for start in range(0, samples, size)
    ]


class Teacher:
    """The float model's answers, computed when they are first asked for.

    Args:
        module: The float model; kept, so give a copy of a model that will be quantized.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._known: dict[int, tuple[Batch, Tensor]] = {}

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Inputs of the head for a batch, which is kept: `compute_dtype` (positions, hidden)."""
        if id(batch) not in self._known:
            with fast_products():
                hidden = head_inputs(self.module, batch)
            self._known[id(batch)] = batch, hidden.to(compute_dtype())
        return self._known[id(batch)][1]


class _Divergence(torch.autograd.Function):
    """Sum of KL(teacher || student) over positions; logits exist for a few positions at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: nn.Module) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        gradient = torch.empty_like(student) if student.requires_grad else None
        for start in range(0, len(student), _CHUNK):
            rows = slice(start, start + _CHUNK)
            with torch.enable_grad():
                part = student[rows].detach().requires_grad_()
                logits = head(part)
            answer = logits.detach().float().log_softmax(dim=-1)
            wanted = head(teacher[rows]).float().log_softmax(dim=-1)
            probabilities = wanted.exp()
            total += wanted.sub_(answer).mul_(probabilities).sum(dtype=torch.float64)
            if gradient is not None:
                slope = answer.exp_().sub_(probabilities).to(logits.dtype)
                (gradient[rows],) = torch.autograd.grad(logits, part, slope)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return ctx.gradient * upstream[0].float(), None, None


def divergence(module: nn.Module, batch: Batch, teacher: Tensor) -> tuple[Tensor, int]:
    """Sum of the KL divergences from the float model, and the number of positions.

    Args:
        module: The model to judge; gradients flow to what of it requires them.
        batch: See `head_inputs`.
        teacher: `Teacher.hidden` of the same batch.
    """
    hidden = head_inputs(module, batch)
    apply: Any = _Divergence.apply
    total: Tensor = apply(hidden, teacher, head_of(module))
    return total, len(hidden)


@torch.no_grad()
def mean_divergence(module: nn.Module, batches: Sequence[Batch], teacher: Teacher) -> float:
    """Mean KL divergence per position over batches, in nats."""
    total, positions = 0.0, 0
    for batch in batches:
        with fast_products():
            value, count = divergence(module, batch, teacher.hidden(batch))
        total += float(value)
        positions += count
    return total / max(positions, 1)
