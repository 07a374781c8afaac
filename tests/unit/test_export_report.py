"""The account of an export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.calibration.vlmq import ModalityWeights
from bivlm_edge.config import ExportConfig
from bivlm_edge.export.export_report import Account, build_report
from bivlm_edge.export.sizes import LayerSize
from bivlm_edge.quant.quantizer import LayerReport, QuantizedModel


def test_layers_weighed_by_vlmq_have_mean_weights_of_text_and_image_tokens(tmp_path: Path) -> None:
    staged = BundlePaths(tmp_path / "m.onnx")
    staged.graph.write_bytes(b"graph")
    staged.data.write_bytes(b"data")
    names = ("q_proj", "down_proj")
    quantized = QuantizedModel(
        reports=[
            LayerReport(name, 16, 64, "gptq", None, 0, 4.5, 4.5, 0.1, False) for name in names
        ],
        modalities={"q_proj": ModalityWeights(0.25, 1.75)},
    )
    sizes = [LayerSize(name, name, "MatMulNBits", 16, 64, 576) for name in names]
    vlm: Any = SimpleNamespace(name="toy", family=SimpleNamespace(name="toy", pictures="one"))
    report = build_report(vlm, quantized, Account(sizes, {}), [], staged, ExportConfig(), 1024)
    q_proj, down_proj = report["layers"]
    assert q_proj["token_weights"] == {"text": 0.25, "vision": 1.75}
    assert "token_weights" not in down_proj
