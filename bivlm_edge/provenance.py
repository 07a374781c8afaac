"""What numbers depend on beside model, data and options: our code, the libraries, the machine."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What decides the weights of a quantized model and its score in torch; all other code shows,
# exports, runs or times them.
RESULT_CODE = (
    "calibration",
    "compare/evaluation.py",
    "compare/job.py",
    "config.py",
    "datasets.py",
    "distributed.py",
    "models",
    "package_files.py",
    "pictures.py",
    "positions.py",
    "quant",
    "reference/__init__.py",
    "reference/architecture.py",
    "runtime/evaluate.py",
    "runtime/preprocess.py",
    "runtime/prompt.py",
    "scenes.py",
    "texts.py",
    "tuning",
)
# What decides the answers of an exported model in `bivlm-redundancy`.
ANSWER_CODE = (
    "datasets.py",
    "pictures.py",
    "positions.py",
    "redundancy/answering.py",
    "redundancy/plan.py",
    "redundancy/questions.py",
    "redundancy/selectors.py",
    "runtime/generate.py",
    "runtime/kv_cache.py",
    "runtime/preprocess.py",
    "runtime/prompt.py",
    "runtime/sampling.py",
    "runtime/session.py",
    "scenes.py",
)
_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "accelerate", "gguf")
_CPUINFO = Path("/proc/cpuinfo")


def result_files(names: Sequence[str] = RESULT_CODE) -> Iterator[Path]:
    """The sources under `names`, relative to the package, in a fixed order."""
    package = Path(__file__).parent
    for name in names:
        path = package / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            yield file.relative_to(package)


@cache
def code_version(names: tuple[str, ...] = RESULT_CODE) -> str:
    """Tell whether the code that decides results is the same: SHA-256 of its files, 12 digits."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in result_files(names):
        digest.update(file.as_posix().encode() + b"\0" + (package / file).read_bytes())
    return digest.hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute the numbers."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> str:
    """Return the processor's name."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
