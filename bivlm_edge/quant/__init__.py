"""Quantizers and the packed weight format (FORMAT.md)."""
