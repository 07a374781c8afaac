"""What really gets loaded on a device (test_architecture.py reads the import statements)."""

from __future__ import annotations

import subprocess
import sys


def test_importing_runtime_and_commands_loads_no_training_library() -> None:
    program = (
        "import sys, bivlm_edge.runtime, bivlm_edge.cli.run, bivlm_edge.cli.eval, "
        "bivlm_edge.cli.bench, bivlm_edge.cli.inspect, bivlm_edge.cli.redundancy\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'scipy') if m in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
