"""What a comparison runs, from what a user types."""

from __future__ import annotations

import pytest

from bivlm_edge.compare.specification import parse_run, plan
from bivlm_edge.config import STAGES, QuantConfig
from bivlm_edge.errors import RequestError


def test_method_bits_and_options_become_a_config() -> None:
    defaults = {"seed": 1, "calibration_samples": 9}
    run = parse_run("bivlm-edge@1.5,seed=3,calibration-samples=7", defaults)
    assert run.config == QuantConfig(bits=1.5, seed=3, calibration_samples=7)
    assert parse_run("rtn@4", defaults).config == QuantConfig(
        method="rtn", bits=4, seed=1, calibration_samples=9
    )
    assert (run.name, run.budget) == ("bivlm-edge@1.5,seed=3,calibration-samples=7", 1.5)
    assert run.series == "bivlm-edge,seed=3,calibration-samples=7"


def test_method_with_bits_of_its_own_has_no_budget() -> None:
    run = parse_run("bivlm-paper,n_uns=1")
    assert (run.name, run.budget, run.config.n_uns) == ("bivlm-paper,n_uns=1", None, 1)


def test_every_field_is_read_by_its_type() -> None:
    run = parse_run(
        "bivlm-edge,importance=vlmq,without=hadamard+prefix,tune=both,tune_signs=true,"
        "tune_samples=8,tune_rate=0.5"
    )
    assert run.config == QuantConfig(
        importance="vlmq",
        without=("hadamard", "prefix"),
        tune="both",
        tune_signs=True,
        tune_samples=8,
        tune_rate=0.5,
    )
    with pytest.raises(RequestError, match="paper_exact=yes is neither true nor false"):
        parse_run("bivlm-paper,paper_exact=yes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtpq@2", "the method 'gtpq' is not known"),
        ("gptq@1.25", r"run 'gptq@1.25': --bits 1.25 does not go with --method gptq"),
        ("bivlm-edge@0.5", "--bits 0.5 is outside 1 to 4"),
        ("bivlm-edge@two", "bits=two is not a number"),
        ("bivlm-paper@2", "bivlm-paper has bits of its own"),
        ("none@32", "none has bits of its own"),
        ("bivlm-edge,seed", "'seed' is not OPTION=VALUE"),
        ("bivlm-edge,colour=red", "Options: calibration_samples"),
        ("bivlm-edge,seed=x", "seed=x is not a number"),
        ("bivlm-edge,method=rtn", "'method=rtn' is not OPTION=VALUE"),
    ],
)
def test_bad_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_run(text)


def test_plan_is_float_then_methods_by_budgets_each_once() -> None:
    runs = plan(
        ["bivlm-edge", "bivlm-paper", "none"], [2.0, 1.25], ["bivlm-edge@2", "rtn@4"],
        ablate=False, defaults={"seed": 5},
    )  # fmt: skip
    assert [run.name for run in runs] == [
        "none", "bivlm-edge@2", "bivlm-edge@1.25", "bivlm-paper", "rtn@4",
    ]  # fmt: skip
    assert {run.config.seed for run in runs} == {5}


def test_budget_that_a_method_does_not_accept_is_refused_before_anything_runs() -> None:
    with pytest.raises(RequestError, match=r"run 'gptq@1.25'.*2, 4 or 8|run 'gptq@1.25'.*or 8"):
        plan(["bivlm-edge", "gptq"], [2.0, 1.25], [], ablate=False, defaults={})


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(RequestError, match="nothing to compare"):
        plan([], [2.0], [], ablate=False, defaults={})
    assert [run.name for run in plan(["none"], [2.0], [], ablate=False, defaults={})] == ["none"]


def test_ablation_switches_off_each_stage_in_turn_and_tunes() -> None:
    runs = plan([], [2.0, 1.5], [], ablate=True, defaults={})
    assert STAGES
    assert [(run.config.bits, run.config.without, run.config.tune_signs) for run in runs[1:]] == [
        (bits, without, signs)
        for bits in (2.0, 1.5)
        for without, signs in [
            ((), False), *(((stage,), False) for stage in STAGES), ((), False), ((), True),
        ]
    ]  # fmt: skip
    tuned = [run for run in runs if run.config.tune != "none"]
    assert [run.name for run in tuned[:2]] == [
        "bivlm-edge@2,tune=end-to-end,tune_steps=50",
        "bivlm-edge@2,tune=end-to-end,tune_signs=true,tune_steps=50",
    ]
    assert len(tuned) == 4
