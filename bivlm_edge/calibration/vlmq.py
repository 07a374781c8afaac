"""Token weights of the decoder's attention layers by VLMQ: one backward pass per block.

Xue et al., "VLMQ: Token Saliency-Driven Post-Training Quantization for Vision-Language Models",
2025 (arXiv 2508.03351v2), section 4.

With F the hidden states of the float model before a block and U those of the model whose earlier
blocks are quantized, the loss of the block is |Attn(F) - Attn(U)|^2, the squared error behind its
attention with residual. The factor g of a token in a layer is the mean over channels of
|d loss / d Z|, Z the layer's output on U. It stands inside the norm of the layer's error, so rows
weigh g^2 in the Hessian: X diag(g^2) X^T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bivlm_edge.calibration.calls import Batch, Blocks, Call, Stopped, capture
from bivlm_edge.calibration.moments import ALONE
from bivlm_edge.distributed import Team
from bivlm_edge.errors import UnsupportedModelError

DECODER = "decoder"
_FLOOR = 0.05  # of the sample's mean factor: the Hessian keeps every row
_NO_ERROR = 1e-12  # of the energy of Attn(F); rounding of float32 leaves about 1e-14


class ModalityWeights(NamedTuple):
    """Mean weight of the rows of one layer; None where there are no such rows."""

    text: float | None
    vision: float | None


class VlmqWeighting:
    """A `Weighting`: factors squared for the decoder's attention layers, all others weigh alike.

    The rows of the vision tower and of the projector are image tokens alone, and the paper weighs
    no layer outside attention. Where the quantized model computes what the float model does, which
    is before the first quantized layer, the loss has no gradient and all rows weigh alike.

    Keeps the float model's hidden states of all batches for one block. Made before any layer is
    quantized; `weigh` must see every block of the decoder, in order.

    Args:
        module: The whole float model.
        sequences: Its block sequences; the one named "decoder" is weighed.
        batches: See `walk`.
        vision: Which rows of the decoder's hidden states are image tokens, bool (rows,) per batch,
            for the account; None if there are no image tokens.
        modalities: Where `weigh` puts the mean weights of each layer, by dotted name.
        team: The processes that share the batches, `batches` being this one's.
    """

    def __init__(
        self,
        module: nn.Module,
        sequences: Sequence[Blocks],
        batches: Sequence[Batch],
        vision: Sequence[Tensor] | None,
        modalities: dict[str, ModalityWeights],
        team: Team = ALONE,
    ) -> None:
        blocks = [s.blocks for s in sequences if s.name == DECODER and s.blocks]
        self._hidden = [
            capture(module, blocks[0][0][1], batch).hidden.detach() if blocks else torch.empty(0)
            for batch in batches
        ]
        self._vision = vision
        self._modalities = modalities
        self._team = team

    def weigh(
        self, part: str, name: str, block: nn.Module, calls: Sequence[Call]
    ) -> Mapping[str, Sequence[Tensor]]:
        """Weigh the rows of the linear layers in the block's attention; see `Weighting`."""
        if part != DECODER:
            return {}
        prefix = f"{name}." if name else ""
        local, attention = _attention(name, block)
        found: dict[str, list[Tensor]] = {}
        for number, call in enumerate(calls):
            reference = self._hidden[number].to(call.hidden.device)
            factors, self._hidden[number] = _factors(block, attention, call, reference)
            for layer, rows in factors.items():
                found.setdefault(f"{prefix}{local}.{layer}", []).append((rows**2).cpu())
        layers = [f"{prefix}{local}.{layer}" for layer, _ in _linear_layers(attention)]
        self._modalities.update(self._by_modality(layers, found))
        return found

    def _by_modality(
        self, layers: Sequence[str], weights: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, ModalityWeights]:
        """Mean weights over the batches of all processes; `layers` are the same in each."""
        sums = torch.zeros(len(layers), 2, 2, dtype=torch.float64)  # text and vision: sum, rows
        for index, name in enumerate(layers):
            for number, rows in enumerate(weights.get(name, [])):
                is_vision = torch.zeros(len(rows), dtype=torch.bool)
                if self._vision is not None:
                    is_vision = self._vision[number]
                for modality, chosen in enumerate((rows[~is_vision], rows[is_vision])):
                    sums[index, modality, 0] += chosen.double().sum()
                    sums[index, modality, 1] += len(chosen)
        told = {}
        for name, modalities in zip(layers, self._team.sum(sums).tolist(), strict=True):
            means = [total / rows if rows else None for total, rows in modalities]
            if means != [None, None]:
                told[name] = ModalityWeights(*means)
        return told


def _attention(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    """The block's attention module: the child so named that holds linear layers."""
    for local, child in block.named_children():
        is_named = "attn" in local or "attention" in local
        if is_named and any(isinstance(part, nn.Linear) for part in child.modules()):
            return local, child
    children = ", ".join(local for local, _ in block.named_children())
    raise UnsupportedModelError(
        f"'{name}' ({type(block).__name__}) has no child with attention in its name (it has "
        f"{children}), so --importance vlmq cannot weigh it. Choose --importance loss or none."
    )


def _linear_layers(attention: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, layer) for n, layer in attention.named_modules() if isinstance(layer, nn.Linear)]


def _factors(
    block: nn.Module, attention: nn.Module, call: Call, reference: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Factors g by local layer name, float32 (rows,), and the float model's next hidden states."""
    float_call = Call(call.args, dict(call.kwargs))
    float_call.replace_hidden(reference)
    attended: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        attended.append(output[0] if isinstance(output, tuple | list) else output)

    def stop(*_: Any) -> None:
        raise Stopped

    handle = attention.register_forward_hook(keep)
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(_remember(local, outputs))
        for local, layer in _linear_layers(attention)
    ]
    try:
        with torch.no_grad():
            following = float_call.run(block, exact=True)
        outputs.clear()
        handles.append(attention.register_forward_hook(stop))
        with torch.enable_grad(), suppress(Stopped):
            call.run(block, exact=True)
    finally:
        for registered in (handle, *handles):
            registered.remove()
    wanted = (reference + attended[0]).detach()
    error = call.hidden.detach() + attended[1] - wanted
    loss = (error**2).sum()
    if float(loss.detach()) <= _NO_ERROR * float((wanted**2).sum()):
        alike = {local: torch.ones(value[..., 0].numel()) for local, value in outputs.items()}
        return alike, following
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    factors = {
        local: _normalized(gradient.abs().mean(dim=-1))
        for local, gradient in zip(outputs, gradients, strict=True)
    }
    return factors, following


def _remember(
    local: str, outputs: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_()
        outputs[local] = output
        return output

    return hook


def _normalized(factors: Tensor) -> Tensor:
    """Factors (samples, tokens) or (tokens,) in units of each sample's mean, floored: (rows,)."""
    mean = factors.mean(dim=-1, keepdim=True)
    relative = torch.where(mean > 0, factors / mean, torch.ones_like(factors))
    return relative.clamp_min(_FLOOR).float().reshape(-1)
