"""The redundancy analyser on real exports, and the picture of kept tokens."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLES  # noqa: F401 (the fixtures of this folder)
from PIL import Image
from typer.testing import CliRunner

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.cli import redundancy, run
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem, load_easy_vqa
from bivlm_edge.errors import RequestError
from bivlm_edge.export.exporter import export_model
from bivlm_edge.models import load_checkpoint
from bivlm_edge.redundancy.answering import Model
from bivlm_edge.redundancy.plan import FULL, NO_IMAGE, RARE_TEXT, SHUFFLED, TEXT, Run
from bivlm_edge.redundancy.questions import Questions, gather, spread
from bivlm_edge.redundancy.selectors import PruneGraph
from bivlm_edge.reference import checkpoint_path
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.runtime.kv_cache import KvCache

IMAGE_TOKENS = 64
FIRST = 1  # place of the first image token in a prompt
QUICK = ("--threads", "1", "--no-plot", "--json")


@pytest.fixture(scope="module")
def blind_export(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    """The reference model with a projector that gives zeros, whatever the picture."""
    vlm = load_checkpoint(checkpoint_path())
    projector: Any = vlm.module.get_submodule("model.multi_modal_projector.linear_2")
    with torch.no_grad():
        projector.weight.zero_()
        projector.bias.zero_()
    config = ExportConfig(QuantConfig(method="none"), PruneConfig(keep_ratio=0.5))
    folder = tmp_path_factory.mktemp("blind")
    return export_model(vlm, load_easy_vqa("train"), folder / "model.onnx", config).paths


@pytest.fixture(scope="module")
def asked() -> Questions:
    return gather(spread(load_easy_vqa("test"), 30))


@pytest.fixture(scope="module")
def model(pruned_export: BundlePaths, asked: Questions) -> Model:
    return Model(pruned_export.graph, asked, threads=1)


def _invoke(*arguments: object) -> Any:
    return CliRunner().invoke(redundancy.app, list(map(str, arguments)))


def _kept(model: Model, run: Run, picture: int = 0) -> list[int]:
    """The places of a picture's kept tokens."""
    session = model._session(run).keeping(run.kept)
    item = model._questions.items[int(np.flatnonzero(model._questions.picture_of == picture)[0])]
    answerer = Answerer(session)
    shown = answerer.picture(item.image.open())
    ids = answerer.prompts.encode(item.question, shown)
    kept = run_step(session, ids, KvCache(session, len(ids)), shown.pixels).kept
    is_image = ids[kept] == session.manifest.image_token_id
    return [int(index) - FIRST for index in kept[is_image]]


def test_a_model_with_zeroed_vision_features_does_not_use_the_image(
    blind_export: BundlePaths, tmp_path: Path
) -> None:
    found = _invoke(
        blind_export.graph, "--data", "easy-vqa", "--limit", 60, "--output", tmp_path, *QUICK
    )
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["verdict"] == "IMAGE_NOT_USED"
    assert result["accuracy_full"] == result["accuracy_shuffled"]
    assert result["k_star"] is None
    assert result["random_k_star"] is None
    assert "IMAGE_NOT_USED" in (tmp_path / "redundancy.md").read_text(encoding="utf-8")


