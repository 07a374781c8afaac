"""The vision tower of a LLaVA in two pieces, between which patches can be dropped."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bivlm_edge.models import families, saliency
from bivlm_edge.models.vlm import VisionLanguageModel


def patches_inside(
    vlm: VisionLanguageModel, pixel_values: Tensor, layer: int, score: str, score_layer: int
) -> tuple[Tensor, Tensor | None]:
    """Run the tower up to a layer, and score what it gives.

    Args:
        vlm: A model that `VisionLanguageModel.check_vision_layer` accepts.
        pixel_values: float ``(images, 3, H, W)``.
        layer: The last layer that runs, from 0.
        score: One of `config.PRUNE_SCORES` but `text` and `last-token`.
        score_layer: `attention`: which of the layers that run, from the last of them if below 0.

    Returns:
        float ``(images, patches, width)``, the class token first where there is one, and float32
        ``(images, image_tokens)``, or None for `none`.
    """
    tower = families.tower(vlm.module)
    hidden = tower.embeddings(pixel_values)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    first = class_tokens(vlm)
    received = None
    for index, block in enumerate(tower.encoder.layers[: layer + 1]):
        if score == "attention" and index == score_layer % (layer + 1):
            received = families.block_attention(block, hidden, class_token=first > 0)
        hidden = block(hidden, None)
    if received is not None:
        return hidden, received[:, first:]
    of_features = {"distance": saliency.distance, "norm": saliency.norm}.get(score)
    return hidden, None if of_features is None else of_features(hidden[:, first:])


def features_of(vlm: VisionLanguageModel, patches: Tensor, layer: int) -> Tensor:
    """Run the rest of the tower and the projector on the patches that are left.

    Args:
        vlm: As in `patches_inside`.
        patches: ``(images, kept, width)``, as `patches_inside` returns them, class token included.
        layer: The last layer that has run.

    Returns:
        float ``(images, kept, hidden)`` without the class token.
    """
    blocks = next(part for name, part in vlm.family.blocks(vlm.module) if name == "vision")
    for block in blocks[layer + 1 :]:
        module: Any = block
        patches = module(patches, None)
    features: Tensor = vlm.module.model.multi_modal_projector(patches[:, class_tokens(vlm) :])
    return features


def class_tokens(vlm: VisionLanguageModel) -> int:
    """Return how many rows before the patches are none."""
    return int(vlm.module.config.vision_config.model_type == "clip_vision_model")
