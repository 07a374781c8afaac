"""The traced parts of the decoder: whole, or cut in two where image tokens are dropped."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bivlm_edge.export import attention
from bivlm_edge.export.tracing import trace
from bivlm_edge.models import VisionLanguageModel, saliency


class _Layers(nn.Module):
    """Some of the decoder's layers. Only inside `parts.installed`: its modules are in them."""

    def __init__(self, vlm: VisionLanguageModel, first: int, end: int) -> None:
        super().__init__()
        self.module = vlm.module
        self._vlm = [vlm]  # in a list: not a submodule
        self._first, self._end = first, end

    def run(
        self,
        normed: Tensor,
        hidden: Tensor,
        rotation: attention.Rotary,
        last_index: Tensor,
        total_length: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the next layer's (or the head's) normed input, the residual and the cache.

        Args:
            normed: Input of the first layer, ``(B, S, hidden)``.
            hidden: The residual that it is the norm of.
            rotation: Of these tokens.
            last_index: int32 ``(B,)``: index of the last token in the cache after this run.
            total_length: int32 ``(1,)``: tokens in the cache after this run.
            past: key, value of these layers in turn, each ``(B, kv_heads, P, head_dim)``.
        """
        decoder: Any = self._vlm[0].decoder
        norms = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
        present: list[Tensor] = []
        for index in range(self._first, self._end):
            layer, next_norm = decoder.layers[index], norms[index]
            states = (past[len(present)], past[len(present) + 1])
            # behind the attention of the last layer only the last token leads to the logits
            is_last = next_norm is decoder.norm
            update, key, value = layer.self_attn(
                normed, rotation, states, last_index, total_length, last_only=is_last
            )
            present += [key, value]
            if is_last:
                hidden = hidden[:, -1:]
            normed, hidden = layer.post_attention_layernorm(update, hidden)
            normed, hidden = next_norm(layer.mlp(normed), hidden)
        return normed, hidden, present

    def start(
        self, hidden: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor, attention.Rotary]:
        """Return the first layer's normed input, the residual, and the rotations."""
        decoder: Any = self._vlm[0].decoder
        rotation = attention.rotary(decoder.rotary_emb, position_ids, hidden.dtype)
        return *decoder.layers[0].input_layernorm(None, hidden), rotation


class DecoderPart(_Layers):
    """Embeddings ``(B, S, hidden)`` to logits of the last position and the grown KV cache."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__(vlm, 0, layer_count(vlm))

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        total_length: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits ``(B, 1, vocab)`` and present key, value of every layer.

        Args:
            hidden: ``(B, S, hidden)``.
            position_ids: int64 ``(B, S)``, or ``(3, B, S)`` (M-RoPE).
            last_index: See `run`.
            total_length: Likewise.
            past: Likewise.
        """
        start = self.start(hidden, position_ids)
        normed, _, present = self.run(*start, last_index, total_length, past)
        return self.module.get_output_embeddings()(normed), present


class LeadingPart(_Layers):
    """The layers that see all image tokens; inputs as in DecoderPart."""

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        total_length: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the next layer's normed input, the residual ``(B, S, hidden)``, and the cache."""
        return self.run(*self.start(hidden, position_ids), last_index, total_length, past)


