"""Graphs with the operators `BinaryMatMul` and `TokenPrune` (OPS.md)."""
