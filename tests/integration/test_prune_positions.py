"""Positions of the tokens that pruning keeps: their own, or without gaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_checkpoints import save_checkpoint  # type: ignore[import-not-found]

from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import load_checkpoint
from bivlm_edge.positions import without_gaps
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.runtime.kv_cache import KvCache


@pytest.mark.parametrize(
    ("architecture", "ratio"),
    # of Qwen's 16 x 16 tokens two, in rows 4 and 12: what follows moves up by three
    [("llava, CLIP and Llama", 0.25), ("qwen2.5-vl", 2 / 256)],
)
def test_contiguous_positions_differ_and_agree_with_torch(
    architecture: str, ratio: float, pictures: list[VqaItem], tmp_path: Path
) -> None:
    """The export compares prefill and decoding with torch; a graph that renumbered would fail."""
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    logits, positions = {}, {}
    for mode in ("keep", "contiguous"):
        prune = PruneConfig(mode="uniform", keep_ratio=ratio, positions=mode)  # type: ignore[arg-type]
        config = ExportConfig(QuantConfig(method="none"), prune)
        result = export_model(vlm, pictures[:2], tmp_path / f"{mode}.onnx", config)
        session = load(result.paths.graph, threads=1)
        assert session.manifest.contiguous == (mode == "contiguous")
        answerer = Answerer(session)
        picture = answerer.picture(pictures[0].image.open())
        ids = answerer.prompts.encode("what is 1", picture)
        cache = KvCache(session, len(ids) + 2)
        step = run_step(session, ids, cache, picture.pixels)
        rows, following = vlm.positions(ids.tolist())
        if mode == "contiguous":
            _, following = without_gaps(rows.numpy(), step.kept)
            assert architecture == "qwen2.5-vl" or following == len(step.kept)
        assert cache.position == following
        positions[mode] = following
        logits[mode] = run_step(session, np.array([5]), cache).logits
    assert positions["contiguous"] < positions["keep"]
    spread = np.abs(logits["keep"]).max()
    assert np.abs(logits["keep"] - logits["contiguous"]).max() > 1e-3 * spread


def test_contiguous_positions_need_pruning() -> None:
    with pytest.raises(RequestError, match="--positions contiguous changes nothing without"):
        PruneConfig(positions="contiguous")
    with pytest.raises(RequestError, match="--positions 'moved' is not known"):
        PruneConfig(positions="moved")  # type: ignore[arg-type]
