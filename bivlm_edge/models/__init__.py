"""Checkpoints as `transformers` modules with the few facts that quantizer and exporter need."""

from bivlm_edge.models.vlm import BlockSequence, VisionLanguageModel, load_checkpoint

__all__ = ["BlockSequence", "VisionLanguageModel", "load_checkpoint"]
