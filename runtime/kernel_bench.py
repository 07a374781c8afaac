"""Time of single operators in ONNX Runtime, side by side, and of a plain read of their weights.

"cold": one graph has so many copies of a node that their weights exceed all caches, so that every
weight comes from memory; "hot": one node runs again and again. All operators take turns within a
round, and ratios are taken within a round: a slow moment of the machine hits all alike.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bivlm_edge.errors import RequestError
from bivlm_edge.runtime.benchmark import quartiles
from bivlm_edge.runtime.idle import wait_until_idle
from bivlm_edge.runtime.ort_errors import OrtError, ort_sentence
from bivlm_edge.runtime.process_memory import memory_bytes
from bivlm_edge.runtime.session import HUGE_PAGES_VARIABLE, KERNEL_VARIABLE, register_library

Role = Literal["ours", "ort2", "ort4", "fp16", "fp32"]
Pages = Literal["mapped", "huge"]

_HUGE_PAGES_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_READ_BLOCK = 1 << 20
_HOT_READ_BYTES = 1 << 27  # takes much longer than waking a thread
_MOST_PASSES = 1000
# Of a sample, after as long a warm-up, which a parked thread needs to wake up.
_HOT_SECONDS = 2e-3
_HOT_RUNS = 3  # at least, unless that takes too long
_HOT_SECONDS_AT_MOST = 40e-3
_LOG_FATAL = 4


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator to time.

    Attributes:
        label: Its name in the report.
        role: What it is compared as.
        bits: Bits per weight, scales and coefficients left out.
        path: A graph whose nodes all read the input `x [m, k]`; see export/kernel_models.py.
        copies: Number of nodes.
        weight_bytes: Tensors of one node.
        config: Entries of the session configuration.
        pages: "huge" asks the operator library for a copy of the weights in 2 MiB pages.
    """

    label: str
    role: Role
    bits: float
    path: Path
    copies: int
    weight_bytes: int
    config: Mapping[str, str]
    pages: Pages = "mapped"


class OperatorSession:
    """An operator, loaded.

    Attributes:
        operator: What it is.
        anonymous_bytes: Memory that loading took beside the mapped file; None without /proc.
    """

    def __init__(self, operator: Operator, library: str, threads: int) -> None:
        """Load the graph.

        Args:
            operator: What to load.
            library: The operator library.
            threads: Threads of one operator.

        Raises:
            OpsLibraryError: The library does not load.
            RequestError: ONNX Runtime refuses the graph, or BIVLM_FORCE_KERNEL names no kernel.
        """
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_FATAL
        options.intra_op_num_threads = threads
        for key, value in operator.config.items():
            options.add_session_config_entry(key, value)
        register_library(options, library)
        before = memory_bytes().get("rss_anon")
        with _environment(HUGE_PAGES_VARIABLE, "1" if operator.pages == "huge" else None):
            self._session = _open(operator, options)
        after = memory_bytes().get("rss_anon")
        self.operator = operator
        self.anonymous_bytes = None if before is None or after is None else after - before

    def runner(self, x: NDArray[np.float32], n: int) -> Callable[[], None]:
        """Return a function that runs the graph once on `x`, float32 `[m, k]`.

        All nodes write to one buffer `[m, n]`, as the few buffers of a model are written again
        and again.

        Raises:
            RequestError: The operator computes NaN or infinity, so that its time means nothing.
        """
        kind = np.float16 if "float16" in self._session.get_inputs()[0].type else np.float32
        given = ort.OrtValue.ortvalue_from_numpy(x.astype(kind))
        output = ort.OrtValue.ortvalue_from_shape_and_type([len(x), n], kind)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("x", given)
        for node in self._session.get_outputs():
            binding.bind_ortvalue_output(node.name, output)
        run = partial(_run, self._session, binding, given)
        run()
        if not np.isfinite(output.numpy()).all():
            raise RequestError(
                f"{self.operator.label} computed values that are not finite for {n} x "
                f"{x.shape[1]} and {len(x)} tokens. Report this with the output of "
                "'bivlm-bench --kernels --debug'."
            )
        return run


def _run(session: ort.InferenceSession, binding: ort.IOBinding, _given: ort.OrtValue) -> None:
    """`_given` holds the array that the binding only points to."""
    session.run_with_iobinding(binding)


