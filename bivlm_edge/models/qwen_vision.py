"""Qwen2.5-VL's vision tower on pictures of one size: windows are a batch axis, positions constants.

`transformers` splits a packed sequence by lengths that depend on the data, which cannot be traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bivlm_edge.models import saliency


def block_size(config: Any) -> int:
    """Return the pixels per side of one feature."""
    return int(config.patch_size * config.spatial_merge_size)


def window_blocks(config: Any) -> int:
    """Return the features per side of one window."""
    return int(config.window_size // block_size(config))


def to_patches(pixel_values: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return pictures as the model's own forward takes them.

    Args:
        pixel_values: float ``(images, 3, H, W)``.
        config: Of the vision tower.

    Returns:
        Patches ``(images * patches, 3 * frames * patch * patch)``, block by block, and their grid,
        int64 ``(images, 3)``: time, rows, columns.
    """
    images, channels, height, width = pixel_values.shape
    merge, patch, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    rows, columns = height // patch, width // patch
    shape = (images, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = pixel_values.reshape(shape).permute(0, 2, 5, 3, 6, 1, 4, 7)
    still = blocks[..., None, :, :].expand(*blocks.shape[:6], frames, patch, patch)
    grid = torch.tensor([[1, rows, columns]] * images)
    return still.reshape(images * rows * columns, -1), grid


def features(visual: Any, pixel_values: Tensor) -> Tensor:
    """Return merged features ``(images, tokens, out_hidden)``, row by row.

    Args:
        visual: A `Qwen2_5_VisionTransformerPretrainedModel`.
        pixel_values: float ``(images, 3, H, W)`` whose sides are whole windows.
    """
    return _encoded(visual, pixel_values, None)[0]


def attended_features(visual: Any, pixel_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return what `features` does, and the attention that the patches of each feature receive.

    Args:
        visual: As in `features`.
        pixel_values: Likewise.
        layer: Which block's attention. In a block with windows a patch receives that of its
            window, and every window sums to the same.

    Returns:
        The features, and float32 ``(images, tokens)``, mean over patches and heads.
    """
    merged, received = _encoded(visual, pixel_values, layer)
    assert received is not None
    return merged, received


def _encoded(visual: Any, pixel_values: Tensor, layer: int | None) -> tuple[Tensor, Tensor | None]:
    config = visual.config
    merge, span = int(config.spatial_merge_size), window_blocks(config)
    # The frames of a still picture are equal: their kernels add up.
    kernel = visual.patch_embed.proj.weight.sum(dim=2)
    grid = functional.conv2d(pixel_values, kernel, stride=int(config.patch_size))
    width, rows, columns = grid.shape[1:]
    cells = (rows // (merge * span), span, merge, columns // (merge * span), span, merge)
    # windows, then blocks in a window, then patches in a block
    order = grid.reshape(-1, width, *cells).permute(0, 2, 5, 3, 6, 4, 7, 1)
    windows, patches = cells[0] * cells[3], (span * merge) ** 2
    hidden = order.reshape(-1, windows * patches, width)
    cos, sin = _rotations(visual, rows, columns, cells)
    received = None
    for index, block in enumerate(visual.blocks):
        is_full = index in config.fullatt_block_indexes
        parts = 1 if is_full else windows
        query, key, value = _states(block.attn, _norm(block.norm1, hidden), cos, sin, parts)
        if index == layer:
            of_parts = saliency.attention_received(
                query, key, block.attn.scaling, class_token=False
            )
            received = of_parts.reshape(-1, windows * patches)
        hidden = hidden + _attention(block.attn, query, key, value, hidden)
        hidden = hidden + block.mlp(_norm(block.norm2, hidden))
    normed = _norm(visual.merger.ln_q, hidden)
    merged = visual.merger.mlp(normed.reshape(-1, visual.merger.hidden_size))
    blocks, width_out = (-1, cells[0], cells[3], span, span), merged.shape[-1]
    tokens = rows * columns // merge**2
    if received is not None:
        of_blocks = received.reshape(-1, merge**2).mean(dim=-1)
        received = _in_rows(of_blocks.reshape(*blocks, 1)).reshape(-1, tokens)
    features = _in_rows(merged.reshape(*blocks, width_out)).reshape(-1, tokens, width_out)
    return features, received


def _in_rows(blocks: Tensor) -> Tensor:
    """Return features of windows, ``(images, a, b, rows, columns, width)``, row by row."""
    return blocks.permute(0, 1, 3, 2, 4, 5)


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """Return what a `Qwen2_5_VLRMSNorm` does; this form is one node of opset 23."""
    return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotations(
    visual: Any, rows: int, columns: int, cells: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return cos and sin ``(patches, 1, head_dim)`` in the order of `features`."""
    places = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1
    )
    ordered = places.reshape(*cells, 2).permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, 2)
    angles = ordered[..., None].float() * visual.rotary_pos_emb.inv_freq.float()
    angles = torch.cat([angles[:, 0], angles[:, 1]] * 2, dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _states(
    attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each ``(images * parts, heads, patches / parts, head_dim)``.

    Args:
        attention: A `Qwen2_5_VLVisionAttention`.
        hidden: ``(images, patches, width)``.
        cos: ``(patches, 1, head_dim)``.
        sin: Likewise.
        parts: Windows that attend only to themselves; 1 for all to all.
    """
    patches = hidden.shape[1]
    states = attention.qkv(hidden).reshape(-1, patches, 3, attention.num_heads, attention.head_dim)
    query, key, value = states.unbind(dim=2)
    query, key = (_rotated(part.float(), cos, sin).to(part.dtype) for part in (query, key))
    query, key, value = (
        part.reshape(-1, patches // parts, *part.shape[2:]).transpose(1, 2)
        for part in (query, key, value)
    )
    return query, key, value


def _attention(attention: Any, query: Tensor, key: Tensor, value: Tensor, like: Tensor) -> Tensor:
    """Return the attention's output, ``(images, patches, width)`` as `like`."""
    mixed = functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    output: Tensor = attention.proj(mixed.transpose(1, 2).reshape(-1, *like.shape[1:]))
    return output


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
