"""Which code a result depends on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bivlm_edge import provenance

# Loaded along, but without a say in results.
OTHER = {
    "__init__.py",
    "_ops_library.py",
    "bundle.py",
    "compare/__init__.py",
    "errors.py",
    "memory.py",
    "provenance.py",
    "pruning.py",
    "runtime/__init__.py",
    "runtime/answer.py",
    "runtime/generate.py",
    "runtime/kv_cache.py",
    "runtime/ort_errors.py",
    "runtime/process_memory.py",
    "runtime/providers.py",
    "runtime/sampling.py",
    "runtime/session.py",
}


def test_all_code_that_a_run_loads_is_counted_or_known_to_have_no_say() -> None:
    script = (
        "import sys, pathlib, bivlm_edge, bivlm_edge.compare.job, bivlm_edge.reference\n"
        "root = pathlib.Path(bivlm_edge.__file__).parent\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.split('.')[0] == 'bivlm_edge':\n"
        "        print(pathlib.Path(module.__file__).relative_to(root).as_posix())\n"
    )
    command = [sys.executable, "-P", "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    counted = {path.as_posix() for path in provenance.result_files()}
    assert set(loaded) - counted == OTHER
    assert "quant/methods/gptq.py" in counted  # loaded by name


def test_measuring_and_training_invalidate_nothing() -> None:
    counted = {path.as_posix() for path in provenance.result_files()}
    assert not counted & {"runtime/benchmark.py", "reference/train.py", "compare/tables.py"}
    assert {"accelerate", "gguf", "torch"} <= set(provenance.library_versions())


def test_answers_have_code_of_their_own() -> None:
    files = {path.as_posix() for path in provenance.result_files(provenance.ANSWER_CODE)}
    package = Path(provenance.__file__).parent
    assert files == set(provenance.ANSWER_CODE)
    assert all((package / file).is_file() for file in files)
    assert provenance.code_version(provenance.ANSWER_CODE) != provenance.code_version()
