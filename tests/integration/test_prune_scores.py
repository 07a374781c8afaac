"""Scores that pruning goes by: the numbers, in every family, and the graph that computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from random_checkpoints import ARCHITECTURES, save_checkpoint  # type: ignore[import-not-found]
from transformers.vision_utils import get_vision_window_index

from bivlm_edge import custom_ops_library
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import RequestError
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import VisionLanguageModel, load_checkpoint, places, saliency

FLOAT = QuantConfig(method="none")


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    return load_checkpoint(save_checkpoint(request.param, tmp_path_factory.mktemp("model")))


def received(weights: torch.Tensor, has_class: bool) -> torch.Tensor:
    """Mean over heads of what the first, or each, query gives to the keys."""
    mean = weights.mean(1)
    return mean[:, 0] if has_class else mean.mean(1)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_is_what_transformers_computes(vlm: VisionLanguageModel, layer: int) -> None:
    family = vlm.family.name
    torch.manual_seed(1)
    pixels = torch.randn(2, *vlm.pixel_shape)
    features, scores = vlm.scored_features(pixels, "attention", layer)
    assert scores is not None
    assert scores.shape == (2, vlm.image_tokens)
    torch.testing.assert_close(features, vlm.image_features(pixels), rtol=1e-5, atol=1e-5)
    vlm.module.set_attn_implementation("eager")
    if family == "qwen2_5_vl":
        want = qwen_attention(vlm, pixels, layer)
    else:
        model = vlm.module.model
        tower = model.vision_model if family in ("idefics3", "smolvlm") else model.vision_tower
        blocks = next(len(part) for name, part in vlm.family.blocks(vlm.module) if name == "vision")
        weights = tower(pixels, output_attentions=True).attentions[layer % blocks]
        want = received(weights, weights.shape[-1] % 2 == 1)  # 16 patches and a class token
    if family in ("idefics3", "smolvlm"):
        want = want.reshape(2, 2, 2, 2, 2).mean((2, 4)).reshape(2, 4)
    elif family.startswith("llava"):
        want = want[:, vlm.module.config.vision_feature_select_strategy == "default" :]
        if family == "llava_onevision":
            want = torch.cat([want, want.mean(1, keepdim=True)], 1)
    vlm.module.set_attn_implementation("sdpa")
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-6)


def qwen_attention(vlm: VisionLanguageModel, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Attention that merged patches receive, from the weights of the checkpoint's own tower."""
    visual = vlm.module.model.visual
    found: list[torch.Tensor] = []
    attention = visual.blocks[layer].attn
    softmax = torch.nn.functional.softmax

    def recorded(*arguments: object, **options: object) -> torch.Tensor:
        weights = softmax(*arguments, **options)  # type: ignore[arg-type]
        found.append(weights)
        return weights

    arguments = vlm.family.picture_inputs(vlm.module, pixels, torch.tensor([[0]]))
    hook = attention.register_forward_pre_hook(
        lambda *_: setattr(torch.nn.functional, "softmax", recorded)
    )
    end = attention.register_forward_hook(
        lambda *_: setattr(torch.nn.functional, "softmax", softmax)
    )
    visual(arguments["pixel_values"], grid_thw=arguments["image_grid_thw"])
    hook.remove()
    end.remove()
    of_patches = torch.cat([received(weights, False).reshape(-1) for weights in found])
    of_features = of_patches.reshape(-1, 4).mean(1)
    config = vlm.module.config.vision_config
    order, _ = get_vision_window_index(
        arguments["image_grid_thw"],
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
    )
    back = torch.empty_like(of_features)
    back[order] = of_features
    return back.reshape(2, -1)


CHOICES = {
    "attention": PruneConfig(keep_ratio=0.5, mode="topk_score", score_layer=-1),
    "distance": PruneConfig(keep_ratio=0.5),
    "norm": PruneConfig(keep_ratio=0.5, mode="coverage", score="norm", metric="features"),
    "text": PruneConfig(keep_ratio=0.5, mode="dpp", score="text"),
    "none": PruneConfig(keep_ratio=0.5, mode="maxmin"),
}
COMPARED_BY_PLACES = ("distance", "text", "none")