def test_the_reference_model_uses_the_image_and_an_interrupted_analysis_goes_on(
    pruned_export: BundlePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (pruned_export.graph, "--data", "easy-vqa", "--limit", 30, "--modes", "uniform")
    arguments += ("--tolerance", 40, "--output", tmp_path, *QUICK)
    carried_out: list[Run] = []
    answers = Model.answers

    def counted(self: Model, run: Run, on_progress: Any = None) -> Any:
        carried_out.append(run)
        if len(carried_out) == 5:
            raise KeyboardInterrupt
        return answers(self, run, on_progress)

    monkeypatch.setattr(Model, "answers", counted)
    assert _invoke(*arguments).exit_code == 130
    assert not (tmp_path / "redundancy.json").exists()
    interrupted = list(carried_out)
    found = _invoke(*arguments)
    assert carried_out[5] == interrupted[-1]
    assert len(set(carried_out)) == len(carried_out) - 1
    (line,) = found.stdout.splitlines()
    result = json.loads(line)
    assert result["verdict"] in ("REDUNDANT", "SELECTOR_ADDS_NOTHING")
    assert result["image_tokens"] == IMAGE_TOKENS
    assert result["accuracy_full"] > result["accuracy_no_image"] + 0.2
    assert result["accuracy_full"] > result["accuracy_shuffled"] + 0.2
    assert 0 < result["k_star"] < IMAGE_TOKENS
    assert result["random_k_star"] is None
    assert 0.5 < result["accuracy_question_only"] < 0.9
    assert result["own_mode"] == "mmr"
    assert set(result["versions"]) == {"bivlm-edge", "onnxruntime", "numpy"}
    assert json.loads((tmp_path / "redundancy.json").read_text(encoding="utf-8")) == result
    assert (tmp_path / "redundancy.csv").read_text(encoding="utf-8").startswith("model,selector")
    # nothing is left to be carried out
    again = len(carried_out)
    assert json.loads(_invoke(*arguments).stdout)["k_star"] == result["k_star"]
    assert len(carried_out) == again
    # other answers are not taken for these
    _invoke(*arguments, "--max-new-tokens", 3)
    assert len(carried_out) > again
    damaged = next((tmp_path / "runs").glob("full*"))
    damaged.write_text("{", encoding="utf-8")
    found = _invoke(*arguments, "--max-new-tokens", 3)
    found = _invoke(*arguments) if found.exit_code == 0 else found
    assert found.exit_code == 3
    assert "is damaged. Delete this file" in found.stderr


def test_two_models_side_by_side(
    pruned_export: BundlePaths, blind_export: BundlePaths, tmp_path: Path
) -> None:
    found = _invoke(
        pruned_export.graph, "--against", blind_export.graph, "--data", "easy-vqa", "--limit", 30,
        "--modes", "uniform", "--tolerance", 40, "--output", tmp_path, "--threads", 1,
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["model"].startswith("pruned")
    (other,) = result["against"]
    assert other["model"].startswith("blind")
    assert other["verdict"] == "IMAGE_NOT_USED"
    assert other["delta_redundancy"] is None
    assert other["delta_by_mode"] == {}
    assert "image tokens needed" in found.stdout
    assert f"{other['model']}: IMAGE_NOT_USED. The model does not use the image" in found.stdout
    page = (tmp_path / "redundancy.md").read_text(encoding="utf-8")
    assert "(redundancy.png)" in page
    with Image.open(tmp_path / "redundancy.png") as picture:
        assert picture.height > picture.width
    # each model has runs of its own
    assert len(list((tmp_path / "runs").glob("full*"))) == 2


def test_sharing_a_picture_gives_the_answers_of_whole_prompts(
    model: Model, asked: Questions, pruned_export: BundlePaths
) -> None:
    session = load(pruned_export.graph, threads=1)
    for run_, kept in ((Run(FULL, 64), 64), (Run("mmr", 5), 5), (Run(NO_IMAGE, 0), 0)):
        answerer = Answerer(session.keeping(kept))
        whole, tokens = [], 0
        for item in asked.items:
            generation = answerer.ask(item.question, answerer.picture(item.image.open()))
            whole.append(answerer.prompts.decode(generation))
            tokens += generation.kept_tokens
        found = model.answers(run_)
        assert list(found.texts) == whole
        assert found.kept_tokens == tokens / len(whole)


def test_prompts_stay_whole_where_the_question_has_a_say(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bivlm_edge.redundancy import answering

    def nosy(session: Any, ids: Any, cache: Any, pixels: Any = None) -> Any:
        """Keeps more of the picture when the question is there."""
        is_whole = pixels is not None and ids[-1] != session.manifest.image_token_id
        chosen = session.keeping(9 if is_whole else 5) if pixels is not None else session
        lengths.append(len(ids))
        cache.session = chosen
        return run_step(chosen, ids, cache, pixels)

    lengths: list[int] = []
    monkeypatch.setattr(answering, "run_step", nosy)
    found = model.answers(Run("mmr", 5))
    # the first picture is tried alone, and shows that none may be shared
    assert lengths.count(FIRST + IMAGE_TOKENS) == 1
    assert found.kept_tokens == pytest.approx(model.answers(Run("mmr", 9)).kept_tokens)


def test_another_picture_and_fewer_question_tokens_change_the_answers(
    model: Model, asked: Questions
) -> None:
    full = model.answers(Run(FULL, IMAGE_TOKENS))
    for control in (Run(SHUFFLED, IMAGE_TOKENS), Run(TEXT, 0), Run(RARE_TEXT, 4), Run(TEXT, 16)):
        found = model.answers(control)
        assert asked.correct(found.texts).mean() < asked.correct(full.texts).mean() - 0.1
    for text in (TEXT, RARE_TEXT):
        assert model.answers(Run(text, IMAGE_TOKENS)).texts == full.texts
    assert model.answers(Run(RARE_TEXT, 0)).texts == model.answers(Run(TEXT, 0)).texts
    # what few questions have stays, what most of them have goes
    picture, image = model._picture(0), model.session.manifest.image_token_id
    prompts = [
        model._prompt(Run(RARE_TEXT, IMAGE_TOKENS // 2), number, picture)
        for number in range(len(asked.items))
    ]
    left = {model._answerer.prompts.decode(ids[ids != image].tolist()) for ids in prompts}
    assert "is circle present" in left
    assert not any("the" in text.split() for text in left)
    assert found.kept_tokens < full.kept_tokens


def test_other_selectors_run_in_a_copy_of_the_graph(
    model: Model, pruned_export: BundlePaths
) -> None:
    before = pruned_export.graph.read_bytes()
    uniform = [(2 * i + 1) * IMAGE_TOKENS // 10 for i in range(5)]
    assert _kept(model, Run("uniform", 5)) == uniform
    own = _kept(model, Run("mmr", 5))
    assert own != uniform
    assert PruneGraph(pruned_export).mode == "mmr"
    edited = load(
        pruned_export.graph, threads=1, graph=PruneGraph(pruned_export).with_mode("maxmin", 0)
    )
    assert edited.prunes
    assert pruned_export.graph.read_bytes() == before


def test_random_draws_for_each_picture_and_seed_and_again_the_same(model: Model) -> None:
    draws = {
        (picture, seed): _kept(model, Run("random", 8, seed), picture)
        for picture in (0, 1)
        for seed in (0, 1)
    }
    assert all(len(set(kept)) == 8 for kept in draws.values())
    assert len({tuple(kept) for kept in draws.values()}) == 4
    assert _kept(model, Run("random", 8, 0), 1) == draws[1, 0]
    # more tokens are the same ones and others
    assert set(draws[0, 0]) < set(_kept(model, Run("random", 16, 0), 0))


def test_costs_count_the_tokens_that_are_cached(model: Model) -> None:
    costs = model.costs([IMAGE_TOKENS, 8, 0])
    assert [costs[kept].prompt_tokens - costs[0].prompt_tokens for kept in (64, 8)] == [64, 8]
    per_token = KvCache.bytes_per_token(model.session)
    assert all(cost.kv_bytes == cost.prompt_tokens * per_token for cost in costs.values())
    assert all(cost.prefill_ms > 0 for cost in costs.values())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--limit", 0), 2, "--limit 0 leaves no question"),
        (("--limit", 1), 3, "the 1 questions are about 1 picture"),
        (("--limit", 30, "--tokens", 64), 2, "--tokens 64 is not below the 64 tokens"),
        (("--modes", "best"), 2, "--modes 'best' is not known"),
        (("--tolerance", 0), 2, "--tolerance 0 is not between 0 and 100"),
        (("--split", "val"), 2, "--split 'val' is not known"),
        (("--limit", 30, "--max-new-tokens", 0), 2, "--max-new-tokens 0"),
        (("--against", "nope.onnx"), 3, "'nope.onnx' is not there"),
    ],
)
def test_bad_requests_get_a_sentence(
    pruned_export: BundlePaths, tmp_path: Path, arguments: tuple[Any, ...], code: int, message: str
) -> None:
    found = _invoke(
        pruned_export.graph, "--data", "easy-vqa", "--output", tmp_path, *QUICK, *arguments
    )
    assert (found.exit_code, found.stdout) == (code, "")
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_model_given_twice_or_without_pruning_is_refused(
    pruned_export: BundlePaths, float_export: BundlePaths, tmp_path: Path
) -> None:
    rest = ("--data", "easy-vqa", "--limit", 30, "--output", tmp_path, *QUICK)
    found = _invoke(pruned_export.graph, "--against", pruned_export.graph, *rest)
    assert (found.exit_code, "the same model is given twice" in found.stderr) == (2, True)
    other = tmp_path / "other"
    shutil.copytree(pruned_export.graph.parent, other)
    path = BundlePaths(other / "model.onnx").assets / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, "image_tokens": 256}), encoding="utf-8")
    found = _invoke(pruned_export.graph, "--against", other / "model.onnx", *rest)
    assert found.exit_code == 2
    assert "a picture has 256 tokens in" in found.stderr
    found = _invoke(float_export.graph, *rest)
    assert found.exit_code == 2
    assert "drops no image tokens" in found.stderr
    assert "Export the model with --keep-tokens" in found.stderr


def test_an_export_that_keeps_a_number_of_its_own_of_each_picture_is_refused(
    pruned_export: BundlePaths, tmp_path: Path
) -> None:
    ruled = tmp_path / "ruled"
    shutil.copytree(pruned_export.graph.parent, ruled)
    path = BundlePaths(ruled / "model.onnx").assets / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    prune = {**manifest["config"]["prune"], "keep_rule": "mass:0.5"}
    assert manifest["config"]["prune"]["keep_rule"] is None
    manifest["config"]["prune"] = prune
    path.write_text(json.dumps(manifest), encoding="utf-8")
    found = _invoke(
        ruled / "model.onnx", "--data", "easy-vqa", "--limit", 30, "--output", tmp_path, *QUICK
    )
    assert (found.exit_code, found.stdout) == (2, "")
    assert "was exported with --keep-rule mass:0.5" in found.stderr
    assert "Export the model without --keep-rule to analyse it" in found.stderr


def test_a_selector_that_the_file_has_no_inputs_for_is_refused(
    pruned_export: BundlePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = PruneGraph(pruned_export)
    from bivlm_edge.redundancy import selectors

    monkeypatch.setattr(selectors, "_has_input", lambda *_: False)
    with pytest.raises(RequestError, match="mode topk_score needs scores of the image tokens"):
        graph.with_mode("topk_score", 0)
    with pytest.raises(RequestError, match="random cannot draw for each picture"):
        graph.with_mode("random", 0)
    assert graph.with_mode("maxmin", 0)


@pytest.mark.parametrize("kept", [8, 64])
def test_run_shows_the_tokens_that_it_kept(
    pruned_export: BundlePaths, pictures: list[VqaItem], tmp_path: Path, kept: int
) -> None:
    path = tmp_path / "tokens.png"
    found = CliRunner().invoke(
        run.app,
        [
            str(pruned_export.graph), "what is 1", "--image", str(pictures[0].image.path),
            "--keep-tokens", str(kept / IMAGE_TOKENS), "--show-tokens", str(path),
        ],
    )  # fmt: skip
    assert found.exit_code == 0
    assert found.stdout.endswith("\n")
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    top = image.height - 16 - 512
    frames = [
        image.getpixel((16 + 64 * (cell % 8), top + 64 * (cell // 8))) == (255, 170, 0)
        for cell in range(IMAGE_TOKENS)
    ]
    assert sum(frames) == kept
