"""The traced parts of the graph: vision tower with projector, and decoder with KV cache."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from bivlm_edge.config import PICTURE_SCORES, PruneConfig
from bivlm_edge.errors import UnsupportedModelError
from bivlm_edge.export import attention, torch_ops
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


class DecoderPart(nn.Module):
    """Embeddings ``(B, S, hidden)`` to logits of the last position and the grown KV cache.

    Only inside `installed`: it walks the layers itself, with the modules of attention.py in them.
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        self.module = vlm.module
        self._vlm = [vlm]  # in a list: not a submodule

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
            last_index: int32 ``(B,)``: index of the last token in the cache after this run.
            total_length: int32 ``(1,)``: tokens in the cache after this run.
            past: key, value of every layer in turn, each ``(B, kv_heads, P, head_dim)``.
        """
        decoder: Any = self._vlm[0].decoder
        rotation = attention.rotary(decoder.rotary_emb, position_ids, hidden.dtype)
        present = []
        norms = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
        normed, hidden = decoder.layers[0].input_layernorm(None, hidden)
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, norms, strict=True)):
            states = (past[2 * index], past[2 * index + 1])
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
        return self.module.get_output_embeddings()(normed), present


def kv_geometry(vlm: VisionLanguageModel) -> tuple[int, int, int]:
    """Return (decoder layers, key-value heads, head width)."""
    config = vlm.text_config
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers), int(config.num_key_value_heads), int(head_dim)


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
    linears: dict[str, nn.Linear] = {name: module.get_submodule(name) for name in weights}
    for name, weight in weights.items():
        bias = None if linears[name].bias is None else linears[name].bias.detach()
        if isinstance(weight, BinaryWeight):
            module.set_submodule(name, torch_ops.BinaryLinear(weight, bias))
        elif isinstance(weight, GroupWeight):
            module.set_submodule(name, torch_ops.GroupLinear(weight, bias))
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
    return _trace(
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
    return _trace(
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
    return _trace(
        RulePart(share),
        (torch.rand(2, vlm.image_tokens),),
        {"scores": {0: torch.export.Dim("images", min=1)}},
        ["scores"],
        ["counts"],
        opset,
        "rule",
    )


def trace_decoder(
    vlm: VisionLanguageModel, dtype: torch.dtype, cache_dtype: torch.dtype, opset: int
) -> ir.Model:
    """Trace decoder and head; inputs as in DecoderPart, outputs logits, `present.{i}.key|value`."""
    layers, heads, width = kv_geometry(vlm)
    batch, new, seen = 2, 3, 5
    past = [torch.rand(batch, heads, seen, width).to(cache_dtype) for _ in range(2 * layers)]
    hidden = torch.rand(batch, new, vlm.text_config.hidden_size, dtype=dtype)
    positions = torch.arange(seen, seen + new)[None].expand(batch, -1).contiguous()
    axes = 0
    if vlm.image_grid is not None:
        axes, positions = 1, positions.expand(3, -1, -1).contiguous()
    last_index = torch.full((batch,), seen + new - 1, dtype=torch.int32)
    total_length = torch.tensor([seen + new], dtype=torch.int32)
    batch_dim, new_dim = torch.export.Dim("batch"), torch.export.Dim("new")
    seen_dim = torch.export.Dim("past", min=0)
    shapes = {
        "hidden": {0: batch_dim, 1: new_dim},
        "position_ids": {axes: batch_dim, axes + 1: new_dim},
        "last_index": {0: batch_dim},
        "total_length": {},
        "past": [{0: batch_dim, 2: seen_dim} for _ in past],
    }
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    return _trace(
        DecoderPart(vlm).eval(),
        (hidden, positions, last_index, total_length, past),
        shapes,
        [
            "hidden",
            "position_ids",
            "last_index",
            "total_length",
            *(f"past_key_values.{name}" for name in names),
        ],
        ["logits", *(f"present.{name}" for name in names)],
        opset,
        "decoder",
    )


def _trace(
    part: nn.Module,
    arguments: tuple[Any, ...],
    shapes: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
    opset: int,
    what: str,
) -> ir.Model:
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                part,
                arguments,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table=torch_ops.translation_table(),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"torch cannot trace the {what} of this checkpoint: {first} "
            "Run again with --debug for the full report and file an issue with the model's name."
        ) from error
    if program is None:  # pragma: no cover - only for exports to a file
        raise UnsupportedModelError(f"torch returned no graph for the {what}.")
    optimizer.optimize_ir(program.model, should_fold=_fold_unless_it_grows)
    return program.model


def _fold_unless_it_grows(node: ir.Node) -> bool | None:
    """Leave the Cast of a stored float16 scale to load time: the file holds the small form."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    return False if source is not None and source.is_initializer() else None


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes about itself off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
