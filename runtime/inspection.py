"""What an exported model consists of, from its export report.

Bytes and shapes of layers are as the exporter counted them from the written tensors; arithmetic and
file sizes are checked here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivlm_edge.bundle import REPORT, BundlePaths, Manifest, check_files, read_manifest
from bivlm_edge.errors import BundleError, ValidationError

QUANTIZED_OP = "BinaryMatMul"
_STAND_IN = "stand-in"  # baselines are exported as float: their bits are not in the file
_BITS_TOLERANCE = 1e-3  # the report may round to three decimals


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer of the checkpoint.

    Attributes:
        name: Name in the checkpoint.
        node: Name of the graph's operator, which may compute several layers that read the same
            input; None where the report has none.
        op: Operator that computes it.
        n: Output features, from the exporter.
        k: Input features, from the exporter.
        method: Quantizer; None for a layer left in float.
        planes: Columns that each bit plane covers.
        hadamard_block: Size of the input transform, 0 without one.
        bytes: Of all initializers that belong to it, as the exporter counted them. What layers of
            one operator share counts with the first.
        true_bits: bytes * 8 / (n k), computed here.
        reported_bits: The exporter's count. Other than true_bits only for a baseline whose float
            stand-in is in the file: what its method would store.
        output_error: Relative output error on calibration data, from the exporter.
    """

    name: str
    node: str | None
    op: str
    n: int
    k: int
    method: str | None
    planes: list[int] | None
    hadamard_block: int
    bytes: int
    true_bits: float
    reported_bits: float
    output_error: float | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The whole file.

    Attributes:
        manifest: Its manifest.
        layers: Every linear layer.
        skipped: Layers left in float, with the reason.
        tables: Other large initializers, such as the embedding: `what` and `bytes`.
        file_bytes: graph, data, assets and total, measured on the files.
        true_bits_per_weight: Over all BinaryMatMul weights, computed here from the layers' bytes;
            None if there are none.
        true_bits_all_linear: Over all quantized linear layers, from the exporter; None for dense
            stand-ins and where the report has none.
        file_bits_per_parameter: 8 (graph + data) / unique parameters of the checkpoint, from the
            exporter; None where the report has none.
        verified: Whether every byte was compared with the manifest, not only size and probe.
    """

    manifest: Manifest
    layers: list[Layer]
    skipped: dict[str, str]
    tables: list[dict[str, Any]]
    file_bytes: dict[str, int]
    true_bits_per_weight: float | None
    true_bits_all_linear: float | None
    file_bits_per_parameter: float | None
    verified: bool


def inspect_bundle(path: Path | str, *, verify: bool = False) -> Inspection:
    """Read the report of an exported model; check its arithmetic and the sizes of the files.

    Bytes, n and k of a layer are as the exporter counted them from the written tensors.

    Args:
        path: The `model.onnx`.
        verify: Compare the SHA-256 of every byte; else size and a probe.

    Raises:
        BundleError: A part is missing, damaged or of another export.
        ValidationError: The report's bits do not follow from its bytes, or its file sizes are not
            those of the files.
    """
    paths = BundlePaths(Path(path))
    manifest = read_manifest(paths)
    check_files(paths, manifest, whole=verify)
    report_path = paths.assets / REPORT
    try:
        report = json.loads(report_path.read_text(encoding="utf-8"))
        layers = [_layer(row) for row in report["layers"]]
        skipped = {str(name): str(reason) for name, reason in report["skipped"].items()}
        tables = [dict(row, bytes=int(row["bytes"])) for row in report["tables"]]
        claimed_files = {str(role): int(size) for role, size in report["file_bytes"].items()}
        claimed_total = report["true_bits_per_weight"]
        all_linear = _optional_float(report.get("true_bits_all_linear"))
        per_parameter = _optional_float(report.get("file_bits_per_parameter"))
    except FileNotFoundError as error:
        raise BundleError(
            f"'{report_path}' is missing: bivlm-export writes it. Copy the whole folder "
            f"'{paths.assets.name}' next to the .onnx file, or export again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"'{report_path}' is not a report of bivlm-export ({error!r}). Export the model again."
        ) from error
    file_bytes = _file_bytes(paths)
    quantized = [layer for layer in layers if layer.op == QUANTIZED_OP]
    weights = sum(layer.n * layer.k for layer in quantized)
    total_bits = sum(layer.bytes for layer in quantized) * 8 / weights if weights else None
    for layer in layers:
        if _STAND_IN not in layer.op:
            what = f"layer '{layer.name}'"
            _require_bits(report_path, what, layer.reported_bits, layer.true_bits)
    if total_bits is not None:
        _require_bits(report_path, "the whole model", claimed_total, total_bits)
    _require_bytes(report_path, claimed_files, file_bytes, layers)
    return Inspection(
        manifest=manifest,
        layers=layers,
        skipped=skipped,
        tables=tables,
        file_bytes=file_bytes,
        true_bits_per_weight=total_bits,
        true_bits_all_linear=all_linear,
        file_bits_per_parameter=per_parameter,
        verified=verify,
    )


def _layer(row: Mapping[str, Any]) -> Layer:
    n, k, size = int(row["n"]), int(row["k"]), int(row["bytes"])
    return Layer(
        name=str(row["name"]),
        node=row.get("node"),
        op=str(row["op"]),
        n=n,
        k=k,
        method=row.get("method"),
        planes=row.get("planes"),
        hadamard_block=int(row.get("hadamard_block") or 0),
        bytes=size,
        true_bits=size * 8 / (n * k),
        reported_bits=float(row["true_bits"]),
        output_error=_optional_float(row.get("output_error")),
    )


def _optional_float(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _file_bytes(paths: BundlePaths) -> dict[str, int]:
    graph = paths.graph.stat().st_size
    data = paths.data.stat().st_size if paths.data.is_file() else 0
    assets = sum(file.stat().st_size for file in paths.assets.rglob("*") if file.is_file())
    return {"graph": graph, "data": data, "assets": assets, "total": graph + data + assets}


def _require_bits(report: Path, what: str, claimed: object, counted: float) -> None:
    if not isinstance(claimed, int | float) or abs(claimed - counted) > _BITS_TOLERANCE:
        raise ValidationError(
            f"'{report}' claims {claimed} true bits per weight for {what}; its bytes make "
            f"{counted:.4f}. The report was changed or the exporter is wrong: export again."
        )


def _require_bytes(
    report: Path, claimed: Mapping[str, int], counted: Mapping[str, int], layers: list[Layer]
) -> None:
    for role in ("graph", "data"):
        if claimed.get(role) != counted[role]:
            raise ValidationError(
                f"'{report}' claims {claimed.get(role)} bytes of {role}; the file has "
                f"{counted[role]}. Copy all parts of one export together, or export again."
            )
    needed = sum(layer.bytes for layer in layers)
    if needed > counted["graph"] + counted["data"]:
        raise ValidationError(
            f"'{report}' lists {needed} bytes of weights; graph and data hold only "
            f"{counted['graph'] + counted['data']}. Export the model again."
        )
