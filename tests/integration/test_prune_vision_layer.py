"""Patches dropped inside the vision tower: its rest, the projector and the decoder see fewer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import export_reference
from random_checkpoints import save_checkpoint  # type: ignore[import-not-found]
from transformers import DynamicCache

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem, load_easy_vqa
from bivlm_edge.errors import RequestError, UnsupportedModelError
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import load_checkpoint, tower_pruning
from bivlm_edge.redundancy.analysis import analyse
from bivlm_edge.redundancy.answering import Model
from bivlm_edge.redundancy.plan import Setting
from bivlm_edge.redundancy.questions import gather, spread
from bivlm_edge.reference import checkpoint_path
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.runtime.kv_cache import KvCache

FLOAT = QuantConfig(method="none")
IMAGE_TOKENS = 64
SUPPORTED = ("llava, CLIP and Llama", "llava, SigLIP and Qwen2")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    prune = PruneConfig(keep_ratio=0.25, vision_layer=1)
    return export_reference(tmp_path_factory.mktemp("tower"), ExportConfig(FLOAT, prune))


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_the_tower_in_two_pieces_is_the_tower(architecture: str, tmp_path: Path) -> None:
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    torch.manual_seed(0)
    pixels = torch.randn(2, *vlm.pixel_shape)
    whole = vlm.image_features(pixels)
    blocks = next(len(part) for name, part in vlm.family.blocks(vlm.module) if name == "vision")
    for layer in range(blocks):
        patches, received = tower_pruning.patches_inside(vlm, pixels, layer, "attention", -1)
        torch.testing.assert_close(
            tower_pruning.features_of(vlm, patches, layer), whole, rtol=1e-5, atol=1e-6
        )
        _, scores = vlm.scored_features(pixels, "attention", layer)
        torch.testing.assert_close(received, scores)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (SUPPORTED[0], {"metric": "features", "mode": "maxmin", "positions": "contiguous"}),
        (SUPPORTED[1], {"score": "attention", "score_layer": -1, "mode": "topk_score"}),
        (SUPPORTED[0], {"score": "norm"}),
    ],
)
def test_the_graph_agrees_with_torch(
    architecture: str, options: dict[str, object], pictures: list[VqaItem], tmp_path: Path
) -> None:
    """The export compares kept tokens, prefill and decoding with torch, with and without us."""
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    prune = PruneConfig(keep_ratio=0.3, vision_layer=0, **options)  # type: ignore[arg-type]
    target = tmp_path / "model.onnx"
    result = export_model(vlm, pictures[:2], target, ExportConfig(FLOAT, prune))
    for way in result.report["validation"]:
        assert way["logits_error"] < 1e-5
        assert way["kept_same"] >= 0.98


@pytest.mark.parametrize("custom_ops", [True, False])
def test_all_tokens_give_the_logits_of_the_unpruned_export(
    pruned: BundlePaths, float_export: BundlePaths, pictures: list[VqaItem], custom_ops: bool
) -> None:
    found = []
    for session in (
        load(pruned.graph, threads=1, custom_ops=custom_ops).keeping(IMAGE_TOKENS),
        load(float_export.graph, threads=1, custom_ops=custom_ops),
    ):
        answerer = Answerer(session)
        picture = answerer.picture(pictures[0].image.open())
        ids = answerer.prompts.encode("what is this", picture)
        step = run_step(session, ids, KvCache(session, len(ids)), picture.pixels)
        np.testing.assert_array_equal(step.kept, np.arange(len(ids)))
        found.append(step.logits)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("custom_ops", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7, 63])
def test_each_picture_keeps_as_many_tokens_as_asked_for(
    pruned: BundlePaths, pictures: list[VqaItem], tokens: int, custom_ops: bool
) -> None:
    session = load(pruned.graph, threads=1, custom_ops=custom_ops).keeping(tokens)
    answerer = Answerer(session)
    shown = [answerer.picture(item.image.open()) for item in pictures[:2]]
    ids = answerer.prompts.encode("what is this", shown[0])
    first = int(np.flatnonzero(ids == session.manifest.image_token_id)[0])
    run = np.full(IMAGE_TOKENS, session.manifest.image_token_id)
    ids = np.concatenate([ids[:first], run, ids[first:]])
    cache = KvCache(session, len(ids) + 2)
    step = run_step(session, ids, cache, np.concatenate([picture.pixels for picture in shown]))
    is_image = ids == session.manifest.image_token_id
    of_pictures = ((is_image.cumsum() - 1) // IMAGE_TOKENS)[step.kept[is_image[step.kept]]]
    assert np.bincount(of_pictures, minlength=2).tolist() == [tokens, tokens]
    assert np.isin(np.flatnonzero(~is_image), step.kept).all()
    assert (np.diff(step.kept) > 0).all()
    assert cache.position == len(ids)
    assert np.isfinite(run_step(session, np.array([5]), cache).logits).all()
    if tokens == 0:
        vlm = load_checkpoint(checkpoint_path())
        with torch.no_grad():
            text = vlm.module.get_input_embeddings()(torch.from_numpy(ids[step.kept])[None])
            positions = torch.from_numpy(step.kept)[None]
            wanted = vlm.decode(text, positions, DynamicCache())[0, -1].numpy()
        np.testing.assert_allclose(step.logits, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "kind", "reason"),
    [
        ("llava-onevision", "llava_onevision", "a newline token"),
        ("qwen2.5-vl", "qwen2_5_vl", "its windows and its merger"),
        ("idefics3", "idefics3", "its pixel shuffle"),
        ("smolvlm", "smolvlm", "its pixel shuffle"),
    ],
)
def test_towers_that_join_patches_later_are_refused(
    architecture: str, kind: str, reason: str, pictures: list[VqaItem], tmp_path: Path
) -> None:
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    config = ExportConfig(FLOAT, PruneConfig(keep_ratio=0.5, vision_layer=0))
    with pytest.raises(UnsupportedModelError, match=rf"of the model type '{kind}' {reason}"):
        export_model(vlm, pictures, tmp_path / "model.onnx", config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_layer": 2}, "--prune-vision-layer 2 is none of the 2 blocks .*to 1"),
        (
            {"vision_layer": 0, "score": "attention"},
            "--score-layer -2 is none of the 1 blocks up to --prune-vision-layer 0",
        ),
    ],
)
def test_layers_that_the_tower_lacks_are_refused(
    options: dict[str, object], message: str, pictures: list[VqaItem], tmp_path: Path
) -> None:
    vlm = load_checkpoint(save_checkpoint(SUPPORTED[0], tmp_path / "checkpoint"))
    prune = PruneConfig(keep_ratio=0.5, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=message):
        export_model(vlm, pictures, tmp_path / "model.onnx", ExportConfig(FLOAT, prune))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_layer": -1}, "--prune-vision-layer -1 is below 0"),
        ({"vision_layer": 1, "keep_ratio": 1.0}, "--prune-vision-layer 1 changes nothing without"),
        ({"vision_layer": 1, "layer": 2}, "and --prune-layer 2 are two places"),
        ({"vision_layer": 1, "score": "text"}, "--prune-score text does not go with"),
        ({"vision_layer": 1, "keep_rule": "mass:0.5"}, "--keep-rule mass:0.5 does not go with"),
    ],
)
def test_options_that_cannot_hold_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PruneConfig(**{"keep_ratio": 0.5, **options})  # type: ignore[arg-type]


def test_colour_needs_far_fewer_patches_than_shape(pruned: BundlePaths) -> None:
    """Where patches are dropped before the tower has told all of them what the whole is."""
    items = [item for item in load_easy_vqa("test") if item.kind in ("color", "shape")]
    questions = gather(spread(items, 300))
    model = Model(pruned.graph, questions, threads=1)
    setting = Setting(("uniform",), tolerance=0.03)
    found = analyse(questions, setting, IMAGE_TOKENS, model.mode, model.answers)
    needs = {kind: of["k_star"] for kind, of in found["modes"]["uniform"]["kinds"].items()}
    assert needs["shape"] >= 4 * needs["color"]
