"""Tokens dropped inside the decoder: the layers before see all, and all layers have one past."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import export_reference
from numpy.typing import NDArray
from random_checkpoints import save_checkpoint  # type: ignore[import-not-found]
from transformers import DynamicCache

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import layer_pruning, load_checkpoint
from bivlm_edge.redundancy.answering import Model
from bivlm_edge.redundancy.plan import NO_IMAGE, Run
from bivlm_edge.redundancy.questions import gather
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.generate import Step, run_step
from bivlm_edge.runtime.kv_cache import KvCache
from bivlm_edge.runtime.session import VlmSession

FLOAT = QuantConfig(method="none")
IMAGE_TOKENS = 64
KEPT = 16
LAYER = 2  # of four


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    prune = PruneConfig(keep_ratio=KEPT / IMAGE_TOKENS, layer=LAYER)
    return export_reference(tmp_path_factory.mktemp("inside"), ExportConfig(FLOAT, prune))


def prefill(
    session: VlmSession, items: list[VqaItem], question: str = "what is this"
) -> tuple[Step, NDArray[np.int64], KvCache]:
    """Prefill a prompt of several pictures, each followed by its placeholders."""
    answerer = Answerer(session)
    pictures = [answerer.picture(item.image.open()) for item in items]
    ids = answerer.prompts.encode(question, pictures[0])
    first = int(np.flatnonzero(ids == session.manifest.image_token_id)[0])
    run = np.full(IMAGE_TOKENS, session.manifest.image_token_id)
    ids = np.concatenate([ids[:first], *[run] * (len(items) - 1), ids[first:]])
    cache = KvCache(session, len(ids) + 8)
    return run_step(session, ids, cache, np.concatenate([p.pixels for p in pictures])), ids, cache


def states(cache: KvCache) -> list[NDArray[np.generic]]:
    """Keys and values of each layer in turn, `[heads, tokens, width]`."""
    return [tensor.numpy()[0, :, : cache.tokens] for tensor in cache.tensors]


@pytest.mark.parametrize("custom_ops", [True, False])
def test_all_tokens_give_the_logits_of_the_unpruned_export_bit_by_bit(
    pruned: BundlePaths, float_export: BundlePaths, pictures: list[VqaItem], custom_ops: bool
) -> None:
    inside, whole = (
        load(paths.graph, threads=1, custom_ops=custom_ops) for paths in (pruned, float_export)
    )
    for items in (pictures[:1], pictures[1:3]):
        step, _, cache = prefill(inside.keeping(IMAGE_TOKENS), items)
        expected, _, other = prefill(whole, items)
        np.testing.assert_array_equal(step.logits, expected.logits)
        for mine, theirs in zip(states(cache), states(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        token = np.array([int(step.logits.argmax())])
        following = run_step(inside, token, cache)
        np.testing.assert_array_equal(following.logits, run_step(whole, token, other).logits)


@pytest.mark.parametrize("custom_ops", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7, KEPT])
def test_layers_before_saw_all_tokens_and_keep_what_the_others_keep(
    pruned: BundlePaths,
    float_export: BundlePaths,
    pictures: list[VqaItem],
    tokens: int,
    custom_ops: bool,
) -> None:
    session = load(pruned.graph, threads=1, custom_ops=custom_ops).keeping(tokens)
    whole = load(float_export.graph, threads=1, custom_ops=custom_ops)
    step, ids, cache = prefill(session, pictures[:2])
    _, _, other = prefill(whole, pictures[:2])
    is_image = ids == session.manifest.image_token_id
    picture = (is_image.cumsum() - 1) // IMAGE_TOKENS
    assert cache.tokens == len(step.kept) == len(ids) - 2 * (IMAGE_TOKENS - tokens)
    assert cache.position == len(ids)
    of_pictures = picture[step.kept[is_image[step.kept]]]
    assert np.bincount(of_pictures, minlength=2).tolist() == [tokens, tokens]
    for layer, (mine, theirs) in enumerate(zip(states(cache), states(other), strict=True)):
        if layer < 2 * LAYER:
            np.testing.assert_array_equal(mine, theirs[:, step.kept])
        elif layer == 2 * LAYER:  # keys: these tokens were not changed by the pruning yet
            np.testing.assert_allclose(mine, theirs[:, step.kept], rtol=0, atol=1e-4)
        elif layer >= 2 * LAYER + 2:
            assert not np.allclose(mine, theirs[:, step.kept], rtol=0, atol=1e-4)


def test_text_and_decoding_are_left_alone(
    pruned: BundlePaths, float_export: BundlePaths, pictures: list[VqaItem]
) -> None:
    inside, whole = (load(paths.graph, threads=1) for paths in (pruned, float_export))
    ids = Answerer(inside).prompts.encode("what is this", None)
    found = [run_step(session, ids, KvCache(session, 32)) for session in (inside, whole)]
    np.testing.assert_array_equal(found[0].logits, found[1].logits)
    np.testing.assert_array_equal(found[0].kept, np.arange(len(ids)))
    step, _, cache = prefill(inside, pictures[:1])
    # behind a picture: several tokens at once, or one after the other
    other = cache.copy()
    more = np.array([5, 9, 11])
    at_once = run_step(inside, more, cache)
    single = [run_step(inside, more[i : i + 1], other) for i in range(3)][-1]
    np.testing.assert_allclose(at_once.logits, single.logits, rtol=0, atol=2e-4)
    assert cache.tokens == other.tokens == len(step.kept) + 3


def test_a_second_picture_behind_a_cache(pruned: BundlePaths, pictures: list[VqaItem]) -> None:
    """Written in place behind a past, what stands before and behind stays."""
    session = load(pruned.graph, threads=1)
    _, ids, cache = prefill(session, pictures[:1])
    before = [array.copy() for array in states(cache)]
    picture = Answerer(session).picture(pictures[1].image.open())
    step = run_step(session, ids, cache, picture.pixels)
    assert np.isfinite(step.logits).all()
    for mine, theirs in zip(states(cache), before, strict=True):
        np.testing.assert_array_equal(mine[:, : theirs.shape[1]], theirs)
        assert (mine[:, theirs.shape[1] :] != 0).any(axis=(0, 2)).all()
    for tensor in cache.tensors:
        assert not tensor.numpy()[0, :, cache.tokens + len(ids) :].any()


def test_the_analyser_asks_whole_prompts_and_has_a_control_without_image(
    pruned: BundlePaths, pictures: list[VqaItem]
) -> None:
    """A question behind a shared picture would not have seen what the first layers show it."""
    words = ("what color is the shape?", "is there a circle?")
    items = [replace(item, question=word) for item in pictures[:6] for word in words]
    model = Model(pruned.graph, gather(items), threads=1)
    few = model.session.keeping(3)
    answerer = Answerer(few)
    wanted = [
        answerer.prompts.decode(list(answerer.ask(item.question, answerer.picture(opened))))
        for item in items
        for opened in [item.image.open()]
    ]
    assert list(model.answers(Run(model.mode, 3)).texts) == wanted
    blind = model.answers(Run(NO_IMAGE, 0)).texts
    assert len(set(blind[::2])) == len(set(blind[1::2])) == 1


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llava, CLIP and Llama", {"score": "last-token", "mode": "topk_score"}),
        ("llava, SigLIP and Qwen2", {"metric": "features", "keep_rule": "mass:0.5"}),
        ("qwen2.5-vl", {"score": "last-token", "metric": "features"}),
        ("smolvlm", {"score": "text"}),
    ],
)
def test_families_agree_with_torch(
    architecture: str, options: dict[str, str], pictures: list[VqaItem], tmp_path: Path
) -> None:
    """The export compares kept tokens, prefill and decoding with torch, with and without us."""
    vlm = load_checkpoint(save_checkpoint(architecture, tmp_path / "checkpoint"))
    prune = PruneConfig(keep_ratio=0.25, layer=1, **options)  # type: ignore[arg-type]
    target = tmp_path / "model.onnx"
    result = export_model(vlm, pictures[:2], target, ExportConfig(FLOAT, prune))
    for way in result.report["validation"]:
        assert way["logits_error"] < 1e-5
        assert way["kept_same"] >= 0.98


def test_weights_of_both_branches_are_stored_and_counted_once(
    two_bit_export: BundlePaths, tmp_path: Path
) -> None:
    prune = PruneConfig(keep_ratio=0.25, layer=LAYER)
    config = ExportConfig(QuantConfig(calibration_samples=8), prune)
    paths = export_reference(tmp_path, config)
    # the layers before LAYER take a quarter; planes and padding differ with the calibration
    assert paths.data.stat().st_size < 1.05 * two_bit_export.data.stat().st_size
    names = [
        [
            layer["name"]
            for layer in json.loads((folder / "export_report.json").read_text())["layers"]
        ]
        for folder in (paths.assets, two_bit_export.assets)
    ]
    assert sorted(names[0]) == sorted(names[1])
    graph = onnx.load(paths.graph, load_external_data=False).graph
    (branches,) = (node for node in graph.node if node.op_type == "If")
    products = {
        attribute.name: sum(node.op_type == "BinaryMatMul" for node in attribute.g.node)
        for attribute in branches.attribute
    }
    assert products["else_branch"] == 4 * LAYER  # qkv, o, gate and up, down
    graphs = (graph, *(attribute.g for attribute in branches.attribute))
    assert sum(node.op_type == "GroupMatMul" for g in graphs for node in g.node) == 1  # the head


def test_torch_drops_what_it_is_told_to(tmp_path: Path) -> None:
    vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", tmp_path / "checkpoint"))
    torch.manual_seed(0)
    hidden, positions = torch.randn(1, 6, 64), torch.arange(6)[None]
    kept = torch.tensor([0, 1, 3, 5])
    cache, whole = DynamicCache(), DynamicCache()
    logits = layer_pruning.decode_dropping(vlm, hidden, positions, cache, 1, kept)
    everything = vlm.decode(hidden, positions, whole)
    for index, states in enumerate(cache.layers):
        assert states.keys.shape[2] == 4
        same = torch.equal(states.keys, whole.layers[index].keys[:, :, kept])
        assert same or index > 0
    # the first two tokens have nothing dropped before them
    torch.testing.assert_close(logits[:, :2], everything[:, :2])
    assert not torch.allclose(logits[:, 2:], everything[:, kept[2:]])
    all_kept = layer_pruning.decode_dropping(
        vlm, hidden, positions, DynamicCache(), 1, torch.arange(6)
    )
    torch.testing.assert_close(all_kept, everything, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": -1, "keep_ratio": 0.5}, "--prune-layer -1 is below 0"),
        ({"layer": 1}, "--prune-layer 1 changes nothing without pruning"),
        (
            {"layer": 1, "keep_ratio": 0.5, "positions": "contiguous"},
            "--positions contiguous does not go with --prune-layer 1: the layers before it have",
        ),
        ({"score": "last-token", "keep_ratio": 0.5}, "Add --prune-layer 1 or more"),
    ],
)
def test_options_that_cannot_hold_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PruneConfig(**options)  # type: ignore[arg-type]


def test_a_layer_that_the_decoder_lacks_is_refused(pictures: list[VqaItem], tmp_path: Path) -> None:
    vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", tmp_path / "checkpoint"))
    config = ExportConfig(FLOAT, PruneConfig(keep_ratio=0.5, layer=2))
    with pytest.raises(RequestError, match=r"--prune-layer 2 is none of the 2 .*\(llava\).* to 1"):
        export_model(vlm, pictures, tmp_path / "model.onnx", config)
