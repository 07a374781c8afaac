"""The account of an export: bits, bytes and error of every layer, and how it was validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.config import ExportConfig
from bivlm_edge.errors import ValidationError
from bivlm_edge.export import sizes
from bivlm_edge.export.validate import Comparison
from bivlm_edge.models import VisionLanguageModel
from bivlm_edge.quant.quantizer import QuantizedModel


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes of the graph's tensors, counted before they are written.

    Attributes:
        layers: Layers with constant weights.
        tables: What else there is -> bytes.
    """

    layers: list[sizes.LayerSize]
    tables: dict[str, int]


def build_report(
    vlm: VisionLanguageModel,
    quantized: QuantizedModel,
    account: Account,
    comparisons: Sequence[Comparison],
    staged: BundlePaths,
    config: ExportConfig,
    parameters: int,
) -> dict[str, Any]:
    """Return the content of export_report.json.

    With importance `vlmq` the layers it weighs have `token_weights`, the mean weights of text and
    image tokens; layers that an earlier run left in the work folder have none.

    Args:
        vlm: The model.
        quantized: Its quantized layers.
        account: Bytes of the graph.
        comparisons: How the file compares with torch.
        staged: The written files.
        config: How they were made.
        parameters: Of the checkpoint, see `count_parameters`.

    Raises:
        ValidationError: A quantized layer is not in the graph.
    """
    described = {report.name: report for report in quantized.reports}
    lost = set(described) - {size.name for size in account.layers}
    if lost:
        raise ValidationError(
            f"{len(lost)} quantized layers do not appear in the graph, the first is "
            f"{min(lost)}. No file was written; please report this model."
        )
    layers = []
    for size in account.layers:
        entry: dict[str, Any] = {
            "name": size.name,
            "node": size.node,
            "op": size.op,
            "n": size.n,
            "k": size.k,
            "bytes": size.bytes,
            "true_bits": round(size.true_bits, 4),
        }
        if size.name in described:
            layer = described[size.name]
            entry |= {
                "method": layer.method,
                "planes": None if layer.planes is None else list(layer.planes),
                "hadamard_block": layer.hadamard_block,
                "claimed_bits": round(layer.claimed_bits, 4),
                "output_error": _rounded(layer.output_error),
            }
            if size.name in quantized.modalities:
                found = quantized.modalities[size.name]
                entry["token_weights"] = {
                    "text": _rounded(found.text),
                    "vision": _rounded(found.vision),
                }
            if size.op == "MatMul":  # DenseWeight: exported as float, for checking only
                entry["true_bits"] = round(layer.true_bits, 4)
                entry["op"] = "MatMul (dense stand-in)"
        layers.append(entry)
    binary = [size for size in account.layers if size.op == "BinaryMatMul"]
    linear = [size for size in account.layers if size.name in described]
    is_stand_in = any(size.op == "MatMul" for size in linear)
    file_bytes = {
        "graph": staged.graph.stat().st_size,
        "data": staged.data.stat().st_size,
    }
    return {
        "model": vlm.name,
        "family": vlm.family.name,
        "pictures": vlm.family.pictures,
        "config": config.to_json(),
        "true_bits_per_weight": _rounded(sizes.true_bits(binary)),
        "true_bits_all_linear": None if is_stand_in else _rounded(sizes.true_bits(linear)),
        "file_bits_per_parameter": round(8 * sum(file_bytes.values()) / parameters, 4),
        "layers": layers,
        "skipped": quantized.skipped,
        "tables": [{"what": what, "bytes": size} for what, size in account.tables.items()],
        "file_bytes": file_bytes,
        "validation": [asdict(comparison) for comparison in comparisons],
    }


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a checkpoint, tied ones counted once."""
    return sum(tensor.numel() for tensor in module.parameters())


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
