"""Drop tokens inside a decoder in torch: what the exported graph is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bivlm_edge.models.vlm import VisionLanguageModel

Hook = Any  # of torch: (module, args, kwargs) to changed (args, kwargs) or None


def decode_dropping(
    vlm: VisionLanguageModel,
    embeddings: Tensor,
    positions: Tensor,
    cache: DynamicCache,
    layer: int,
    kept: Tensor,
) -> Tensor:
    """Return the logits of kept tokens; the others leave before a decoder layer, and the cache.

    The layers before see all tokens. Keys and values that these have of dropped tokens are removed
    afterwards, so that all layers have one past (PRUNING.md 3, pattern B).

    Args:
        vlm: The model.
        embeddings: float ``(B, S, hidden)``.
        positions: int64 ``(B, S)``, or ``(3, B, S)`` (M-RoPE).
        cache: Grows by the kept tokens.
        layer: The first layer that does not see dropped tokens.
        kept: int64, indices of the tokens that stay, the last among them, rising.

    Returns:
        float ``(B, kept, vocab)``.
    """
    seen = cache.get_seq_length()
    columns = torch.cat([torch.arange(seen), seen + kept])

    def hook_of(index: int) -> Hook:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == layer:
                args = (args[0][:, kept], *args[1:])
            cos, sin = kwargs["position_embeddings"]
            changed = {
                "position_embeddings": (cos[..., kept, :], sin[..., kept, :]),
                "attention_mask": kwargs["attention_mask"][..., kept, :][..., columns],
            }
            return args, {**kwargs, **changed}

        return hook

    layers = range(layer, len(_layers(vlm)))
    with _hooked(vlm, {index: hook_of(index) for index in layers}):
        logits = vlm.decode(embeddings, positions, cache)
    for states in cache.layers[:layer]:
        states.keys, states.values = states.keys[:, :, columns], states.values[:, :, columns]
    return logits


def layer_inputs(
    vlm: VisionLanguageModel, embeddings: Tensor, positions: Tensor, layers: Sequence[int]
) -> list[Tensor]:
    """Return the residual ``(B, S, hidden)`` that each of some decoder layers starts with."""
    found: dict[int, Tensor] = {}

    def hook_of(index: int) -> Hook:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            found[index] = args[0]

        return hook

    with _hooked(vlm, {index: hook_of(index) for index in layers}):
        vlm.decode(embeddings, positions, DynamicCache())
    return [found[index] for index in layers]


@contextmanager
def _hooked(vlm: VisionLanguageModel, hooks: dict[int, Hook]) -> Iterator[None]:
    layers = _layers(vlm)
    handles = [
        layers[index].register_forward_pre_hook(hook, with_kwargs=True)
        for index, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(vlm: VisionLanguageModel) -> Any:
    decoder: Any = vlm.decoder
    return decoder.layers
