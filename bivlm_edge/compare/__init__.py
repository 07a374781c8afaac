"""Quantization methods against each other: run, evaluated in torch, written down as tables."""
