"""Token table and head of an export: stored once where they are tied, as small as asked for."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from random_checkpoints import VOCABULARY, save_checkpoint  # type: ignore[import-not-found]

from bivlm_edge.config import VOCABULARY_BITS, ExportConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import load_checkpoint

WIDTH = 64


@pytest.mark.parametrize("bits", VOCABULARY_BITS)
def test_tied_vocabulary_is_stored_once(bits: int, pictures: list[VqaItem], tmp_path: Path) -> None:
    vlm = load_checkpoint(save_checkpoint("llava-onevision", tmp_path / "checkpoint"))
    config = ExportConfig(QuantConfig(method="nbits4", vocabulary_bits=bits))
    result = export_model(vlm, pictures, tmp_path / "model.onnx", config)
    model = onnx.load(str(result.paths.graph), load_external_data=False)
    places = {
        tensor.name: {
            entry.key: int(entry.value)
            for entry in tensor.external_data
            if entry.key in ("offset", "length")
        }
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    (head,) = (name for name in places if "lm_head" in name and name.endswith("codes"))
    assert places["embedding/codes"] == places[head]
    assert places["embedding/codes"]["length"] == VOCABULARY * WIDTH * bits // 8
    (node,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    assert [a.i for a in node.attribute if a.name == "bits"] == [bits]
    (head_node,) = (node for node in model.graph.node if node.op_type == "GroupMatMul")
    assert [a.i for a in head_node.attribute if a.name == "bits"] == [bits]
    notes = [why for why in result.report["skipped"].values() if "vocabulary" in why]
    assert notes == [f"vocabulary: {bits} bits, counted apart (tables)"] * 2
