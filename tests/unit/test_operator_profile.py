"""Shares of operators, from events that a real session records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bivlm_edge.errors import BundleError
from bivlm_edge.runtime.operator_profile import Stage, operator_profile


def _branch(name: str, op: str) -> Any:
    return helper.make_graph(
        [helper.make_node(op, ["h"], [name])],
        name,
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", 64])],
    )


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three runs of MatMul -> If(Tanh | Sin): the condition is true in the second run only."""
    folder = tmp_path_factory.mktemp("profile")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node(
            "If", ["c"], ["y"], then_branch=_branch("a", "Tanh"), else_branch=_branch("b", "Sin")
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 64]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 64])],
        [numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "nodes")
    session = ort.InferenceSession(model.SerializeToString(), options)
    for condition in (False, True, False):
        x = np.ones((2000, 64), dtype=np.float32)
        session.run(None, {"x": x, "c": np.array(condition)})
    found: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return found


def test_nodes_of_a_branch_count_once_and_in_their_run_only(events: list[dict[str, Any]]) -> None:
    stages = [Stage("true", [1], 5, 0), Stage("false", [0, 2], 1, 9)]
    found = operator_profile(events, stages)
    assert {row["op"]: row["count"] for row in found["true"]["operators"]} == {
        "MatMul": 1,
        "Tanh": 1,
    }
    assert {row["op"]: row["count"] for row in found["false"]["operators"]} == {
        "MatMul": 1,
        "Sin": 1,
    }
    assert (found["false"]["runs"], found["false"]["tokens"], found["false"]["cached"]) == (2, 1, 9)


def test_parts_add_up_and_slowest_comes_first(events: list[dict[str, Any]]) -> None:
    found = operator_profile(events, [Stage("true", [1], 5, 0)])["true"]
    times = {row["op"]: row["us"] for row in found["operators"]}
    recorded = {
        event["args"]["op_name"]: event["dur"] for event in events if event["cat"] == "Node"
    }
    assert times["Tanh"] == recorded["Tanh"] > 0
    assert found["matmul_us"] == times["MatMul"]
    assert found["other_us"] == times["Tanh"]
    assert found["nodes_us"] == times["MatMul"] + times["Tanh"]
    assert found["non_matmul_share"] == pytest.approx(times["Tanh"] / found["nodes_us"], abs=1e-4)
    assert [row["us"] for row in found["operators"]] == sorted(times.values(), reverse=True)
    assert sum(row["share"] for row in found["operators"]) == pytest.approx(1, abs=1e-3)


def test_missing_runs_are_refused_with_their_number(events: list[dict[str, Any]]) -> None:
    with pytest.raises(BundleError, match="recorded 3 runs, fewer than were made"):
        operator_profile(events, [Stage("decode", [3], 1, 0)])