@pytest.mark.parametrize("score", CHOICES)
def test_export_computes_each_score_as_torch_does(
    vlm: VisionLanguageModel, score: str, pictures: list[VqaItem], tmp_path: Path
) -> None:
    config = ExportConfig(FLOAT, CHOICES[score])
    result = export_model(vlm, pictures, tmp_path / "model.onnx", config)
    for way in result.report["validation"]:
        # the fallback rounds similarities to float32, where places at one distance may differ
        least = 0.98 if way["runtime"] == "onnxruntime without the library" else 1.0
        assert way["kept_same"] >= least, way["runtime"]
    graph = onnx.load(result.paths.graph, load_external_data=False).graph
    (branches,) = (node for node in graph.node if node.op_type == "If")
    (prune,) = (
        node
        for attribute in branches.attribute
        for node in attribute.g.node
        if node.op_type == "TokenPrune"
    )
    inputs = [*prune.input, ""]
    assert bool(inputs[1]) == (score != "none")
    assert bool(inputs[4]) == (score in COMPARED_BY_PLACES)


def test_query_and_key_are_projected_once(pictures: list[VqaItem], tmp_path: Path) -> None:
    """The score's products are those of the tower: no time and no second copy of weights."""
    vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", tmp_path / "checkpoint"))
    sizes, products = {}, {}
    for score in ("distance", "attention"):
        prune = PruneConfig(keep_ratio=0.5, score=score)
        config = ExportConfig(QuantConfig(method="rtn", bits=8.0), prune)
        result = export_model(vlm, pictures, tmp_path / f"{score}.onnx", config)
        graph = onnx.load(result.paths.graph, load_external_data=False).graph
        branch = next(node for node in graph.node if node.op_type == "If").attribute
        nodes = [node for attribute in branch for node in attribute.g.node]
        products[score] = sum(node.op_type == "MatMulNBits" for node in nodes)
        sizes[score] = result.report["file_bytes"]["data"]
    assert products["attention"] == products["distance"]
    assert sizes["attention"] <= sizes["distance"] + 64


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_the_tower_does_not_run_is_refused(
    layer: int, pictures: list[VqaItem], tmp_path: Path
) -> None:
    vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", tmp_path / "checkpoint"))
    prune = PruneConfig(keep_ratio=0.5, score="attention", score_layer=layer)
    message = rf"--score-layer {layer} is none of the 2 blocks.*\(llava\).*-2 to 1"
    with pytest.raises(RequestError, match=message):
        export_model(vlm, pictures, tmp_path / "model.onnx", ExportConfig(FLOAT, prune))
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "uniform", "score": "norm"}, "--prune-score norm does not go with .* uniform"),
        ({"mode": "mmr", "score": "none"}, "--prune-score none .* Choose attention, distance"),
        ({"score": "entropy"}, "--prune-score 'entropy' is not known. Accepted: attention"),
        ({"score": "norm", "score_layer": 3}, "--score-layer 3 is read by .* the score here is"),
        ({"mode": "topk_score", "metric": "places"}, "--prune-metric places .* compares no tokens"),
        ({"metric": "colors"}, "--prune-metric 'colors' is not known. Accepted: features, places"),
        ({"mode": "coverage", "theta": 0.3}, "--prune-theta 0.3 has no effect .* mmr or dpp"),
        ({"theta": 1.5}, "--prune-theta 1.5 is outside 0 to 1"),
    ],
)
def test_options_that_nothing_would_read_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        PruneConfig(**options)  # type: ignore[arg-type]


def test_text_relevance_is_the_mean_cosine_to_the_question() -> None:
    rows = torch.tensor([[[9.0, 9], [1, 0], [0, 2], [3, 0], [0, 4]]])
    is_image = torch.tensor([[False, True, True, False, False]])
    scores = saliency.text_relevance(rows, is_image)
    # the question is the last two tokens: x and y
    torch.testing.assert_close(scores[0, 1:3], torch.tensor([0.5, 0.5]))
    rows[0, 4] = torch.tensor([5.0, 0])
    scores = saliency.text_relevance(rows, is_image)
    torch.testing.assert_close(scores[0, 1:3], torch.tensor([1.0, 0.0]))
    nothing_behind = saliency.text_relevance(rows[:, :3], is_image[:, :3])
    assert (nothing_behind == 0).all()


def test_places_are_near_to_their_neighbours_alone() -> None:
    at = np.concatenate([places.NOWHERE, places.grid(3, 20)])
    found = places.features(at).astype(np.float64)
    norms = np.linalg.norm(found, axis=1)
    alike = found @ found.T / np.outer(norms, norms)
    far = np.linalg.norm(at[1:, None] - at[None, 1:], axis=-1)
    np.testing.assert_allclose(
        alike[1:, 1:], np.exp(-(far**2) / (2 * places.SPREAD**2)), atol=0.031
    )
    assert (alike[0, 1:] == 0).all()


