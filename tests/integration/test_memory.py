"""What stays in memory: of weights nothing but the mapped file, of a prompt its KV cache."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.tape import Tape

import bivlm_edge
from bivlm_edge.bundle import BundlePaths
from bivlm_edge.export import data_file

MEGABYTES = int(os.environ.get("BIVLM_TEST_WEIGHT_MB", "128"))
SIDE = 8192  # one layer: 8192 x 8192 at two planes = 16 MiB of codes

LOAD = """
import sys
import onnxruntime

def anonymous_kib():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[2])
before = anonymous_kib()
session = onnxruntime.InferenceSession(sys.argv[1], options)
print((anonymous_kib() - before) // 1024, anonymous_kib() // 1024)
"""

PROMPT = """
import sys
import numpy as np
from bivlm_edge.runtime import KvCache, load
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.memory import keep_no_freed_memory
from bivlm_edge.runtime.process_memory import memory_bytes

keep_no_freed_memory()
session = load(sys.argv[1], threads=1)
tokens = session.manifest.context_length - 1
cache = KvCache(session, tokens + 1)
run_step(session, np.full(1, 30), cache)
before = memory_bytes()["rss_anon"]
run_step(session, np.full(tokens, 30), cache)
print(memory_bytes()["rss_anon"] - before - cache.used_bytes)
"""

FREED = """
import sys
import numpy as np
from bivlm_edge.memory import keep_no_freed_memory
from bivlm_edge.runtime.process_memory import memory_bytes

if sys.argv[1] == "none":
    keep_no_freed_memory()
array = np.ones(30 << 20, np.uint8)
del array  # malloc's threshold rises to this size
before = memory_bytes()["rss_anon"]
array = np.ones(20 << 20, np.uint8)
del array
print(memory_bytes()["rss_anon"] - before)
"""

on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc/self/status"
)


def printed(script: str, *arguments: str) -> list[int]:
    """Run a script in a process of its own; return the numbers that it prints."""
    command = [sys.executable, "-P", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(value) for value in done.stdout.split()]


def write_stack(path: Path, megabytes: int) -> int:
    """Write a chain of BinaryMatMul layers with random weights; return their bytes."""
    rng = np.random.default_rng(0)
    tape = Tape()
    x = ir.Value(name="x", shape=ir.Shape(["m", SIDE]), type=ir.TensorType(ir.DataType.FLOAT))
    y, written = x, 0
    layer = 0
    while written < megabytes << 20:
        codes = rng.integers(0, 256, (SIDE // 16, 4 * SIDE), dtype=np.uint8)
        coefficients = rng.uniform(1e-3, 1e-2, (SIDE // 16, 2, 16)).astype(np.float16)
        weights = [
            tape.initializer(ir.tensor(array, name=f"{layer}.{name}"), name=f"{layer}.{name}")
            for name, array in (("codes", codes), ("coefficients", coefficients))
        ]
        attributes = {"K": SIDE, "N": SIDE, "plane_columns": [SIDE, SIDE]}
        y = tape.op("BinaryMatMul", [y, *weights], attributes, domain="ai.bivlm")
        written += codes.nbytes + coefficients.nbytes
        layer += 1
    y.name, y.type, y.shape = "y", x.type, ir.Shape(["m", SIDE])
    graph = ir.Graph(
        [x],
        [y],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": 23, "ai.bivlm": 1},
        name="stack",
    )
    data_file.save(ir.Model(graph, ir_version=10), path, path.name + ".data")
    return written


@on_linux
def test_loading_maps_the_weights(tmp_path: Path) -> None:
    written = write_stack(tmp_path / "stack.onnx", MEGABYTES)
    assert (tmp_path / "stack.onnx.data").stat().st_size >= written
    library = bivlm_edge.custom_ops_library()
    growth, anonymous = printed(LOAD, str(tmp_path / "stack.onnx"), library)
    assert growth < 16, f"loading {written >> 20} MiB of weights grew RssAnon by {growth} MiB"
    assert anonymous < 100, f"RssAnon is {anonymous} MiB after load"


@on_linux
def test_activations_of_a_prompt_are_given_back(float_export: BundlePaths) -> None:
    (left,) = printed(PROMPT, str(float_export.graph))
    assert left < 4 << 20  # 1,023 tokens take 16 MiB


@on_linux
def test_freed_blocks_are_given_back() -> None:
    (left,) = printed(FREED, "none")
    assert left < 1 << 20
    if platform.libc_ver()[0] == "glibc":
        assert printed(FREED, "some")[0] > 16 << 20
