"""One export of the reference model for all tests that need a real one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import ImageSource, VqaItem, load_easy_vqa
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import load_checkpoint
from bivlm_edge.reference import checkpoint_path

# `random_checkpoints` is imported by name: --import-mode=importlib leaves this folder off the path
sys.path.insert(0, str(Path(__file__).parent))

SAMPLES = 96


def export_reference(folder: Path, config: ExportConfig) -> BundlePaths:
    """Export the reference model, calibrated on few pictures to save time."""
    vlm = load_checkpoint(checkpoint_path())
    return export_model(vlm, load_easy_vqa("train"), folder / "model.onnx", config).paths


@pytest.fixture(scope="session")
def two_bit_export(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    """The default export: bivlm-edge at 2.0 bits."""
    config = ExportConfig(QuantConfig(calibration_samples=SAMPLES))
    return export_reference(tmp_path_factory.mktemp("two_bit"), config)


@pytest.fixture(scope="session")
def pruned_export(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    """A cheap export with a quarter of the image tokens."""
    config = ExportConfig(QuantConfig(method="rtn", bits=8.0), PruneConfig(keep_ratio=0.25))
    return export_reference(tmp_path_factory.mktemp("pruned"), config)


@pytest.fixture(scope="session")
def float_export(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    """The float export that comparisons need."""
    config = ExportConfig(QuantConfig(method="none"))
    return export_reference(tmp_path_factory.mktemp("float"), config)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[VqaItem]:
    """Twelve pictures of noise in odd sizes, with questions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    items = []
    for index in range(12):
        path = folder / f"{index}.png"
        noise = rng.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        items.append(VqaItem(ImageSource(path), f"what is {index % 3}", "it", "other"))
    return items