def test_every_family_names_a_place_for_each_token(vlm: VisionLanguageModel) -> None:
    assert len(vlm.place_features()) == vlm.image_tokens
    found = vlm.family.token_places(vlm.module)
    rows = found[~np.isnan(found[:, 0])]
    assert len(np.unique(rows, axis=0)) == len(rows), "two tokens at one place"


def test_tokens_for_a_share_of_the_mass() -> None:
    scores = torch.tensor([[1.0, 4, 2, 3], [0, 0, 0, 0], [5, -9, 0, 0], [1, 1, 1, 1]])
    assert saliency.tokens_for_mass(scores, 0.7).tolist() == [2, 1, 1, 3]
    assert saliency.tokens_for_mass(scores, 0.71).tolist() == [3, 1, 1, 3]
    assert saliency.tokens_for_mass(scores[:, :1], 0.5).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("score", ["distance", "text"])
def test_each_picture_keeps_what_the_rule_says(
    score: str, pictures: list[VqaItem], tmp_path: Path
) -> None:
    vlm = load_checkpoint(save_checkpoint("llava, CLIP and Llama", tmp_path / "checkpoint"))
    prune = PruneConfig(keep_ratio=0.75, score=score, keep_rule="mass:0.5")  # type: ignore[arg-type]
    result = export_model(vlm, pictures[:2], tmp_path / "model.onnx", ExportConfig(FLOAT, prune))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(custom_ops_library())
    session = onnxruntime.InferenceSession(str(result.paths.graph), options)
    plain = Image.new("RGB", (40, 40), (200, 10, 90))  # its patches differ by their places alone
    images = [plain, *(item.image.open() for item in pictures[:2])]
    pixels = torch.stack([torch.from_numpy(vlm.pixels(image)) for image in images])
    row = vlm.encode(vlm.prompt("a"))
    ids = torch.tensor([row * 3])
    with torch.no_grad():
        features, scores = vlm.scored_features(pixels, score, -2)
        if scores is None:
            scores = saliency.text_relevance(vlm.embed(ids, features), ids == vlm.image_token_id)
            scores = scores[ids == vlm.image_token_id].reshape(3, -1)
    wanted = saliency.tokens_for_mass(scores, 0.5)
    assert len(set(wanted.tolist())) > 1, "the rule tells these pictures apart"
    feed = {
        "input_ids": ids.numpy(),
        "pixel_values": pixels.numpy(),
        "position_ids": vlm.positions(ids[0].tolist())[0].numpy(),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key"):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)

    def kept(most: int, rows: int = 1) -> list[int]:
        given = {name: np.repeat(array, rows, 0) for name, array in feed.items()}
        found = session.run(["kept_indices"], {**given, "keep_tokens": np.array(most)})[0]
        is_image = ids[0].numpy() == vlm.image_token_id
        picture = (is_image.cumsum() - 1) // vlm.image_tokens
        places = found[-1][is_image[found[-1]]]
        return np.bincount(picture[places], minlength=3).tolist()

    assert kept(12) == wanted.clamp(max=12).tolist()
    assert kept(3) == wanted.clamp(max=3).tolist()
    assert kept(0) == [0, 0, 0]
    assert kept(vlm.image_tokens) == [vlm.image_tokens] * 3  # no rule
    # rows of pictures 0, 0, 1 and 1, 2, 2: the first ones share a number, the second ones, ..
    most = wanted.repeat_interleave(2).reshape(2, 3).amax(0)
    assert kept(12, rows=2) == most.clamp(max=12).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rule": "mass:0.9"}, "--keep-rule mass:0.9 needs --keep-tokens below 1"),
        (
            {"keep_rule": "mass:0.9", "tolerance": 1.0},
            "--keep-rule mass:0.9 does not go with --keep-tokens auto",
        ),
        ({"keep_rule": "mass:1", "keep_ratio": 0.5}, "'mass:1' is no rule. Give mass:SHARE"),
        ({"keep_rule": "mass:lots", "keep_ratio": 0.5}, "'mass:lots' is no rule"),
        ({"keep_rule": "best", "keep_ratio": 0.5}, "'best' is no rule"),
        (
            {"keep_rule": "mass:0.9", "keep_ratio": 0.5, "mode": "uniform"},
            "counts scores, and --prune-mode uniform has none",
        ),
    ],
)
def test_rules_that_cannot_hold_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PruneConfig(**options)  # type: ignore[arg-type]
