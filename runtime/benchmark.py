"""Time and memory of exported models, each in a fresh process, taking turns.

Two regimes: prefill computes many tokens at once and is bound by arithmetic, decode computes one
and is bound by reading the weights. Machines drift, so that models to be compared are measured in
one run, repeat by repeat in turn, and their ratios are taken within a repeat.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bivlm_edge import __version__
from bivlm_edge.errors import BivlmError, BundleError, RequestError
from bivlm_edge.runtime.bench_worker import Job
from bivlm_edge.runtime.session import KERNEL_VARIABLE

_WORKER = "bivlm_edge.runtime.bench_worker"
_CPU_FLAGS = (
    *("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi", "avx_vnni", "gfni"),
    *("amx_int8", "asimd", "asimddp", "i8mm", "sve2"),
)
_TIMES = ("ttft_ms", "preprocess_ms", "first_run_ms", "prefill_ms", "vision_ms", "decode_ms")


@dataclass(frozen=True, slots=True)
class Contender:
    """One model in the comparison: its label in the report, and its job."""

    label: str
    job: Job


def benchmark(
    contenders: Sequence[Contender],
    *,
    repeats: int,
    warmups: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure all contenders in turn and return every number, ready for JSON.

    Args:
        contenders: The first one is the reference of the ratios.
        repeats: Measured rounds.
        warmups: Rounds before, not counted.
        on_progress: Called with the number of measurements done.

    Raises:
        BivlmError: A model does not load or run.
    """
    if repeats < 1 or warmups < 0:
        raise RequestError(
            f"--repeats {repeats} --warmups {warmups} cannot be done. Give 1 or more repeats and 0 "
            "or more warm-ups."
        )
    if any(c.job.context is not None and c.job.context < 1 for c in contenders):
        raise RequestError("--context must be 1 or more tokens.")
    if any(contender.job.new_tokens < 2 for contender in contenders):
        raise RequestError("--new-tokens must be 2 or more: the first is the prefill's.")
    processes: list[_Process] = []
    try:
        for contender in contenders:
            processes.append(_Process(contender))  # noqa: PERF401 (an error must close those before)
        samples: list[list[dict[str, float]]] = [[] for _ in processes]
        for turn in range(warmups + repeats):
            for index, process in enumerate(processes):
                sample = process.ask({"measure": True})
                if turn >= warmups:
                    samples[index].append(sample)
                if on_progress is not None:
                    on_progress(turn * len(processes) + index + 1)
        facts = [process.ask({"finish": True}) for process in processes]
    finally:
        for process in processes:
            process.close()
    models = [
        _summary(contender, fact, sample)
        for contender, fact, sample in zip(contenders, facts, samples, strict=True)
    ]
    return {
        "benchmark": "bivlm-bench",
        "version": __version__,
        "onnxruntime": ort.__version__,
        "machine": machine(),
        "kernel": os.environ.get(KERNEL_VARIABLE) or "auto",
        "warmups": warmups,
        "repeats": repeats,
        "models": models,
        "ratios": [
            _ratios(contenders[index].label, samples[0], samples[index])
            for index in range(1, len(samples))
        ],
    }


def add_profiles(result: dict[str, Any], contenders: Sequence[Contender]) -> None:
    """Add "profile" to every model of a result: the time by operator, from a run of its own.

    Args:
        result: What `benchmark` returned for these contenders.
        contenders: The models.

    Raises:
        BivlmError: A model does not load or run, or ONNX Runtime recorded too little.
    """
    for contender, model in zip(contenders, result["models"], strict=True):
        with tempfile.TemporaryDirectory(prefix="bivlm-bench-") as folder:
            job = replace(contender.job, profile_folder=folder)
            process = _Process(Contender(contender.label, job))
            try:
                profile = process.ask({"profile": True})
            finally:
                process.close()
        profile["decode_non_matmul_share"] = profile["decode"]["non_matmul_share"]
        model["profile"] = profile


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, cores, memory, system. No host name."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": _cores(),
        "physical_cores": physical_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cores() -> int | None:
    """Cores that this process may use; where the system does not tell, all that there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def physical_cores() -> int:
    """Physical cores that this process may use; logical ones where the system does not tell."""
    siblings = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text(encoding="ascii"))
        except OSError:
            return _cores() or 1
    return len(siblings) or _cores() or 1


def quartiles(values: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Return median and quartiles, linearly interpolated, to six digits."""
    low, median, high = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75))
    found = {"median": median, "q1": low, "q3": high}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def _summary(
    contender: Contender, facts: dict[str, Any], samples: list[dict[str, float]]
) -> dict[str, Any]:
    series = {name: np.array([sample[name] for sample in samples]) for name in _TIMES}
    return {
        "label": contender.label,
        **{key: value for key, value in asdict(contender.job).items() if key != "profile_folder"},
        **facts,
        **{name: quartiles(values) for name, values in series.items()},
        "prefill_tokens_per_s": quartiles(facts["kept_tokens"] * 1e3 / series["prefill_ms"]),
        "decode_tokens_per_s": quartiles(1e3 / series["decode_ms"]),
    }


def _ratios(
    label: str, first: list[dict[str, float]], other: list[dict[str, float]]
) -> dict[str, Any]:
    """How many times as long `other` takes as the first model, repeat by repeat."""
    pairs = list(zip(first, other, strict=True))
    return {
        "label": label,
        **{
            name: quartiles([theirs[name] / ours[name] for ours, theirs in pairs])
            for name in ("ttft_ms", "prefill_ms", "decode_ms")
        },
    }


class _Process:
    """A worker process and the two pipes to it."""

    def __init__(self, contender: Contender) -> None:
        # -P: the current folder may hold a source tree that shadows the installed package.
        command = [sys.executable, "-P", "-m", _WORKER]
        self._label = contender.label
        # A session of its own: Ctrl-C reaches this process only, which then ends the workers.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.facts = self.ask(asdict(contender.job))
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            BivlmError: What the worker says went wrong.
            BundleError: The worker died.
        """
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise BundleError(
                f"the process that measured '{self._label}' ended with exit code {code}. Out of "
                "memory is the usual reason (-9); its own message, if any, stands above."
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = BivlmError(answer["error"])
            error.exit_code = answer["exit_code"]
            raise error
        return answer

    def close(self) -> None:
        """End the process if it still runs."""
        for pipe in self._pipes():
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        self._process.kill()
        self._process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the worker was started without pipes")
        return self._process.stdin, self._process.stdout
