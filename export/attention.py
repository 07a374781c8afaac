"""Modules that stand in for attention and the decoder's norms and MLPs while a model is traced.

They compute what the modules of `transformers` compute, in ONNX Runtime's operators
(transformer_ops.py). `validate` compares the exported graph with the modules that they replace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from bivlm_edge.errors import UnsupportedModelError

_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotations of the tokens of one run, shared by all layers.

    They are computed for the positions of the run: a table of all positions would put up to 6 %
    more bytes into the file (Qwen2.5-VL-3B: 128,000 positions), and tokens that pruning kept have
    positions with gaps.

    Attributes:
        cos: ``(B, S, head_dim / 2)`` in the type of the activations.
        sin: Likewise.
    """

    cos: Tensor
    sin: Tensor


def rotary(module: Any, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Return the rotations of tokens at `positions`, as a decoder's `rotary_emb` makes them.

    Args:
        module: The decoder's `rotary_emb`.
        positions: int64 ``(B, S)``, or ``(3, B, S)`` where sections of the frequencies follow
            time, rows and columns (M-RoPE).
        dtype: Type of the result; the angles are float32.
    """
    sections = getattr(module, "mrope_section", None)
    frequencies = module.inv_freq.float()
    if sections is None:
        angles = positions[..., None].float() * frequencies
    else:
        angles = torch.cat(
            [
                positions[index % 3][..., None].float() * section
                for index, section in enumerate(frequencies.split(sections))
            ],
            dim=-1,
        )
    cos, sin = angles.cos(), angles.sin()
    if module.attention_scaling != 1:
        cos, sin = cos * module.attention_scaling, sin * module.attention_scaling
    return Rotary(cos.to(dtype), sin.to(dtype))


def check_rotary(module: Any, head_dim: int) -> None:
    """Refuse rotations that depend on more than a token's position.

    Raises:
        UnsupportedModelError: The frequencies follow the length of the prompt, or turn only a part
            of each head.
    """
    if module.rope_type not in _STATIC_ROTARY:
        raise UnsupportedModelError(
            f"the decoder's rotary embedding is of the type '{module.rope_type}', whose "
            "frequencies follow the length of the prompt. "
            f"Supported: {', '.join(_STATIC_ROTARY)} (rope_parameters in config.json)."
        )
    if 2 * module.inv_freq.shape[0] != head_dim:
        raise UnsupportedModelError(
            f"the decoder's rotary embedding turns {2 * module.inv_freq.shape[0]} of the "
            f"{head_dim} channels of a head; only all of them are supported."
        )


class GroupedAttention(nn.Module):
    """Causal self-attention of grouped heads behind a KV cache."""

    def __init__(self, attention: Any) -> None:
        """Take over the projections of a Llama, Mistral, Qwen2 or Qwen2.5-VL attention."""
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.num_heads = int(attention.config.num_attention_heads)
        self.scale = float(attention.scaling)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotary,
        past: tuple[Tensor, Tensor],
        last_index: Tensor,
        total_length: Tensor,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output ``(B, S, hidden)`` and the present keys and values.

        Args:
            hidden: ``(B, S, hidden)``.
            rotation: Of these tokens.
            past: Keys and values, each ``(B, kv_heads, P, head_dim)``.
            last_index: As in `transformer_ops.group_query_attention`.
            total_length: Likewise.
            last_only: Return the output of the last token alone, ``(B, 1, hidden)``.
        """
        qkv = torch.cat(
            [project(hidden) for project in (self.q_proj, self.k_proj, self.v_proj)], -1
        )
        output, present_key, present_value = torch.ops.bivlm.group_query_attention(
            qkv,
            rotation.cos,
            rotation.sin,
            *past,
            last_index,
            total_length,
            self.num_heads,
            self.scale,
        )
        if last_only:
            output = output[:, -1:]
        return self.o_proj(output), present_key, present_value


class FullAttention(nn.Module):
    """Self-attention of a vision tower: every patch attends to all patches of its picture."""

    def __init__(self, attention: Any) -> None:
        """Take over the projections of a `CLIPAttention`, `SiglipAttention` or their like."""
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj
        self.num_heads = int(attention.num_heads)
        self.scale = float(attention.scale)

    @staticmethod
    def fits(attention: Any) -> bool:
        """Whether a module has the parts that this one takes over."""
        parts = ("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", "scale")
        return all(hasattr(attention, part) for part in parts)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return the output ``(images, patches, hidden)``, and no attention weights.

        Masks are ignored: the supported towers mask nothing in a picture that fills its frame.
        """
        query, key, value = (
            project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = torch.ops.bivlm.multi_head_attention(query, key, value, self.num_heads, self.scale)
        return self.out_proj(output), None


class GatedMlp(nn.Module):
    """A gated MLP whose two halves are computed side by side."""

    def __init__(self, mlp: Any) -> None:
        """Take over the projections of a `LlamaMLP` or its like."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    @staticmethod
    def fits(mlp: Any) -> bool:
        """Whether a module has the parts that this one takes over, and SiLU between them."""
        has_parts = all(hasattr(mlp, part) for part in ("gate_proj", "up_proj", "down_proj"))
        return has_parts and isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``(B, S, hidden)``."""
        gate_up = torch.cat([self.gate_proj(hidden), self.up_proj(hidden)], -1)
        output: Tensor = self.down_proj(torch.ops.bivlm.gated_silu(gate_up))
        return output


class ResidualNorm(nn.Module):
    """Root mean square norm that adds the last layer's output to the residual first."""

    def __init__(self, norm: Any) -> None:
        """Take over the weight of a `LlamaRMSNorm` or its like."""
        super().__init__()
        self.weight = norm.weight
        self.epsilon = float(norm.variance_epsilon)

    def forward(self, update: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of update + residual and the sum itself, each ``(B, S, hidden)``.

        Without an update the residual is normed: as the sum of itself with itself, which is exact
        with four times the epsilon, and one node in every opset.
        """
        if update is None:
            normed, _ = torch.ops.bivlm.skip_rms_norm(
                residual, residual, self.weight, 4 * self.epsilon
            )
            return normed, residual
        normed, total = torch.ops.bivlm.skip_rms_norm(update, residual, self.weight, self.epsilon)
        return normed, total
