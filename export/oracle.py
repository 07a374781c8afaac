"""The quantized model in torch, pruning included: what an exported graph is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from bivlm_edge.config import ExportConfig
from bivlm_edge.export import attention, decoder_parts, reference_prune
from bivlm_edge.models import VisionLanguageModel, layer_pruning, saliency, tower_pruning
from bivlm_edge.positions import without_gaps
from bivlm_edge.pruning import tokens_to_keep


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its picture.

    Attributes:
        input_ids: int64 ``(1, S)``.
        pixel_values: float32 ``(1, 3, H, W)``.
        position_ids: int64 ``(1, S)``, or ``(3, 1, S)`` (M-RoPE).
        next_position: Of the first token of the answer.
    """

    input_ids: Tensor
    pixel_values: Tensor
    position_ids: Tensor
    next_position: int

    def placed(self, kept: NDArray[np.int64], *, contiguous: bool) -> tuple[Tensor, Tensor]:
        """Return the positions of kept tokens and of the answer's first one.

        Args:
            kept: Indices of the tokens that reach the decoder.
            contiguous: Whether the gaps of dropped tokens are closed.
        """
        following = self.next_position
        rows = self.position_ids[..., torch.from_numpy(kept)]
        if contiguous:
            closed, following = without_gaps(self.position_ids.numpy(), kept)
            rows = torch.from_numpy(closed)
        return rows, torch.full_like(self.position_ids[..., :1], following)


