"""The operators of OPS.md in numpy, as plain as the text: float64, no speed, own unpacking.

Every other implementation is tested against this one, so it shares no code with them. The classes
serve `onnx.reference.ReferenceEvaluator(model, new_ops=[BinaryMatMul, GatedSiLU,
GroupMatMul, GroupQueryAttention, TokenPrune])`. What TokenPrune computes is in reference_prune.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

from bivlm_edge.export.reference_prune import token_prune
from bivlm_edge.export.schemas import DOMAIN

Array = NDArray[Any]


class BinaryMatMul(OpRun):
    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        codes: Array,
        coefficients: Array,
        signs: Array | None = None,
        order: Array | None = None,
        K: int = 0,  # noqa: N803
        N: int = 0,  # noqa: N803
        plane_columns: Sequence[int] = (),
        hadamard_block: int | None = None,
        format: int | None = None,
    ) -> tuple[Array]:
        if format not in (None, 1):
            raise ValueError(f"BinaryMatMul: packed format {format}; this reference reads 1")
        y = binary_matmul(
            x,
            codes,
            coefficients,
            signs,
            order,
            K=K,
            N=N,
            plane_columns=plane_columns,
            hadamard_block=hadamard_block or 0,
        )
        return (y.astype(x.dtype),)


class GroupQueryAttention(OpRun):
    op_domain = DOMAIN

    def _run(
        self,
        qkv: Array,
        cos: Array,
        sin: Array,
        past_key: Array,
        past_value: Array,
        seqlens_k: Array,
        total_sequence_length: Array,
        num_heads: int = 0,
        kv_num_heads: int = 0,
        scale: float | None = None,
    ) -> tuple[Array, Array, Array]:
        if num_heads % kv_num_heads or past_key.shape[1] != kv_num_heads:
            raise ValueError(
                f"GroupQueryAttention: {num_heads} heads, {kv_num_heads} kv heads, past_key of "
                f"shape {past_key.shape}: the heads are a multiple of the second axis of past_key"
            )
        output, present_key, present_value = group_query_attention(
            qkv,
            cos,
            sin,
            past_key,
            past_value,
            seqlens_k,
            int(total_sequence_length.item()),
            num_heads=num_heads,
            scale=scale or 0.0,
        )
        return output.astype(qkv.dtype), present_key, present_value


class GroupMatMul(OpRun):
    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        codes: Array,
        scales: Array,
        K: int = 0,  # noqa: N803
        N: int = 0,  # noqa: N803
        bits: int = 8,
        block_size: int = 0,
    ) -> tuple[Array]:
        y = group_matmul(x, codes, scales, K=K, N=N, bits=bits, block_size=block_size)
        return (y.astype(x.dtype),)


class GatedSiLU(OpRun):
    op_domain = DOMAIN

    def _run(self, x: Array) -> tuple[Array]:
        return (gated_silu(x).astype(x.dtype),)


class TokenPrune(OpRun):
    op_domain = DOMAIN

    def _run(
        self,
        hidden: Array,
        scores: Array | None = None,
        segments: Array | None = None,
        keep: Array | None = None,
        metric: Array | None = None,
        **attributes: Any,
    ) -> tuple[Array, ...]:
        given = {name: value for name, value in attributes.items() if value is not None}
        outputs = token_prune(hidden, scores, segments, keep, metric, **given)
        return outputs[: len(self.onnx_node.output)]


def group_query_attention(
    qkv: Array,
    cos: Array,
    sin: Array,
    past_key: Array,
    past_value: Array,
    seqlens_k: Array,
    total: int,
    *,
    num_heads: int,
    scale: float = 0.0,
) -> tuple[NDArray[np.float64], Array, Array]:
    """Return output float64 `[B, S, num_heads * d]`, present_key and present_value."""
    (batch, kv_heads, capacity, d), new = past_key.shape, qkv.shape[1]
    factor = scale or 1 / math.sqrt(d)
    shape = (batch, kv_heads, max(capacity, total), d)
    present_key, present_value = (np.zeros(shape, past_key.dtype) for _ in range(2))
    heads = qkv.reshape(batch, new, num_heads + 2 * kv_heads, d)
    query, key = (
        _rotate(states, cos, sin)
        for states in (heads[:, :, :num_heads], heads[:, :, num_heads : num_heads + kv_heads])
    )
    value = heads[:, :, num_heads + kv_heads :]
    output = np.zeros((batch, new, num_heads, d))
    for b in range(batch):
        tokens = int(seqlens_k[b]) + 1
        past = tokens - new
        for present, old, states in (
            (present_key, past_key, key),
            (present_value, past_value, value),
        ):
            present[b, :, :past] = old[b, :, :past]
            for token in range(new):
                present[b, :, past + token] = states[b, token]
        for head in range(num_heads):
            kv_head = head // (num_heads // kv_heads)
            for token in range(new):
                keys, values = (
                    present[b, kv_head, : past + token + 1].astype(np.float64)
                    for present in (present_key, present_value)
                )
                scores = factor * (keys @ query[b, token, head])
                weights = np.exp(scores - scores.max())
                output[b, token, head] = weights @ values / weights.sum()
    return output.reshape(batch, new, num_heads * d), present_key, present_value


def _rotate(states: Array, cos: Array, sin: Array) -> NDArray[np.float64]:
    """Turn features i and i + d / 2 of every head `[B, S, heads, d]` by angle i of the token."""
    low, high = np.split(states.astype(np.float64), 2, axis=-1)
    c, s = (angles.astype(np.float64)[:, :, None] for angles in (cos, sin))
    return np.concatenate([low * c - high * s, high * c + low * s], axis=-1)


def gated_silu(x: Array) -> NDArray[np.float64]:
    """Return gate * sigmoid(gate) * up, `[..., I]`."""
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    result: NDArray[np.float64] = gate / (1 + np.exp(-gate)) * up
    return result


def binary_matmul(
    x: Array,
    codes: Array,
    coefficients: Array,
    signs: Array | None = None,
    order: Array | None = None,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    plane_columns: Sequence[int],
    hadamard_block: int = 0,
) -> NDArray[np.float64]:
    """Return transform(x) * What^T, `[..., N]`."""
    weight = unpack(codes, coefficients, N, plane_columns)
    v = transform(x, signs, order, K, hadamard_block)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    return np.where(finite, np.where(finite, v, 0.0) @ weight.T, np.nan)


def group_matmul(
    x: Array,
    codes: Array,
    scales: Array,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    bits: int,
    block_size: int,
) -> NDArray[np.float64]:
    """Return x * What^T, `[..., N]`."""
    weight = np.zeros((N, K))
    for j in range(K):
        block, column = divmod(j, block_size)
        byte = codes[:, block, column * bits // 8].astype(np.int64)
        code = byte >> column * bits % 8 & 2**bits - 1
        weight[:, j] = (code - 2 ** (bits - 1)) * scales[:, block].astype(np.float64)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    return np.where(finite, np.where(finite, x, 0.0) @ weight.T, np.nan)


def transform(
    x: Array, signs: Array | None, order: Array | None, k: int, block: int
) -> NDArray[np.float64]:
    """Return steps 1 to 3 of `transform`, `[..., Kp]`."""
    padded_k = -(-k // 64) * 64
    u = np.zeros((*x.shape[:-1], padded_k))
    u[..., :k] = x
    if signs is not None:
        u *= [1.0 if signs[j // 8] >> (j % 8) & 1 else -1.0 for j in range(padded_k)]
    if block:
        matrix = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
        for start in range(0, padded_k, block):
            part = slice(start, start + block)
            with np.errstate(invalid="ignore"):  # an infinity gives NaN, as the operator shall
                u[..., part] = u[..., part] @ np.array(matrix).T / math.sqrt(block)
    if order is None:
        return u
    width = padded_k // len(order)
    columns = [int(first) * width + i for first in order for i in range(width)]
    if sorted(columns) != list(range(padded_k)):
        raise ValueError("BinaryMatMul: order is not a permutation")
    return u[..., columns]


def unpack(
    codes: Array, coefficients: Array, n: int, plane_columns: Sequence[int]
) -> NDArray[np.float64]:
    """Return What of FORMAT.md, `[n, Kp]`."""
    weight = np.zeros((len(codes) * 16, plane_columns[0]))
    byte = slot = chunk = 0
    for planes in range(len(plane_columns), 0, -1):
        end_of_class = plane_columns[planes - 1] // 64
        if chunk == end_of_class:
            continue
        while chunk < end_of_class:
            for plane in range(planes):
                signs = 2.0 * _chunk_bits(codes[:, byte : byte + 128 * planes], plane, planes) - 1.0
                alpha = coefficients[:, slot + plane, :].astype(np.float64).reshape(-1, 1)
                weight[:, 64 * chunk : 64 * chunk + 64] += alpha * signs
            byte += 128 * planes
            chunk += 1
        slot += planes
    return weight[:n]


def _chunk_bits(chunk: Array, plane: int, planes: int) -> Array:
    """Return the bits of one plane in one chunk, `[rows, 64]`; `chunk`: `[panels, bytes]`."""
    bits = np.zeros((len(chunk), 16, 64))
    in_pair = plane + 1 < planes or plane % 2 == 1
    block = chunk[:, plane // 2 * 256 :]
    for column in range(64):
        e = column % 4
        if in_pair:
            t, i = column // 16, column % 16 // 4
            bit = 2 * i + plane % 2
        else:
            t, i = column // 32, column % 32 // 4
            bit = i
        rows = [64 * t + 4 * r + e for r in range(16)]
        bits[:, :, column] = block[:, rows] >> bit & 1
    return bits.reshape(-1, 64)
