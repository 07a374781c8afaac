"""What a comparison runs, from what a user types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from bivlm_edge.compare import specification
from bivlm_edge.compare.specification import parse_run, plan
from bivlm_edge.config import STAGES, QuantConfig
from bivlm_edge.errors import RequestError


@dataclass(frozen=True)
class Options:
    """A QuantConfig of the future."""

    method: str = "bivlm-edge"
    bits: float = 2.0
    seed: int = 0
    importance: Literal["none", "vlmq"] | None = None
    without: frozenset[str] = frozenset()
    paper_exact: bool = False
    table: dict[str, int] | None = None


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


def test_new_fields_are_read_by_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specification, "QuantConfig", Options)
    run = parse_run("bivlm-edge,importance=vlmq,without=hadamard+prefix,paper_exact=true")
    assert run.config == Options(  # type: ignore[comparison-overlap]
        importance="vlmq", without=frozenset({"hadamard", "prefix"}), paper_exact=True
    )
    with pytest.raises(RequestError, match="table cannot be given in a run"):
        parse_run("bivlm-edge,table=1")
    with pytest.raises(RequestError, match="paper_exact=yes is neither true nor false"):
        parse_run("bivlm-edge,paper_exact=yes")


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


def test_ablation_switches_off_each_stage_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specification, "QuantConfig", Options)
    monkeypatch.setattr(specification, "STAGES", ("prefix", "refit"))
    runs = plan([], [2.0, 1.5], [], ablate=True, defaults={})
    assert [run.name for run in runs] == [
        "none",
        "bivlm-edge@2", "bivlm-edge@2,without=prefix", "bivlm-edge@2,without=refit",
        "bivlm-edge@1.5", "bivlm-edge@1.5,without=prefix", "bivlm-edge@1.5,without=refit",
    ]  # fmt: skip
    assert runs[2].config == Options(  # type: ignore[comparison-overlap]
        without=frozenset({"prefix"})
    )


def test_every_stage_of_the_method_can_be_switched_off() -> None:
    runs = plan([], [2.0], [], ablate=True, defaults={})
    assert [run.config.without for run in runs[2:]] == [(stage,) for stage in STAGES]
    assert STAGES