class TorchOracle:
    """The quantized model in torch, pruning included: prefill and greedy decoding."""

    def __init__(self, vlm: VisionLanguageModel, config: ExportConfig) -> None:
        self._vlm = vlm
        self._prune = config.prune
        self._contiguous = config.prune.positions == "contiguous"

    @torch.no_grad()
    def kept(self, sample: Sample) -> NDArray[np.int64]:
        """Return the positions that pruning keeps."""
        if not self._prune.is_active:
            return np.arange(sample.input_ids.shape[1])
        if self._prune.vision_layer is not None:
            return self._kept_in_tower(sample)
        merged, is_image, scores = self._merge(sample)
        if self._prune.layer > 0:
            merged, received = self._inside(merged, sample.position_ids)
            scores = received if self._prune.scores == "last-token" else scores
        before = is_image.cumsum(1) - 1
        image = before // self._vlm.image_tokens
        metric = None
        if self._prune.spreads:
            metric = self._vlm.place_features()[(before % self._vlm.image_tokens).numpy()]
        indices = reference_prune.token_prune(
            merged.numpy(),
            scores=None if scores is None else scores.numpy(),
            segments=torch.where(is_image, image, -1).int().numpy(),
            keep=self._keep(is_image, scores),
            metric=metric,
            mode=self._prune.mode,
            theta=self._prune.weight,
            seed=self._prune.seed,
        ).kept_indices
        return cast("NDArray[np.int64]", indices[0])

    def uncovered(self, sample: Sample, kept: NDArray[np.int64]) -> float:
        """Return how far image tokens are from kept ones, by their places.

        Args:
            sample: Prompt and pictures.
            kept: Positions that reach the decoder.

        Returns:
            The mean, over image tokens, of 1 - cosine to the nearest kept token of their picture
            (`places.features`): 0 if all are kept, 1 if none is.
        """
        is_image = (sample.input_ids == self._vlm.image_token_id)[0].numpy()
        places = self._vlm.place_features().astype(np.float32)
        places /= np.linalg.norm(places, axis=1, keepdims=True)
        is_kept = np.isin(np.flatnonzero(is_image), kept).reshape(-1, self._vlm.image_tokens)
        nearest = [(places @ places[row].T).max(axis=1, initial=0.0) for row in is_kept]
        return max(0.0, float(1.0 - np.mean(nearest)))

    def _keep(self, is_image: Tensor, scores: Tensor | None) -> NDArray[np.int64]:
        """Return the tokens to keep, one number or of each picture, ``(1, pictures)``."""
        most = tokens_to_keep(self._prune.keep_ratio, self._vlm.image_tokens)
        if self._prune.mass is None:
            return np.array(most)
        assert scores is not None
        of_pictures = scores[is_image].reshape(-1, self._vlm.image_tokens)
        counts = saliency.tokens_for_mass(of_pictures, self._prune.mass)
        return cast("NDArray[np.int64]", counts.clamp_max(most)[None].numpy())

    @torch.no_grad()
    def run(
        self, sample: Sample, kept: NDArray[np.int64], tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """Return the logits of each step, ``(steps, vocab)``: prefill, then given tokens.

        Args:
            sample: Prompt and picture.
            kept: Positions that reach the decoder.
            tokens: One per step; all but the last are fed.
        """
        if self._prune.vision_layer is None:
            hidden = self._merge(sample)[0]
        else:
            hidden = self._merge_left(sample, torch.from_numpy(kept))
        cache = DynamicCache()
        positions, following = sample.placed(kept, contiguous=self._contiguous)
        embed = self._vlm.module.get_input_embeddings()
        logits = []
        for step, token in enumerate(tokens):
            if step > 0 or self._prune.vision_layer is not None:
                found = self._vlm.decode(hidden, positions, cache)
            elif self._prune.layer == 0:
                found = self._vlm.decode(hidden[:, kept], positions, cache)
            else:
                found = layer_pruning.decode_dropping(
                    *(self._vlm, hidden, sample.position_ids, cache),
                    *(self._prune.layer, torch.from_numpy(kept)),
                )
            logits.append(found[0, -1].numpy())
            hidden = embed(torch.tensor([[token]]))
            positions = following + step
        return np.stack(logits)

    def _patches(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        prune = self._prune
        assert prune.vision_layer is not None
        return tower_pruning.patches_inside(
            *(self._vlm, sample.pixel_values, prune.vision_layer),
            *(prune.scores, prune.score_layer),
        )

    def _kept_in_tower(self, sample: Sample) -> NDArray[np.int64]:
        """Return the positions that are left where patches are dropped in the vision tower."""
        patches, scores = self._patches(sample)
        first = tower_pruning.class_tokens(self._vlm)
        metric = None
        if self._prune.spreads:
            metric = np.repeat(self._vlm.place_features()[None], len(patches), 0)
        most = tokens_to_keep(self._prune.keep_ratio, self._vlm.image_tokens)
        tokens = reference_prune.token_prune(
            patches[:, first:].numpy(),
            scores=None if scores is None else scores.numpy(),
            keep=np.array(most),
            metric=metric,
            mode=self._prune.mode,
            theta=self._prune.weight,
            seed=self._prune.seed,
        ).kept_indices
        is_left = np.zeros((len(patches), self._vlm.image_tokens), bool)
        np.put_along_axis(is_left, tokens, True, axis=1)
        stays = (sample.input_ids != self._vlm.image_token_id)[0].numpy()
        stays[~stays] = is_left.reshape(-1)
        return np.flatnonzero(stays)

    def _merge_left(self, sample: Sample, kept: Tensor) -> Tensor:
        """Return embeddings of kept tokens; the others' patches leave inside the vision tower."""
        layer, first = self._prune.vision_layer, tower_pruning.class_tokens(self._vlm)
        assert layer is not None
        patches, _ = self._patches(sample)
        is_image = (sample.input_ids == self._vlm.image_token_id)[0]
        of_pictures = (is_image.cumsum(0) - 1)[kept[is_image[kept]]].reshape(len(patches), -1)
        tokens = of_pictures % self._vlm.image_tokens + first
        classes = torch.arange(first).expand(len(patches), -1)
        rows = torch.cat([classes, tokens], 1)[..., None].expand(-1, -1, patches.shape[-1])
        features = tower_pruning.features_of(self._vlm, patches.gather(1, rows), layer)
        return self._vlm.embed(sample.input_ids[:, kept], features)

    def _inside(self, merged: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual where tokens are dropped, and the attention received before it."""
        layer = self._prune.layer
        before, hidden = layer_pruning.layer_inputs(
            self._vlm, merged, positions, [layer - 1, layer]
        )
        decoder: Any = self._vlm.decoder
        block, config = decoder.layers[layer - 1], self._vlm.text_config
        attended, normed = block.self_attn, block.input_layernorm(before)
        projections = (attended.q_proj, attended.k_proj, attended.v_proj)
        rotation = attention.rotary(decoder.rotary_emb, positions, merged.dtype)
        received = decoder_parts.LastTokenPart(
            int(config.num_attention_heads),
            int(config.num_key_value_heads),
            float(attended.scaling),
        )(
            torch.cat([project(normed) for project in projections], -1),
            rotation.cos,
            rotation.sin,
        )
        return hidden, received

    def _merge(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return embeddings with the picture in them, where it is, and the scores, ``(1, S)``."""
        prune, is_image = self._prune, sample.input_ids == self._vlm.image_token_id
        features, found = self._vlm.scored_features(
            sample.pixel_values, prune.scores if prune.is_active else "none", prune.score_layer
        )
        merged = self._vlm.embed(sample.input_ids, features)
        if found is not None:
            scores = torch.zeros(is_image.shape)
            scores[is_image] = found.reshape(-1)
            return merged, is_image, scores
        if prune.is_active and prune.scores == "text":
            return merged, is_image, saliency.text_relevance(merged, is_image)
        return merged, is_image, None
