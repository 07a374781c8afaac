"""The loop on a model whose answer is known: caches, positions, pictures, pruning, ends."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bivlm_edge.errors import BundleError, RequestError
from bivlm_edge.runtime import Answerer, Generation, greedy, load, top_p_sampler
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.runtime.kv_cache import GROWTH, KvCache


def _picture(red: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (red, 0, 0))


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("question", ["a", "what is this?", "which one, then?"])
def test_answer_is_the_one_computed_in_python(
    make_bundle: Any, question: str, prunes: bool, fp16: bool
) -> None:
    bundle = make_bundle(prunes=prunes, fp16=fp16)
    answerer = Answerer(load(bundle.graph))
    for red in (0, 3):
        picture = answerer.picture(_picture(red))
        generation = answerer.ask(question, picture)
        ids = [int(i) for i in answerer.prompts.encode(question, picture)]
        assert ids.count(2) == 6
        assert list(generation) == bundle.answer(ids, 16 * red, 12)
        assert generation.prompt_tokens == len(ids)
        assert generation.kept_tokens == len(ids) - (3 if prunes else 0)


def test_answer_without_a_picture(bundle: Any) -> None:
    answerer = Answerer(load(bundle.graph))
    generation = answerer.ask("what is this?")
    ids = [int(i) for i in answerer.prompts.encode("what is this?")]
    assert list(generation) == bundle.answer(ids, 0, 12)
    assert generation.kept_tokens == len(ids)


def test_a_copy_can_be_continued_like_the_cache_itself(bundle: Any) -> None:
    session = load(bundle.graph)
    cache = KvCache(session)
    run_step(session, np.array([3, 40, 41, 42]), cache)
    copy = cache.copy()
    assert (copy.tokens, copy.position, copy.capacity) == (4, 4, cache.capacity)
    following = np.array([50], dtype=np.int64)
    first = run_step(session, following, cache)
    run_step(session, np.array([51]), cache)
    second = run_step(session, following, copy)
    np.testing.assert_array_equal(first.logits, second.logits)
    assert (cache.tokens, cache.position) == (6, 6)
    assert (copy.tokens, copy.position) == (5, 5)


def test_a_rewound_cache_can_be_continued_another_way(bundle: Any) -> None:
    session = load(bundle.graph)
    cache, other = KvCache(session), KvCache(session)
    run_step(session, np.array([3, 40, 41]), cache)
    run_step(session, np.array([50, 51, 52]), cache)
    cache.rewind(3, 3)
    found = run_step(session, np.array([60, 61]), cache)
    run_step(session, np.array([3, 40, 41]), other)
    expected = run_step(session, np.array([60, 61]), other)
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert (cache.tokens, cache.position) == (5, 5)
    with pytest.raises(ValueError, match="cannot rewind 5 tokens, position 5, to 6 tokens"):
        cache.rewind(6, 6)


def test_the_prompt_tokens_that_pruning_kept_are_known(make_bundle: Any) -> None:
    answerer = Answerer(load(make_bundle(prunes=True).graph))
    picture = answerer.picture(_picture(3))
    generation = answerer.ask("hi", picture)
    assert generation.kept_indices.tolist() == []
    list(generation)
    # the mock drops every second placeholder; the first token is the user's mark
    assert generation.kept_indices.tolist() == [0, 1, 3, 5, 7, 8, 9]
    assert generation.kept_tokens == 7


def test_steps_write_into_the_same_memory(bundle: Any) -> None:
    session = load(bundle.graph)
    cache = KvCache(session, capacity=8)
    tensors = cache.tensors
    addresses = [tensor.data_ptr() for tensor in tensors]
    run_step(session, np.array([3, 40, 41]), cache)
    run_step(session, np.array([50]), cache)
    run_step(session, np.array([51]), cache)
    assert [tensor.data_ptr() for tensor in cache.tensors] == addresses
    keys = tensors[0].numpy()[0, 0, :, 0]
    assert keys.tolist() == [3, 40, 41, 50, 51, 0, 0, 0]


def test_a_cache_is_freed_with_its_last_reference(bundle: Any) -> None:
    session = load(bundle.graph)
    cache = KvCache(session, capacity=8)
    run_step(session, np.array([3, 40, 41]), cache)
    run_step(session, np.array([50]), cache)
    reference = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert reference() is None, "held until the garbage collector finds it"
    finally:
        gc.enable()


def test_logits_of_a_step_survive_the_next(bundle: Any) -> None:
    session = load(bundle.graph)
    cache = KvCache(session, capacity=8)
    run_step(session, np.array([3, 40, 41]), cache)
    step = run_step(session, np.array([50]), cache)
    before = step.logits.copy()
    run_step(session, np.array([51]), cache)
    np.testing.assert_array_equal(step.logits, before)


def test_a_full_cache_grows_up_to_the_context_and_no_further(make_bundle: Any) -> None:
    session = load(make_bundle(context=400).graph)
    ids = np.arange(20, 60, dtype=np.int64)
    roomy, tight = KvCache(session, capacity=400), KvCache(session, capacity=3)
    capacities = []
    for _ in range(10):
        rooms = run_step(session, ids, roomy)
        steps = run_step(session, ids, tight)
        np.testing.assert_array_equal(rooms.logits, steps.logits)
        capacities.append(tight.capacity)
    assert capacities == [3 + GROWTH] * 6 + [400] * 4
    for mine, theirs in zip(roomy.tensors, tight.tensors, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    assert (tight.used_bytes, tight.allocated_bytes) == (400 * 16, 400 * 16)


def test_tokens_beyond_the_context_are_refused_with_the_numbers(make_bundle: Any) -> None:
    session = load(make_bundle(prunes=True, context=8).graph)
    pixels = np.ones((1, 3, 4, 4), dtype=np.float32)
    cache = KvCache(session)
    run_step(session, np.array([3, 2, 2, 2, 2, 40]), cache, pixels)
    with pytest.raises(RequestError, match=r"3 tokens behind position 6 .* takes 8 in all"):
        run_step(session, np.array([3, 4, 5]), cache)
    with pytest.raises(RequestError, match=r"9 tokens do not fit .* takes 8 in all"):
        KvCache(session, capacity=9)
    assert (cache.tokens, cache.position) == (4, 6)


def test_position_counts_the_dropped_tokens(make_bundle: Any) -> None:
    session = load(make_bundle(prunes=True).graph)
    ids = np.array([3, 2, 2, 2, 2, 40], dtype=np.int64)
    pixels = np.ones((1, 3, 4, 4), dtype=np.float32)
    cache = KvCache(session)
    step = run_step(session, ids, cache, pixels)
    assert step.kept.tolist() == [0, 1, 3, 5]
    assert (cache.tokens, cache.position) == (4, 6)


def _first_answers(bundle: Any) -> tuple[list[int], list[int]]:
    """A prompt whose answer is longer than four tokens, and its answer."""
    for first in range(20, 60):
        answer = bundle.answer([3, first, 4], 0, 12)
        if len(answer) > 4:
            return [3, first, 4], answer
    raise AssertionError("no such prompt")


def test_length_limit_ends_the_answer(bundle: Any) -> None:
    prompt, answer = _first_answers(bundle)
    generation = Generation(load(bundle.graph), np.array(prompt), max_new_tokens=3)
    assert list(generation) == answer[:3]
    assert (generation.stop_reason, generation.new_tokens) == ("length", 3)


def test_end_token_ends_the_answer_and_is_not_yielded(bundle: Any) -> None:
    for first in range(20, 60):
        answer = bundle.answer([3, first, 4], 0, 12)
        if 0 < len(answer) < 12:
            break
    generation = Generation(load(bundle.graph), np.array([3, first, 4]))
    assert list(generation) == answer
    assert generation.stop_reason == "end"
    assert list(generation) == []


def test_full_context_ends_the_answer(make_bundle: Any) -> None:
    bundle = make_bundle(context=7)
    prompt, answer = _first_answers(bundle)
    generation = Generation(load(bundle.graph), np.array(prompt), max_new_tokens=12)
    assert list(generation) == answer[:4]
    assert generation.stop_reason == "context"


@pytest.mark.parametrize("length", [48, 49, 500])
def test_prompt_that_fills_the_context_is_refused_with_the_numbers(
    bundle: Any, length: int
) -> None:
    ids = np.full(length, 2, dtype=np.int64)
    with pytest.raises(RequestError, match=rf"{length} tokens \({length} of them for images\).*48"):
        Generation(load(bundle.graph), ids)


def test_prompt_one_below_the_context_gets_one_token(make_bundle: Any) -> None:
    bundle = make_bundle(context=4)
    prompt, answer = _first_answers(bundle)
    assert list(Generation(load(bundle.graph), np.array(prompt))) == answer[:1]


@pytest.mark.parametrize(("placeholders", "images"), [(5, 1), (7, 1), (6, 0), (6, 2), (0, 1)])
def test_placeholders_for_other_images_are_refused_with_both_numbers(
    bundle: Any, placeholders: int, images: int
) -> None:
    ids = np.array([3, *[2] * placeholders, 40])
    pixels = np.zeros((images, 3, 4, 4), dtype=np.float32) if images else None
    message = rf"has {placeholders} image placeholders; {images} images .* need {images * 6}"
    with pytest.raises(RequestError, match=message):
        Generation(load(bundle.graph), ids, pixels)


def test_empty_ids_and_zero_new_tokens_are_refused(bundle: Any) -> None:
    session = load(bundle.graph)
    with pytest.raises(RequestError, match="no tokens"):
        Generation(session, np.array([], dtype=np.int64))
    with pytest.raises(RequestError, match="--max-new-tokens 0"):
        Generation(session, np.array([3]), max_new_tokens=0)


def test_run_that_onnxruntime_refuses_names_file_and_tokens(bundle: Any) -> None:
    session = load(bundle.graph)
    wrong = np.zeros((1, 3, 9, 9), dtype=np.float32)
    with pytest.raises(BundleError, match=r"model\.onnx' failed in ONNX Runtime on 2 tokens"):
        run_step(session, np.array([3, 2]), KvCache(session), wrong)


def test_greedy_takes_the_lowest_of_equal_logits_and_refuses_nan() -> None:
    assert greedy(np.array([0.0, 2.0, 2.0], dtype=np.float32)) == 1
    for bad in (np.nan, np.inf):
        with pytest.raises(BundleError, match="as a logit"):
            greedy(np.array([0.0, bad, 2.0], dtype=np.float32))


def test_temperature_zero_is_greedy_and_seed_repeats_the_draws() -> None:
    assert top_p_sampler(0.0) is greedy
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    draws = [[top_p_sampler(1.0, 0.9, seed=7)(logits) for _ in range(1)] for _ in range(2)]
    assert draws[0] == draws[1]


def test_draws_follow_the_softmax_and_top_p_cuts_the_tail() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    draw = top_p_sampler(1.0, seed=0)
    counts = np.bincount([draw(logits) for _ in range(4000)], minlength=4) / 4000
    # five standard deviations of a frequency over 4000 draws are below 0.04
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.04)
    nucleus = top_p_sampler(1.0, 0.75, seed=0)
    assert {nucleus(logits) for _ in range(400)} == {0, 1}
    assert {top_p_sampler(1.0, 1e-9, seed=s)(logits) for s in range(20)} == {0}


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_bad_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(RequestError, match="--temperature"):
        top_p_sampler(temperature)


@pytest.mark.parametrize("top_p", [0.0, 1.5])
def test_bad_top_p_is_refused(top_p: float) -> None:
    with pytest.raises(RequestError, match="--top-p"):
        top_p_sampler(1.0, top_p)


def test_cache_bytes_follow_the_type(make_bundle: Any) -> None:
    session = load(make_bundle("a").graph)
    assert KvCache.bytes_per_token(session) == 2 * 2 * 1 * 1 * 4
    wide = replace(session, manifest=replace(session.manifest, layers=3, kv_heads=2, head_dim=8))
    assert KvCache.bytes_per_token(wide) == 2 * 3 * 2 * 8 * 4
    assert KvCache.bytes_per_token(load(make_bundle("b", fp16=True).graph)) == 2 * 2 * 1 * 1 * 2