class TrailingPart(_Layers):
    """The layers behind the pruning, and the head."""

    def forward(
        self,
        normed: Tensor,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        last_index: Tensor,
        total_length: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits ``(B, 1, vocab)`` and present key, value of these layers; see `run`."""
        rotation = attention.Rotary(cos, sin)
        normed, _, present = self.run(normed, hidden, rotation, last_index, total_length, past)
        return self.module.get_output_embeddings()(normed), present


class LastTokenPart(nn.Module):
    """Queries, keys and values of a layer to the attention that each token gets of the last."""

    def __init__(self, heads: int, kv_heads: int, scale: float) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._scale = heads, kv_heads, scale

    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return float32 ``(B, S)``, see `saliency.last_token_attention`."""
        heads = qkv.reshape(*qkv.shape[:2], self._heads + 2 * self._kv_heads, -1).float()
        query = _rotated(heads[:, -1:, : self._heads], cos[:, -1:], sin[:, -1:])
        key = _rotated(heads[:, :, self._heads : self._heads + self._kv_heads], cos, sin)
        return saliency.last_token_attention(
            query.transpose(1, 2), key.transpose(1, 2), self._scale
        )


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn features i and i + d / 2 of every head ``(B, S, heads, d)`` by angle i of the token."""
    low, high = states.chunk(2, -1)
    c, s = cos[:, :, None].float(), sin[:, :, None].float()
    return torch.cat((low * c - high * s, high * c + low * s), -1)


def layer_count(vlm: VisionLanguageModel) -> int:
    """Return the number of decoder layers."""
    return int(vlm.text_config.num_hidden_layers)


def kv_geometry(vlm: VisionLanguageModel) -> tuple[int, int, int]:
    """Return (decoder layers, key-value heads, head width)."""
    config = vlm.text_config
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return layer_count(vlm), int(config.num_key_value_heads), int(head_dim)


_BATCH, _NEW, _SEEN = 2, 3, 5  # of the arguments that are traced
_FRESH = ("last_index", "total_length")


def trace_decoder(
    vlm: VisionLanguageModel, dtype: torch.dtype, cache_dtype: torch.dtype, opset: int
) -> ir.Model:
    """Trace decoder and head; inputs as in DecoderPart, outputs logits, `present.{i}.key|value`."""
    return _trace(
        DecoderPart(vlm),
        vlm,
        {"hidden": _tokens(vlm, dtype), "position_ids": _positions(vlm)},
        ["logits"],
        (0, layer_count(vlm)),
        cache_dtype,
        opset,
    )


def trace_leading(
    vlm: VisionLanguageModel,
    layers: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    opset: int,
) -> ir.Model:
    """Trace LeadingPart, the first `layers`; outputs normed, hidden, `present.{i}.key|value`."""
    return _trace(
        LeadingPart(vlm, 0, layers),
        vlm,
        {"hidden": _tokens(vlm, dtype), "position_ids": _positions(vlm)},
        ["normed", "residual"],
        (0, layers),
        cache_dtype,
        opset,
    )


def trace_trailing(
    vlm: VisionLanguageModel,
    first: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    opset: int,
) -> ir.Model:
    """Trace TrailingPart from layer `first` on; outputs logits, `present.{i}.key|value`."""
    turns = torch.rand(_BATCH, _NEW, kv_geometry(vlm)[2] // 2, dtype=dtype)
    tokens = _tokens(vlm, dtype)
    return _trace(
        TrailingPart(vlm, first, layer_count(vlm)),
        vlm,
        {"normed": tokens, "hidden": tokens.clone(), "cos": turns, "sin": turns.clone()},
        ["logits"],
        (first, layer_count(vlm)),
        cache_dtype,
        opset,
    )


def trace_last_token(vlm: VisionLanguageModel, dtype: torch.dtype, opset: int) -> ir.Model:
    """Trace LastTokenPart; inputs qkv, cos, sin, output scores."""
    _, kv_heads, width = kv_geometry(vlm)
    decoder: Any = vlm.decoder
    attended = decoder.layers[0].self_attn
    heads = int(vlm.text_config.num_attention_heads)
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    turns = torch.rand(_BATCH, _NEW, width // 2, dtype=dtype)
    return trace(
        LastTokenPart(heads, kv_heads, float(attended.scale)).eval(),
        # one tensor given twice would become one input of the graph
        (
            torch.rand(_BATCH, _NEW, (heads + 2 * kv_heads) * width, dtype=dtype),
            turns,
            turns.clone(),
        ),
        dict.fromkeys(("qkv", "cos", "sin"), shape),
        ["qkv", "cos", "sin"],
        ["scores"],
        opset,
        "scores",
    )


def _tokens(vlm: VisionLanguageModel, dtype: torch.dtype) -> Tensor:
    return torch.rand(_BATCH, _NEW, vlm.text_config.hidden_size, dtype=dtype)


def _positions(vlm: VisionLanguageModel) -> Tensor:
    positions = torch.arange(_SEEN, _SEEN + _NEW)[None].expand(_BATCH, -1).contiguous()
    return positions if vlm.image_grid is None else positions.expand(3, -1, -1).contiguous()


def _trace(
    part: nn.Module,
    vlm: VisionLanguageModel,
    given: dict[str, Tensor],
    outputs: list[str],
    layers: tuple[int, int],
    cache_dtype: torch.dtype,
    opset: int,
) -> ir.Model:
    """Trace a part that takes `given`, last_index, total_length and the cache of `layers`."""
    _, heads, width = kv_geometry(vlm)
    names = [f"{index}.{kind}" for index in range(*layers) for kind in ("key", "value")]
    past = [torch.rand(_BATCH, heads, _SEEN, width).to(cache_dtype) for _ in names]
    last_index = torch.full((_BATCH,), _SEEN + _NEW - 1, dtype=torch.int32)
    total_length = torch.tensor([_SEEN + _NEW], dtype=torch.int32)
    batch, new = torch.export.Dim("batch"), torch.export.Dim("new")
    seen = torch.export.Dim("past", min=0)
    axes = 1 if vlm.image_grid is not None else 0
    shapes: dict[str, Any] = {key: {0: batch, 1: new} for key in given}
    if "position_ids" in given:
        shapes["position_ids"] = {axes: batch, axes + 1: new}
    shapes |= {"last_index": {0: batch}, "total_length": {}}
    shapes["past"] = [{0: batch, 2: seen} for _ in past]
    return trace(
        part.eval(),
        (*given.values(), last_index, total_length, past),
        shapes,
        [*given, *_FRESH, *(f"past_key_values.{name}" for name in names)],
        [*outputs, *(f"present.{name}" for name in names)],
        opset,
        "decoder",
    )