def _open(operator: Operator, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(
            str(operator.path), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except OrtError as error:
        advice = "Install a newer one: pip install --upgrade onnxruntime."
        if KERNEL_VARIABLE in str(error):
            advice = f"Set {KERNEL_VARIABLE} to one of those, or unset it."
        raise RequestError(
            f"ONNX Runtime {ort.__version__} does not load {operator.label}: "
            f"{ort_sentence(error)}. {advice}"
        ) from error


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set a variable, or unset it (None), while the block runs."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def kernel_name(operator: Operator, library: str) -> str:
    """The kernel that the library takes: the forced one, or the first that it has for this CPU.

    The library tells its list, best first, when it is asked for a kernel that does not exist.

    Args:
        operator: One that the library runs.
        library: The operator library.

    Returns:
        Its name, or "automatic" if the library does not tell.
    """
    if forced := os.environ.get(KERNEL_VARIABLE):
        return forced
    try:
        with _environment(KERNEL_VARIABLE, "?"):
            OperatorSession(operator, library, threads=1)
    except RequestError as error:
        if found := re.search(r"available here: (\w+)", str(error)):
            return found.group(1)
    return "automatic"


class WeightReader:
    """Reads a file of weights as fast as numpy can: the largest byte of each block of 1 MiB.

    `numpy.max` of bytes is vectorised and runs at the speed of memory; blocks are shared out to
    as many threads as the operators have.
    """

    def __init__(self, path: Path, pages: Pages, threads: int) -> None:
        """Map the file, or (`pages` "huge") copy it into anonymous pages of 2 MiB."""
        self._bytes: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        if pages == "huge":
            memory = mmap.mmap(-1, len(self._bytes))
            memory.madvise(mmap.MADV_HUGEPAGE)
            copy = np.frombuffer(memory, dtype=np.uint8)
            copy[:] = self._bytes
            self._bytes = copy
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def runner(self, size: int, passes: int) -> Callable[[], None]:
        """Return a function that reads the first `size` bytes `passes` times."""
        pool, whole = self._pool, self._bytes[:size]
        if pool is None:
            return lambda: _read(whole, passes)
        parts = np.array_split(whole, self._threads)

        def run() -> None:
            for _ in pool.map(_read, parts, [passes] * len(parts)):
                pass

        return run

    def size(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _read(part: NDArray[np.uint8], passes: int) -> None:
    blocks = [part[start : start + _READ_BLOCK] for start in range(0, len(part), _READ_BLOCK)]
    for _ in range(passes):
        for block in blocks:
            block.max()


def has_huge_pages() -> bool:
    """Whether this system gives 2 MiB pages to a program that asks for them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in _HUGE_PAGES_MODE.read_text(encoding="ascii")
    except OSError:
        return False


def measure(
    sessions: Sequence[OperatorSession],
    readers: Mapping[Pages, WeightReader],
    *,
    m: int,
    n: int,
    k: int,
    threads: int,
    cold: bool,
    warmups: int,
    repeats: int,
    on_round: Callable[[], None],
) -> dict[str, Any]:
    """Time all operators for one problem, in turn.

    Args:
        sessions: The operators; the first one is the reference of the ratios.
        readers: The weights of the first operator, in each kind of memory.
        m: Tokens.
        n: Output features.
        k: Input features.
        threads: Threads of one operator.
        cold: Whether the graphs have copies enough to exceed the caches.
        warmups: Rounds before, not counted.
        repeats: Measured rounds.
        on_round: Called after each round.

    Returns:
        "n", "k", "m", "cold"; "operators": each with label, role, bits, pages, copies,
        weight_bytes, anonymous_bytes, "us" of one node, "ratio" to the first operator,
        "gbs" (weight bytes per time, 1e9 per second) and "gflops"; "reads": GB/s of the plain
        read by kind of memory, of the same bytes as the first operator's weights.
    """
    x = np.random.default_rng(0).standard_normal((m, k), dtype=np.float32)
    runs: dict[str, tuple[Callable[[], None], int]] = {}
    for session in sessions:
        copies = session.operator.copies if cold else 1
        runs[session.operator.label] = (session.runner(x, n), copies)
    first = sessions[0].operator
    size = readers["mapped"].size() if cold else first.weight_bytes
    passes = 1 if cold else min(_MOST_PASSES, -(-_HOT_READ_BYTES // size))
    for pages, reader in readers.items():
        runs[_read_label(pages)] = (reader.runner(size, passes), passes)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(warmups + repeats):
        for label, (run, times) in runs.items():
            if threads > 1:
                wait_until_idle()
            sample = (_once(run) if cold else _median_of_runs(run)) / times
            if turn >= warmups:
                seconds[label].append(sample)
        on_round()
    return {
        "n": n,
        "k": k,
        "m": m,
        "cold": cold,
        "operators": [
            _row(session, seconds[session.operator.label], seconds[first.label], m * n * k)
            for session in sessions
        ],
        "reads": {
            pages: quartiles(size / np.array(seconds[_read_label(pages)]) / 1e9)
            for pages in readers
        },
    }


def _read_label(pages: Pages) -> str:
    return f"plain read, {pages}"


def _row(
    session: OperatorSession, seconds: list[float], first: list[float], products: int
) -> dict[str, Any]:
    operator, times = session.operator, np.array(seconds)
    us = quartiles(times * 1e6)
    return {
        "label": operator.label,
        "role": operator.role,
        "bits": operator.bits,
        "pages": operator.pages,
        "copies": operator.copies,
        "weight_bytes": operator.weight_bytes,
        "anonymous_bytes": session.anonymous_bytes,
        "us": us,
        "ratio": quartiles(times / np.array(first)),
        "gbs": float(f"{operator.weight_bytes / us['median'] / 1e3:.4g}"),
        "gflops": float(f"{2 * products / us['median'] / 1e3:.4g}"),
    }


def _once(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _median_of_runs(run: Callable[[], None]) -> float:
    """Median seconds of consecutive runs, after a warm-up that wakes the threads."""
    _runs(run)
    return float(np.median(_runs(run)))


def _runs(run: Callable[[], None]) -> list[float]:
    samples = [_once(run)]
    while sum(samples) < (_HOT_SECONDS if len(samples) >= _HOT_RUNS else _HOT_SECONDS_AT_MOST):
        samples.append(_once(run))
    return samples
