"""Transformer operators as torch custom ops, and how they are exported.

As in torch_ops.py the eager forms are slow and exact. GroupQueryAttention and GatedSiLU are our
library's, with ONNX Runtime's operators as their functions; the others are ONNX Runtime's. Why
these and not the standard operators: GroupQueryAttention rotates, and writes keys and values into
the cache in place, and the operators exist for every opset that we write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from onnx import defs, helper
from torch import Tensor

from bivlm_edge.export.schemas import DOMAIN, MICROSOFT_DOMAIN, OPSET_VERSION

_ai_bivlm = onnxscript.values.Opset(DOMAIN, OPSET_VERSION)
_com_microsoft = onnxscript.values.Opset(MICROSOFT_DOMAIN, 1)
_FLOATS = ["tensor(float)", "tensor(float16)"]


@torch.library.custom_op("bivlm::group_query_attention", mutates_args=())
def group_query_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    last_index: Tensor,
    total_length: Tensor,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ai.bivlm.GroupQueryAttention of OPS.md: rotation and causal attention behind a KV cache.

    Args:
        qkv: ``(B, S, (num_heads + 2 * kv_heads) * head_dim)``: queries, keys, values.
        cos: ``(B, S, head_dim / 2)``: rotations of queries and keys.
        sin: Likewise.
        past_key: ``(B, kv_heads, P, head_dim)``, of the type of qkv or float16; the first
            last_index + 1 - S positions count.
        past_value: Likewise.
        last_index: int32 ``(B,)``: index of the last token in the cache after this run.
        total_length: int32, one element: tokens in the cache after this run.
        num_heads: Query heads.
        scale: Factor on the scores.

    Returns:
        Output ``(B, S, num_heads * head_dim)``, and keys and values
        ``(B, kv_heads, max(P, total_length), head_dim)`` of the type of the past.
    """
    batch, new = qkv.shape[:2]
    kv_heads, capacity, width = past_key.shape[1:]
    heads = qkv.reshape(batch, new, -1, width)
    query, key, value = torch.split(heads, [num_heads, kv_heads, kv_heads], dim=2)
    query, key = (_rotated(states.float(), cos.float(), sin.float()) for states in (query, key))
    shape = (batch, kv_heads, max(capacity, int(total_length)), width)
    present_key, present_value = past_key.new_zeros(shape), past_value.new_zeros(shape)
    present_key[:, :, :capacity], present_value[:, :, :capacity] = past_key, past_value
    output = qkv.new_empty(batch, new, num_heads * width)
    for row in range(batch):
        total = int(last_index[row]) + 1
        past = total - new
        for present, states in ((present_key, key), (present_value, value)):
            present[row, :, past:total] = states[row].transpose(0, 1)
        mask = torch.arange(total)[None] <= torch.arange(past, total)[:, None]
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[row].transpose(0, 1)[None],
            present_key[row, :, :total].float()[None],
            present_value[row, :, :total].float()[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        output[row] = attended[0].transpose(0, 1).reshape(new, -1).to(qkv.dtype)
    return output, present_key, present_value


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn features i and i + d / 2 of every head ``(B, S, heads, d)`` by angle i of the token."""
    low, high = states.chunk(2, -1)
    c, s = cos[:, :, None], sin[:, :, None]
    return torch.cat((low * c - high * s, high * c + low * s), -1)


@group_query_attention.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,  # noqa: ARG001 - the signature of the op
    sin: Tensor,  # noqa: ARG001
    past_key: Tensor,
    past_value: Tensor,
    last_index: Tensor,  # noqa: ARG001
    total_length: Tensor,  # noqa: ARG001
    num_heads: int,
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    # the length that a filled cache leads to; `join_parts` names the axis of the outputs anew
    batch, kv_heads, filled, width = past_key.shape
    shape = (batch, kv_heads, filled + qkv.shape[1], width)
    output = qkv.new_empty(batch, qkv.shape[1], num_heads * width)
    return output, past_key.new_empty(shape), past_value.new_empty(shape)


@torch.library.custom_op("bivlm::gated_silu", mutates_args=())
def gated_silu(x: Tensor) -> Tensor:
    """ai.bivlm.GatedSiLU of OPS.md: silu(gate) * up of x ``(.., 2 * width)``, gate then up."""
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


@gated_silu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("bivlm::multi_head_attention", mutates_args=())
def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float
) -> Tensor:
    """com.microsoft.MultiHeadAttention: every token attends to all, ``(B, S, heads * width)``."""
    q, k, v = (
        states.float().reshape(*states.shape[:2], num_heads, -1).transpose(1, 2)
        for states in (query, key, value)
    )
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return attended.transpose(1, 2).flatten(2).to(query.dtype)


@multi_head_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,  # noqa: ARG001 - the signature of the op
    value: Tensor,  # noqa: ARG001
    num_heads: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("bivlm::skip_rms_norm", mutates_args=())
def skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """com.microsoft.SkipSimplifiedLayerNormalization: RMS norm of x + skip, and x + skip."""
    total = (x.float() + skip.float()).to(x.dtype)
    wide = total.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight.float()).to(x.dtype), total


@skip_rms_norm.register_fake
def _(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,  # noqa: ARG001 - the signature of the op
    epsilon: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(skip)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the part of `torch_ops.translation_table` that these ops are."""
    for schema in (_full_attention_schema(), _norm_schema()):
        if not defs.has(schema.name, schema.domain):
            defs.register_schema(schema)

    def to_group_query_attention(
        qkv: Any,
        cos: Any,
        sin: Any,
        past_key: Any,
        past_value: Any,
        last_index: Any,
        total_length: Any,
        num_heads: int,
        scale: float,
    ) -> Any:
        return _ai_bivlm.GroupQueryAttention(
            qkv,
            cos,
            sin,
            past_key,
            past_value,
            last_index,
            total_length,
            num_heads=num_heads,
            kv_num_heads=int(past_key.shape[1]),
            scale=scale,
        )

    def to_gated_silu(x: Any) -> Any:
        return _ai_bivlm.GatedSiLU(x)

    def to_multi_head_attention(
        query: Any, key: Any, value: Any, num_heads: int, scale: float
    ) -> Any:
        return _com_microsoft.MultiHeadAttention(
            query, key, value, num_heads=num_heads, scale=scale
        )

    def to_skip_rms_norm(x: Any, skip: Any, weight: Any, epsilon: float) -> Any:
        outputs = _com_microsoft.SkipSimplifiedLayerNormalization(x, skip, weight, epsilon=epsilon)
        return outputs[0], outputs[3]

    return {
        torch.ops.bivlm.group_query_attention.default: to_group_query_attention,
        torch.ops.bivlm.gated_silu.default: to_gated_silu,
        torch.ops.bivlm.multi_head_attention.default: to_multi_head_attention,
        torch.ops.bivlm.skip_rms_norm.default: to_skip_rms_norm,
    }


def _schema(
    name: str,
    doc: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    attributes: dict[str, int | float],
) -> defs.OpSchema:
    """Return the schema of the part of an operator that we emit; names -> types, defaults."""
    parameter, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    return defs.OpSchema(
        name,
        MICROSOFT_DOMAIN,
        1,
        doc=doc,
        inputs=[parameter(key, kind) for key, kind in inputs.items()],
        outputs=[parameter(key, kind) for key, kind in outputs.items()],
        type_constraints=[("T", _FLOATS, "float32 or float16")],
        attributes=[
            attribute(key, helper.make_attribute(key, value)) for key, value in attributes.items()
        ],
    )


def _full_attention_schema() -> defs.OpSchema:
    return _schema(
        "MultiHeadAttention",
        "Attention of every token to all, without a mask.",
        dict.fromkeys(("query", "key", "value"), "T"),
        {"output": "T"},
        {"num_heads": 1, "scale": 0.0},
    )


def _norm_schema() -> defs.OpSchema:
    return _schema(
        "SkipSimplifiedLayerNormalization",
        "Root mean square norm of input + skip.",
        dict.fromkeys(("input", "skip", "gamma"), "T"),
        {
            "output": "T",
            "mean": "tensor(float)",
            "inv_std_var": "tensor(float)",
            "input_skip_bias_sum": "T",
        },
        {"epsilon": 1e-5},
    )
