"""Which operators a run spends its time in, from the events that ONNX Runtime records."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bivlm_edge.errors import BundleError

# The products of a matrix, packed or not; everything else moves, normalizes or attends.
MATMUL_OPERATORS = frozenset(
    (
        *("BinaryMatMul", "GroupMatMul", "MatMulNBits", "MatMul", "Gemm", "Conv"),
        *("FusedMatMul", "FusedGemm", "FusedConv", "NhwcFusedConv"),
    )
)
# Their events span those of the nodes in their bodies, which are recorded too and counted instead.
_WITH_BODIES = frozenset(("If", "Loop", "Scan"))
_KERNEL_SUFFIX = "_kernel_time"


@dataclass(frozen=True, slots=True)
class Stage:
    """Runs of one kind among all runs of a session.

    Attributes:
        name: e.g. "decode".
        runs: Their numbers, counted from the session's first run.
        tokens: Tokens given to each run.
        cached: Tokens in the KV cache before the first of them.
    """

    name: str
    runs: Sequence[int]
    tokens: int
    cached: int


def operator_profile(
    events: Sequence[Mapping[str, Any]], stages: Sequence[Stage]
) -> dict[str, dict[str, Any]]:
    """Sum up the events of a session by stage and operator.

    Args:
        events: The JSON that ONNX Runtime writes when profiling ends, of all runs.
        stages: The runs to report; others (warm-ups) are left out.

    Returns:
        By name of the stage: "runs" (how many), "tokens", "cached", "operators" (slowest first,
        each with "op", "count" of nodes per run, "us" per run and "share" of all nodes' time),
        "nodes_us" (all nodes), "matmul_us" and "other_us" (its two parts), "non_matmul_share".
        Times are medians over the runs. ONNX Runtime rounds every node down to whole microseconds;
        the time between nodes is not reported, because recording takes most of it.

    Raises:
        BundleError: The events hold fewer runs than the stages name.
    """
    runs = sorted(
        (event["ts"], event["dur"])
        for event in events
        if event.get("cat") == "Session" and event["name"] == "model_run"
    )
    if len(runs) <= max(run for stage in stages for run in stage.runs):
        raise BundleError(
            f"ONNX Runtime recorded {len(runs)} runs, fewer than were made, so that the profile is "
            "incomplete. Profile fewer runs, or install a newer onnxruntime."
        )
    nodes = [
        (event["ts"], event["dur"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith(_KERNEL_SUFFIX)
        and event["args"]["op_name"] not in _WITH_BODIES
    ]
    return {stage.name: _stage(stage, runs, nodes) for stage in stages}


_Node = tuple[int, int, str]  # start, duration, operator


def _stage(stage: Stage, runs: Sequence[tuple[int, int]], nodes: Sequence[_Node]) -> dict[str, Any]:
    per_run: list[defaultdict[str, list[int]]] = []
    for index in stage.runs:
        start, duration = runs[index]
        times: defaultdict[str, list[int]] = defaultdict(list)
        for ts, node_us, op in nodes:
            if start <= ts < start + duration:
                times[op].append(node_us)
        per_run.append(times)
    us = {op: _median([sum(t[op]) for t in per_run]) for op in {op for t in per_run for op in t}}
    total = sum(us.values())
    matmul = sum(time for op, time in us.items() if op in MATMUL_OPERATORS)
    return {
        "runs": len(stage.runs),
        "tokens": stage.tokens,
        "cached": stage.cached,
        "operators": [
            {
                "op": op,
                "count": max(len(times[op]) for times in per_run),
                "us": us[op],
                "share": _share(us[op], total),
            }
            for op in sorted(us, key=lambda op: (-us[op], op))
        ],
        "nodes_us": total,
        "matmul_us": matmul,
        "other_us": total - matmul,
        "non_matmul_share": _share(total - matmul, total),
    }


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
