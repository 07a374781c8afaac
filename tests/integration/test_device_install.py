"""The device's way to install: runtime packages only, then ours without dependencies."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHECK = """
import importlib.util
import bivlm_edge, bivlm_edge.runtime
from bivlm_edge.cli import bench, eval, inspect, run
missing = [name for name in ("torch", "transformers", "onnx", "scipy")
           if importlib.util.find_spec(name) is None]
print(",".join(missing))
"""


def test_runtime_imports_in_an_environment_without_torch(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # The operators were compiled for the environment of this test already.
    environment = {**os.environ, "BIVLM_BUILD_OPS": "0"}
    requirements = str(ROOT / "runtime/requirements.txt")
    for arguments in (["-r", requirements], ["--no-deps", str(ROOT)]):
        subprocess.run([*pip, *arguments], check=True, env=environment, stderr=subprocess.PIPE)
    done = subprocess.run(
        [str(python), "-P", "-c", CHECK], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch,transformers,onnx,scipy"


def test_pip_tells_the_terminal_that_the_cuda_library_is_not_built(tmp_path: Path) -> None:
    # scikit-build-core sets SKBUILD; pip keeps the output of CMake to itself
    options = f"-S {ROOT}/custom_ops -B {tmp_path} -DSKBUILD=2 -DBIVLM_CUDA=OFF"
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", f"cmake {options} >/dev/null", "/dev/null"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "bivlm-edge: CUDA library: not built, BIVLM_CUDA is OFF"
