"""The keys and values of the tokens so far, as ONNX Runtime returned them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from bivlm_edge.runtime.session import VlmSession


@dataclass(frozen=True, slots=True)
class KvCache:
    """What one run leaves for the next.

    The tensors belong to ONNX Runtime: the outputs of a run are fed as the next run's inputs
    without a copy, and a cache is never written to, so that it can be continued more than once.

    Attributes:
        tensors: Per layer key then value, each `[1, kv_heads, tokens, head_dim]`.
        tokens: Tokens in the cache: those that pruning kept.
        position: Position of the next token: kept tokens keep their original positions, so it
            counts the dropped ones too.
    """

    tensors: tuple[ort.OrtValue, ...]
    tokens: int
    position: int

    @classmethod
    def empty(cls, session: VlmSession) -> KvCache:
        """Return the cache before the first token."""
        manifest = session.manifest
        shape = (1, manifest.kv_heads, 0, manifest.head_dim)
        tensor = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=session.dtype))
        return cls((tensor,) * len(session.past_names), 0, 0)

    @staticmethod
    def bytes_per_token(session: VlmSession) -> int:
        """Return what one token adds, over all layers."""
        manifest = session.manifest
        values = 2 * manifest.layers * manifest.kv_heads * manifest.head_dim
        return values * np.dtype(session.dtype).itemsize
