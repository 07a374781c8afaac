"""The number of image tokens that a run keeps, chosen at run time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import SAMPLES, export_reference
from numpy.typing import NDArray
from typer.testing import CliRunner

from bivlm_edge.bundle import BundlePaths
from bivlm_edge.cli import bench, run
from bivlm_edge.cli import eval as evaluation
from bivlm_edge.config import ExportConfig, PruneConfig, QuantConfig
from bivlm_edge.datasets import VqaItem
from bivlm_edge.errors import BundleError, RequestError
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.generate import Step, run_step
from bivlm_edge.runtime.kv_cache import KvCache
from bivlm_edge.runtime.session import VlmSession

IMAGE_TOKENS = 64
KEPT = 16  # by the export's fraction


@pytest.fixture(scope="module")
def float_pruned(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    config = ExportConfig(QuantConfig(method="none"), PruneConfig(keep_ratio=KEPT / IMAGE_TOKENS))
    return export_reference(tmp_path_factory.mktemp("float_pruned"), config)


@pytest.fixture(scope="module")
def two_bit_pruned(tmp_path_factory: pytest.TempPathFactory) -> BundlePaths:
    """As `two_bit_export`, float16 cache and all, with the default selection of tokens."""
    quant = QuantConfig(calibration_samples=SAMPLES)
    config = ExportConfig(quant, PruneConfig(keep_ratio=KEPT / IMAGE_TOKENS))
    return export_reference(tmp_path_factory.mktemp("two_bit_pruned"), config)


def prefill(session: VlmSession, item: VqaItem) -> tuple[Step, NDArray[np.int64], KvCache]:
    answerer = Answerer(session)
    picture = answerer.picture(item.image.open())
    ids = answerer.prompts.encode(item.question, picture)
    cache = KvCache(session, len(ids) + 8)
    return run_step(session, ids, cache, picture.pixels), ids, cache


@pytest.mark.parametrize("custom_ops", [True, False])
@pytest.mark.parametrize("tokens", [None, 0, 1, 7, IMAGE_TOKENS - 1, IMAGE_TOKENS, 1000])
def test_a_run_keeps_as_many_tokens_as_asked_for_and_all_text(
    float_pruned: BundlePaths, pictures: list[VqaItem], tokens: int | None, custom_ops: bool
) -> None:
    session = load(float_pruned.graph, custom_ops=custom_ops, threads=1).keeping(tokens)
    step, ids, cache = prefill(session, pictures[0])
    is_image = ids == session.manifest.image_token_id
    wanted = KEPT if tokens is None else min(tokens, IMAGE_TOKENS)
    assert np.count_nonzero(is_image[step.kept]) == wanted
    assert np.isin(np.flatnonzero(~is_image), step.kept).all()
    assert np.isfinite(step.logits).all()
    assert cache.position == len(ids)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float_pruned", np.float32), ("two_bit_pruned", np.float16)]
)
def test_reported_cache_bytes_are_those_of_the_tensors_that_a_plain_run_returns(
    name: str, dtype: type, request: pytest.FixtureRequest, pictures: list[VqaItem]
) -> None:
    paths: BundlePaths = request.getfixturevalue(name)
    session = load(paths.graph, threads=1).keeping(7)
    _, ids, cache = prefill(session, pictures[0])
    manifest = session.manifest
    empty = np.zeros((1, manifest.kv_heads, 0, manifest.head_dim), dtype)
    given = {
        "input_ids": ids[None],
        "position_ids": np.arange(len(ids))[None],
        "pixel_values": Answerer(session).picture(pictures[0].image.open()).pixels,
        "keep_tokens": np.array(7),
        **dict.fromkeys(session.past_names, empty),
    }
    names = [output.name for output in session.ort.get_outputs()]
    found = dict(zip(names, session.ort.run(None, given), strict=True))
    present = [array for output, array in found.items() if output.startswith("present.")]
    assert len(present) == 2 * manifest.layers
    assert {array.dtype for array in present} == {np.dtype(dtype)}
    assert cache.used_bytes == sum(array.nbytes for array in present)


@pytest.mark.parametrize(
    "names", [("float_pruned", "float_export"), ("two_bit_pruned", "two_bit_export")]
)
def test_all_tokens_give_the_logits_of_the_unpruned_export_bit_by_bit(
    names: tuple[str, str], request: pytest.FixtureRequest, pictures: list[VqaItem]
) -> None:
    pruned, whole = (load(request.getfixturevalue(name).graph, threads=1) for name in names)
    for item in pictures[:3]:
        step, _, cache = prefill(pruned.keeping(IMAGE_TOKENS), item)
        expected, _, other = prefill(whole, item)
        np.testing.assert_array_equal(step.logits, expected.logits)
        token = np.array([int(step.logits.argmax())])
        following = run_step(pruned, token, cache)
        np.testing.assert_array_equal(following.logits, run_step(whole, token, other).logits)


def test_one_session_serves_several_numbers(
    float_pruned: BundlePaths, pictures: list[VqaItem]
) -> None:
    session = load(float_pruned.graph, threads=1)
    fewer = session.keeping_fraction(0.1)
    assert fewer.ort is session.ort
    assert fewer.keep_tokens == 7
    before, _, _ = prefill(session, pictures[1])
    prefill(fewer, pictures[1])
    after, _, _ = prefill(session.keeping(None), pictures[1])
    np.testing.assert_array_equal(before.logits, after.logits)


def test_bad_numbers_are_refused(
    float_pruned: BundlePaths, float_export: BundlePaths, pictures: list[VqaItem]
) -> None:
    session = load(float_pruned.graph, threads=1)
    with pytest.raises(RequestError, match=r"-1 image tokens cannot be kept"):
        session.keeping(-1)
    with pytest.raises(RequestError, match=r"--keep-tokens 1.5 is not a fraction"):
        session.keeping_fraction(1.5)
    with pytest.raises(RequestError, match=r"was exported without pruning.*--keep-tokens 0.5"):
        load(float_export.graph, threads=1).keeping(8)
    object.__setattr__(session, "keep_tokens", -3)
    with pytest.raises(BundleError, match=r"keep is -3"):
        prefill(session, pictures[0])


def test_commands_take_a_fraction(
    float_pruned: BundlePaths, float_export: BundlePaths, pictures: list[VqaItem]
) -> None:
    image = str(pictures[0].image.path)
    model = str(float_pruned.graph)
    fraction = ["--keep-tokens", "0.125", "--threads", "1", "--json"]
    found = CliRunner().invoke(run.app, [model, "what is 1", "--image", image, *fraction])
    answer = json.loads(found.stdout)
    assert answer["prompt_tokens"] - answer["kept_tokens"] == IMAGE_TOKENS - 8
    found = CliRunner().invoke(
        evaluation.app, [model, "--data", "easy-vqa", "--limit", "2", *fraction]
    )
    scores = json.loads(found.stdout)
    assert scores["prompt_tokens"] - scores["kept_tokens"] == IMAGE_TOKENS - 8
    found = CliRunner().invoke(
        run.app, [str(float_export.graph), "what is 1", "--image", image, *fraction]
    )
    assert found.exit_code == 2
    assert "was exported without pruning" in found.stderr


def test_the_benchmark_measures_every_fraction(float_pruned: BundlePaths) -> None:
    arguments = [str(float_pruned.graph), "--keep-tokens", "1", "--keep-tokens", "0.5"]
    quick = ["--repeats", "1", "--warmups", "0", "--new-tokens", "2", "--threads", "1", "--json"]
    found = CliRunner().invoke(bench.app, [*arguments, *quick])
    whole, half = json.loads(found.stdout)["models"]
    assert (whole["label"], half["label"]) == ("model (1 kept)", "model (0.5 kept)")
    dropped = IMAGE_TOKENS // 2
    assert whole["kept_tokens"] - half["kept_tokens"] == dropped
    less = whole["kv_cache_bytes"] - half["kv_cache_bytes"]
    assert less == dropped * whole["kv_cache_bytes_per_token"]
    assert half["memory"]["after_run"]["vm_hwm"] > 0


def test_two_bits_with_the_default_selection_are_exported(
    two_bit_pruned: BundlePaths, pictures: list[VqaItem]
) -> None:
    """Scores of rounded features break the ties of places otherwise than torch's."""
    session = load(two_bit_pruned.graph, threads=1)
    step, ids, _ = prefill(session, pictures[0])
    is_image = ids == session.manifest.image_token_id
    assert np.count_nonzero(is_image[step.kept]) == KEPT
