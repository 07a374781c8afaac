"""How much an image token matters: the scores that pruning goes by.

One definition each, traced into the exported graph and run by its validation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distance(features: Tensor) -> Tensor:
    """Euclidean distance of each token from its picture's mean token.

    A token that looks like the rest of its picture (background) scores low.

    Args:
        features: float ``(images, tokens, hidden)``.

    Returns:
        float32 ``(images, tokens)``.
    """
    wide = features.float()
    scores: Tensor = torch.linalg.vector_norm(wide - wide.mean(dim=1, keepdim=True), dim=-1)
    return scores


def norm(features: Tensor) -> Tensor:
    """Euclidean norm of each token; shapes as in `distance`."""
    scores: Tensor = torch.linalg.vector_norm(features.float(), dim=-1)
    return scores


def attention_received(query: Tensor, key: Tensor, scale: float, *, class_token: bool) -> Tensor:
    """Attention that each patch receives, mean over heads.

    Args:
        query: float ``(images, heads, patches, width)``.
        key: Likewise.
        scale: Factor on the products.
        class_token: Only the first patch's attention counts (what a class token looks at:
            FasterVLM, arXiv 2412.01818); otherwise the mean over all patches' attention.

    Returns:
        float32 ``(images, patches)``; the sum over a picture is 1.
    """
    if class_token:
        logits = query[:, :, :1].float() @ key.float().transpose(-1, -2) * scale
        return logits.softmax(-1)[:, :, 0].mean(1)
    # head by head: one matrix of patches x patches at a time
    received = [
        (query[:, head].float() @ key[:, head].float().transpose(-1, -2) * scale)
        .softmax(-1)
        .mean(-2)
        for head in range(query.shape[1])
    ]
    return torch.stack(received).mean(0)


def last_token_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that each token receives from the last one, mean over heads (FastV: 2403.06764).

    Args:
        query: float32 ``(B, heads, 1, width)``, of the last token, rotated.
        key: float32 ``(B, kv_heads, S, width)``, rotated; keys of earlier runs do not count.
        scale: Factor on the products.

    Returns:
        float32 ``(B, S)``; the sum over a row is 1.
    """
    groups = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    logits = groups @ key.transpose(-1, -2) * scale
    received: Tensor = logits.softmax(-1).mean((1, 2))
    return received


def tokens_for_mass(scores: Tensor, share: float) -> Tensor:
    """Count the largest scores of each picture that together reach a share of their sum.

    Args:
        scores: float ``(images, tokens)``; what is below 0 counts as 0.
        share: Between 0 and 1.

    Returns:
        int64 ``(images,)``, at least 1.
    """
    falling = scores.double().clamp_min(0).sort(dim=1, descending=True).values
    running = falling.cumsum(1)
    return 1 + (running[:, :-1] < share * running[:, -1:]).long().sum(1)


def text_relevance(embeddings: Tensor, is_image: Tensor) -> Tensor:
    """Cosine between each token and the question, mean over the question's tokens.

    The question is the text behind the row's last image token; without any all scores are 0.

    Args:
        embeddings: float ``(B, S, hidden)``, image features in place of their placeholders.
        is_image: bool ``(B, S)``.

    Returns:
        float32 ``(B, S)``; only those of image tokens mean anything.
    """
    wide = embeddings.float()
    unit = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    count = is_image.long()
    images_behind = count.sum(1, keepdim=True) - count.cumsum(1)
    is_question = ((images_behind + count) == 0).float()[..., None]
    question = (unit * is_question).sum(1, keepdim=True) / is_question.sum(1, keepdim=True).clamp(1)
    scores: Tensor = (unit * question).sum(-1)
    return scores
