"""The traced parts of the graph before the decoder, and the modules that stand in for its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bivlm_edge.config import PICTURE_SCORES, PruneConfig
from bivlm_edge.export import attention, torch_ops
from bivlm_edge.export.decoder_parts import kv_geometry
from bivlm_edge.export.tracing import trace
from bivlm_edge.models import VisionLanguageModel, saliency
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.weights import GroupWeight, QuantizedWeight


class VisionPart(nn.Module):
    """pixel_values ``(images, 3, H, W)`` to features ``(images, tokens, hidden)`` and scores."""

    def __init__(self, vlm: VisionLanguageModel, prune: PruneConfig) -> None:
        super().__init__()
        self.module = vlm.module
        self._vlm = [vlm]  # in a list: not a submodule
        self._score = prune.scores if prune.is_active else "none"
        self._layer = prune.score_layer

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return features and, if the pictures alone give them, scores ``(images, tokens)``."""
        features, scores = self._vlm[0].scored_features(pixel_values, self._score, self._layer)
        return (features,) if scores is None else (features, scores)


class TextScorePart(nn.Module):
    """Merged embeddings ``(B, S, hidden)`` and where pictures are to scores ``(B, S)``."""

    def forward(self, embeddings: Tensor, is_image: Tensor) -> Tensor:
        """Return the scores of all tokens."""
        return saliency.text_relevance(embeddings, is_image)


class RulePart(nn.Module):
    """Scores ``(images, tokens)`` to the number of tokens that each picture needs."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def forward(self, scores: Tensor) -> Tensor:
        """Return int64 ``(images,)``."""
        return saliency.tokens_for_mass(scores, self._share)


@contextmanager
def installed(
    vlm: VisionLanguageModel, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype
) -> Iterator[None]:
    """Inside the block, modules of the model trace to operator nodes: quantized layers, attention.

    Layers whose weight has no operator (`DenseWeight`) stay linear layers; their float weights
    already hold the quantized values. What is traced refers to these modules: write it before
    the block ends. Afterwards the model is the float32 one again.

    Args:
        vlm: Changed in the block.
        weights: Dotted name -> quantized weight.
        dtype: Type of all other parameters and of the activations inside the block (rotary
            frequencies stay float32).
    """
    module = vlm.module
    head = module.get_output_embeddings()
    linears: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in weights}
    for name, weight in weights.items():
        bias = None if linears[name].bias is None else linears[name].bias.detach()
        if isinstance(weight, BinaryWeight):
            module.set_submodule(name, torch_ops.BinaryLinear(weight, bias))
        elif isinstance(weight, GroupWeight):
            kind = torch_ops.GroupHead if linears[name] is head else torch_ops.GroupLinear
            module.set_submodule(name, kind(weight, bias))
    floats = {
        tensor: tensor.data for tensor in module.parameters() if tensor.dtype == torch.float32
    }
    replaced = _replace_modules(vlm)
    try:
        for tensor, data in floats.items():
            tensor.data = data.to(dtype)
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)
        for tensor, data in floats.items():
            tensor.data = data
        for name, linear in linears.items():
            module.set_submodule(name, linear)


def _replace_modules(vlm: VisionLanguageModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put the modules of attention.py in; return (owner, name, original) of each replaced one.

    Raises:
        UnsupportedModelError: The decoder's rotary embedding has no form in the graph.
    """
    decoder: Any = vlm.decoder
    attention.check_rotary(decoder.rotary_emb, kv_geometry(vlm)[2])
    new: list[tuple[nn.Module, str, nn.Module]] = []
    for layer in decoder.layers:
        new.append((layer, "self_attn", attention.GroupedAttention(layer.self_attn)))
        new += [
            (layer, name, attention.ResidualNorm(getattr(layer, name)))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        if attention.GatedMlp.fits(layer.mlp):
            new.append((layer, "mlp", attention.GatedMlp(layer.mlp)))
    new.append((decoder, "norm", attention.ResidualNorm(decoder.norm)))
    towers = (layers for part, layers in vlm.family.blocks(vlm.module) if part == "vision")
    for layer in (layer for layers in towers for layer in layers):
        module: Any = getattr(layer, "self_attn", None)
        if attention.FullAttention.fits(module):
            new.append((layer, "self_attn", attention.FullAttention(module)))
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
    for owner, name, module in new:
        setattr(owner, name, module)
    return replaced


def trace_vision(
    vlm: VisionLanguageModel, prune: PruneConfig, dtype: torch.dtype, opset: int
) -> ir.Model:
    """Trace vision tower, projector and scores; inputs and outputs as in VisionPart."""
    pixels = torch.rand(2, *vlm.pixel_shape).to(dtype)
    outputs = ["features"]
    if prune.is_active and prune.scores in PICTURE_SCORES:
        outputs.append("scores")
    return trace(
        VisionPart(vlm, prune).eval(),
        (pixels,),
        {"pixel_values": {0: torch.export.Dim("images", min=1)}},
        ["pixel_values"],
        outputs,
        opset,
        "vision tower",
    )


def trace_text_scores(vlm: VisionLanguageModel, dtype: torch.dtype, opset: int) -> ir.Model:
    """Trace TextScorePart; its inputs are `embeddings` and `is_image`, its output `scores`."""
    is_image = torch.tensor([[False, True, True, False], [True, True, False, False]])
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    return trace(
        TextScorePart(),
        (torch.rand(*is_image.shape, vlm.text_config.hidden_size, dtype=dtype), is_image),
        {"embeddings": shape, "is_image": shape},
        ["embeddings", "is_image"],
        ["scores"],
        opset,
        "scores",
    )


def trace_rule(vlm: VisionLanguageModel, share: float, opset: int) -> ir.Model:
    """Trace RulePart; its input is `scores`, its output `counts`."""
    return trace(
        RulePart(share),
        (torch.rand(2, vlm.image_tokens),),
        {"scores": {0: torch.export.Dim("images", min=1)}},
        ["scores"],
        ["counts"],
        opset,
        "rule",
    )
