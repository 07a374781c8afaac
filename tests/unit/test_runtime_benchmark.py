"""Workers in processes of their own, turn by turn; the numbers are checked for sense only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bivlm_edge import report
from bivlm_edge.errors import BivlmError, RequestError
from bivlm_edge.runtime import idle
from bivlm_edge.runtime.bench_worker import Job
from bivlm_edge.runtime.benchmark import (
    Contender,
    add_profiles,
    benchmark,
    machine,
    physical_cores,
    quartiles,
)
from bivlm_edge.runtime.process_memory import memory_bytes


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGB", (9, 7), (5, 0, 0)).save(path)
    return str(path)


def _contender(
    bundle: Any,
    image: str | None,
    label: str = "mock",
    new_tokens: int = 4,
    context: int | None = None,
) -> Contender:
    job = Job(str(bundle.graph), image, "hi", new_tokens, 1, custom_ops=False, context=context)
    return Contender(label, job)


def test_two_models_take_turns(make_bundle: Any, image: str) -> None:
    first = make_bundle("first", prunes=True)
    second = make_bundle("second", fp16=True)
    seen: list[int] = []
    result = benchmark(
        [_contender(first, image, "first"), _contender(second, image, "second")],
        repeats=3,
        warmups=1,
        on_progress=seen.append,
    )
    assert seen == list(range(1, 9))
    one, two = result["models"]
    assert (one["prompt_tokens"], one["kept_tokens"]) == (10, 7)
    assert (two["prompt_tokens"], two["kept_tokens"]) == (10, 10)
    assert one["kv_cache_bytes"] == (7 + 3) * 16
    assert two["kv_cache_bytes"] == (10 + 3) * 8
    # room for the prompt before pruning and the answer
    assert one["kv_cache_allocated_bytes"] == (10 + 4) * 16
    assert two["kv_cache_allocated_bytes"] == (10 + 4) * 8
    assert one["weight_bytes"] == sum(
        path.stat().st_size for path in (first.graph, first.paths.data)
    )
    for model in result["models"]:
        for name in ("ttft_ms", "decode_ms", "prefill_ms", "decode_tokens_per_s"):
            values = model[name]
            assert 0 < values["q1"] <= values["median"] <= values["q3"]
        assert model["load_ms"] > 0
    assert [row["label"] for row in result["ratios"]] == ["second"]
    assert (result["warmups"], result["repeats"], result["kernel"]) == (1, 3, "auto")
    assert report.to_json(result)
    assert len(report.benchmark_tables(result)) == 3


def test_memory_is_reported_at_three_moments(bundle: Any, image: str) -> None:
    if not memory_bytes():
        pytest.skip("no /proc here")
    memory = benchmark([_contender(bundle, image)], repeats=1, warmups=0)["models"][0]["memory"]
    assert list(memory) == ["before_load", "after_load", "after_run"]
    for moment in memory.values():
        assert set(moment) == {"vm_hwm", "rss_anon", "rss_file", "pss"}
        assert all(size > 1 << 20 for size in moment.values())
    assert memory["after_run"]["vm_hwm"] >= memory["after_load"]["vm_hwm"]


def test_text_alone_has_no_vision_time(bundle: Any) -> None:
    model = benchmark([_contender(bundle, None)], repeats=2, warmups=0)["models"][0]
    assert model["vision_ms"] == {"median": 0.0, "q1": 0.0, "q3": 0.0}
    assert model["prompt_tokens"] == 4


def test_error_of_a_worker_keeps_its_sentence_and_exit_code(bundle: Any, image: str) -> None:
    bundle.paths.data.unlink()
    with pytest.raises(BivlmError, match="is missing") as caught:
        benchmark([_contender(bundle, image)], repeats=1, warmups=0)
    assert caught.value.exit_code == 3


def test_answer_that_does_not_fit_the_context_is_refused(bundle: Any, image: str) -> None:
    with pytest.raises(
        BivlmError, match="takes 48 tokens; the prompt has 10 and --new-tokens is 39"
    ):
        benchmark([_contender(bundle, image, new_tokens=39)], repeats=1, warmups=0)


@pytest.mark.parametrize(("prunes", "kept"), [(False, 10), (True, 7)])
def test_context_fills_the_cache_before_decoding(
    make_bundle: Any, image: str, prunes: bool, kept: int
) -> None:
    bundle = make_bundle(prunes=prunes)
    model = benchmark([_contender(bundle, image, context=30)], repeats=1, warmups=0)["models"][0]
    assert (model["context"], model["kept_tokens"]) == (30, kept)
    assert model["kv_cache_bytes"] == (30 + 3) * 16


@pytest.mark.parametrize(
    ("prunes", "context", "message"),
    [
        (False, 45, r"takes 48 tokens; --context is 45 and --new-tokens 4"),
        (True, 42, r"--context is 42 \(45 with those that pruning dropped\) and --new-tokens 4"),
        (False, 9, "--context 9 is less than the 10 tokens of the prompt"),
        (False, 0, "--context must be 1 or more"),
    ],
)
def test_context_that_does_not_fit_is_refused(
    make_bundle: Any, image: str, prunes: bool, context: int, message: str
) -> None:
    bundle = make_bundle(prunes=prunes)
    with pytest.raises(BivlmError, match=message):
        benchmark([_contender(bundle, image, context=context)], repeats=1, warmups=0)


def test_profile_splits_prefill_and_a_decode_step_by_operator(make_bundle: Any, image: str) -> None:
    contender = _contender(make_bundle(), image, new_tokens=5, context=20)
    result = benchmark([contender], repeats=1, warmups=0)
    add_profiles(result, [contender])
    profile = result["models"][0]["profile"]
    prefill, decode = profile["prefill"], profile["decode"]
    assert (prefill["tokens"], prefill["cached"], prefill["runs"]) == (10, 0, 5)
    # four tokens follow the first; one of them is a warm-up
    assert (decode["tokens"], decode["cached"], decode["runs"]) == (1, 21, 3)
    counts = {row["op"]: row["count"] for row in decode["operators"]}
    assert counts["CumSum"] == 1
    assert sum(row["us"] for row in decode["operators"]) == decode["nodes_us"]
    assert profile["decode_non_matmul_share"] == decode["non_matmul_share"] == 1.0
    assert len(report.profile_tables(result["models"])) == 2
    assert report.to_json(result)


@pytest.mark.parametrize(("spinning_s", "waited_s"), [(0.0, 0.004), (0.03, 0.036), (9.0, 1.0)])
def test_waiting_ends_when_the_threads_rest_and_not_before(
    monkeypatch: pytest.MonkeyPatch, spinning_s: float, waited_s: float
) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(idle.time, "sleep", sleep)
    monkeypatch.setattr(idle.time, "perf_counter", lambda: now)
    monkeypatch.setattr(idle.time, "process_time", lambda: min(now, spinning_s))
    idle.wait_until_idle()
    assert now == pytest.approx(waited_s, abs=1e-3)


@pytest.mark.parametrize(("repeats", "warmups", "new_tokens"), [(0, 0, 4), (1, -1, 4), (1, 0, 1)])
def test_senseless_counts_are_refused(
    bundle: Any, repeats: int, warmups: int, new_tokens: int
) -> None:
    with pytest.raises(RequestError, match=r"--repeats|--new-tokens"):
        benchmark(
            [_contender(bundle, None, new_tokens=new_tokens)], repeats=repeats, warmups=warmups
        )


def test_quartiles_interpolate() -> None:
    assert quartiles([4.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "q1": 1.75, "q3": 3.25}


def test_machine_names_the_processor_and_no_host() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert 1 <= physical_cores() == found["physical_cores"] <= found["cores"]
    assert "host" not in " ".join(found)
