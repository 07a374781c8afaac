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
from transformers import DynamicCache

from bivlm_edge.errors import UnsupportedModelError
from bivlm_edge.export import torch_ops
from bivlm_edge.models import VisionLanguageModel
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.weights import GroupWeight, QuantizedWeight


class VisionPart(nn.Module):
    """pixel_values ``(images, 3, H, W)`` to features ``(images, tokens, hidden)`` and scores."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        self.module = vlm.module
        self._vlm = [vlm]  # in a list: not a submodule

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and their importance ``(images, tokens)``."""
        features = self._vlm[0].image_features(pixel_values)
        return features, token_scores(features)


def token_scores(features: Tensor) -> Tensor:
    """Importance of image tokens: Euclidean distance from the picture's mean token.

    Text-agnostic and free of attention weights: a token that looks like the rest of its picture
    (background) scores low.

    Args:
        features: float ``(images, tokens, hidden)``.

    Returns:
        float32 ``(images, tokens)``.
    """
    wide = features.float()
    mean = wide.mean(dim=1, keepdim=True)
    scores: Tensor = torch.linalg.vector_norm(wide - mean, dim=-1)
    return scores


class DecoderPart(nn.Module):
    """Embeddings ``(B, S, hidden)`` to logits of the last position and the grown KV cache."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        self.module = vlm.module
        self._vlm = [vlm]  # in a list: not a submodule

    def forward(
        self, hidden: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits ``(B, 1, vocab)`` and present key, value of every layer.

        Args:
            hidden: ``(B, S, hidden)``.
            position_ids: int64 ``(B, S)``.
            past: key, value of every layer in turn, each ``(B, kv_heads, P, head_dim)``.
        """
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        new, seen = hidden.shape[1], past[0].shape[2]
        columns = torch.arange(seen + new, device=hidden.device)
        rows = torch.arange(new, device=hidden.device) + seen
        mask = (columns[None, :] <= rows[:, None])[None, None]
        output = self._vlm[0].decoder(
            inputs_embeds=hidden,
            position_ids=position_ids,
            past_key_values=cache,
            attention_mask=mask,
            use_cache=True,
        )
        logits = self.module.get_output_embeddings()(output.last_hidden_state[:, -1:])
        return logits, [state for layer in cache.layers for state in (layer.keys, layer.values)]


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
    """Inside the block, quantized layers are modules that trace to operator nodes.

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
    try:
        for tensor, data in floats.items():
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in floats.items():
            tensor.data = data
        for name, linear in linears.items():
            module.set_submodule(name, linear)


def trace_vision(vlm: VisionLanguageModel, dtype: torch.dtype, opset: int) -> ir.Model:
    """Trace vision tower, projector and token scores; inputs and outputs named as in VisionPart."""
    pixels = torch.rand(2, *vlm.pixel_shape).to(dtype)
    return _trace(
        VisionPart(vlm).eval(),
        (pixels,),
        {"pixel_values": {0: torch.export.Dim("images", min=1)}},
        ["pixel_values"],
        ["features", "scores"],
        opset,
        "vision tower",
    )


def trace_decoder(vlm: VisionLanguageModel, dtype: torch.dtype, opset: int) -> ir.Model:
    """Trace decoder and head; past and present named `past_key_values.{i}.key` and so on."""
    layers, heads, width = kv_geometry(vlm)
    batch, new, seen = 2, 3, 5
    past = [torch.rand(batch, heads, seen, width, dtype=dtype) for _ in range(2 * layers)]
    hidden = torch.rand(batch, new, vlm.text_config.hidden_size, dtype=dtype)
    positions = torch.arange(seen, seen + new)[None].expand(batch, -1).contiguous()
    batch_dim, new_dim = torch.export.Dim("batch"), torch.export.Dim("new")
    seen_dim = torch.export.Dim("past", min=0)
    shapes = {
        "hidden": {0: batch_dim, 1: new_dim},
        "position_ids": {0: batch_dim, 1: new_dim},
        "past": [{0: batch_dim, 2: seen_dim} for _ in past],
    }
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    return _trace(
        DecoderPart(vlm).eval(),
        (hidden, positions, past),
        shapes,
        ["hidden", "position_ids", *(f"past_key_values.{name}" for name in names)],
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
