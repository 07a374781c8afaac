"""The directions of DESIGN.md 2: what may import what, and what a device must not need."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = {
    "errors",
    "config",
    "bundle",
    "datasets",
    "files",
    "memory",
    "package_files",
    "pictures",
    "positions",
    "pruning",
    "report",
    "scenes",
    "texts",
    "_ops_library",
    "__version__",
}
# Between calibration and synthetic, never in runtime: about torch and what results depend on.
TORCH_SHARED = {"distributed", "provenance"}
# Each part may import the parts to its left, itself and the shared modules.
ORDER = ["models", "calibration", "quant", "tuning", "export", "synthetic"]
FOLDERS = {
    "models": ROOT / "bivlm_edge/models",
    "calibration": ROOT / "bivlm_edge/calibration",
    "quant": ROOT / "bivlm_edge/quant",
    "tuning": ROOT / "bivlm_edge/tuning",
    "export": ROOT / "export",
    "synthetic": ROOT / "bivlm_edge/synthetic",
    "runtime": ROOT / "runtime",
}
DEVICE_PACKAGES = {"numpy", "onnxruntime", "tokenizers", "PIL", "jinja2", "typer", "rich"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_of(names: set[str]) -> set[str]:
    """Second components of the names in bivlm_edge: the parts that they belong to."""
    return {name.split(".")[1] for name in names if name.startswith("bivlm_edge.")}


@pytest.mark.parametrize("part", ORDER)
def test_a_part_imports_only_from_its_left(part: str) -> None:
    # quant uses calibration's walk and calibration nothing of quant: one way
    allowed = {*ORDER[: ORDER.index(part) + 1], *SHARED, *TORCH_SHARED, "custom_ops_library"}
    for path in FOLDERS[part].rglob("*.py"):
        assert parts_of(imported(path)) <= allowed, path


def test_runtime_needs_only_what_a_device_has() -> None:
    for path in FOLDERS["runtime"].glob("*.py"):
        names = imported(path)
        assert parts_of(names) <= {"runtime", *SHARED, "custom_ops_library"}, path
        foreign = {name.split(".")[0] for name in names} & {"torch", "transformers", "onnx"}
        assert not foreign, path


def test_quant_knows_neither_onnx_nor_transformers() -> None:
    for path in FOLDERS["quant"].rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"onnx", "onnx_ir", "onnxruntime", "transformers"}, path


def test_kernels_know_no_onnx_runtime() -> None:
    for path in (ROOT / "custom_ops/src/cpu").rglob("*.cc"):
        assert "ort_abi.h" not in path.read_text(encoding="utf-8"), path


def test_the_device_list_of_packages_is_the_runtime_extra() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "runtime/requirements.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert listed == project["optional-dependencies"]["runtime"]
    assert set(listed) <= set(project["dependencies"])
