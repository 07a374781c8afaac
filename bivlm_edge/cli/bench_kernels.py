"""bivlm-bench --kernels: which operators are measured on which problems."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

from bivlm_edge import __version__
from bivlm_edge._ops_library import custom_ops_library
from bivlm_edge.errors import RequestError
from bivlm_edge.runtime.benchmark import machine, physical_cores
from bivlm_edge.runtime.kernel_bench import (
    Operator,
    OperatorSession,
    Pages,
    Role,
    WeightReader,
    has_huge_pages,
    kernel_name,
    measure,
)

DEFAULT_SHAPES = (
    "4096x4096",
    "576x1536",
    "1536x576",
    "896x4864",
    "3584x3584",
    "3584x18944",
    "1152x4304",
)
DEFAULT_TOKENS = (1, 4, 256)
DEFAULT_COLD_MB = 720
COLD_UP_TO_TOKENS = 8  # beyond, a product is bound by arithmetic, and a pass over all copies long
_MB = 1_000_000
_NOTES = (
    "cold: a pass over copies of the operator with that many MB of weights; hot: one operator "
    "again and again, ONNX Runtime's own time for a run included.",
    f"More than {COLD_UP_TO_TOKENS} tokens are measured hot only.",
    "GB/s: weight bytes (codes, scales, coefficients) by time. Plain read: numpy.max over blocks "
    "of 1 MiB of BinaryMatMul's 2.0-bit weights with as many threads, in turn with the operators.",
    "MatMulNBits: accuracy_level 4, no zero point. Where ONNX Runtime's LUT kernel does not take a "
    "shape, that row is its ordinary path. fp16: where ONNX Runtime has no half-precision kernel "
    "it widens the weight to float32 when it loads.",
    "copied (cold): anonymous memory that loading took, per byte of weight. 2 MiB pages: loaded "
    "with BIVLM_HUGE_PAGES=1; below 1 the library does not copy and the row equals the mapped one.",
)


@dataclass(frozen=True, slots=True)
class _Row:
    """A way to run the graph of a file."""

    label: str
    role: Role
    config: Mapping[str, str] = field(default_factory=dict)
    pages: Pages = "mapped"


@dataclass(frozen=True, slots=True)
class _File:
    """A graph: the function of export/kernel_models.py that writes it, and what runs it."""

    writer: str
    arguments: Mapping[str, Any]
    bits: float
    rows: Sequence[_Row]


def _nbits(bits: int, block: int, *, lut: bool = False) -> _File:
    label = f"MatMulNBits {bits} bits, block {block}"
    role: Role = "ort2" if bits == 2 else "ort4"
    rows = [_Row(label, role)]
    if lut:
        rows.append(_Row(f"{label}, LUT", role, {"mlas.use_lut_gemm": "1"}))
    return _File("write_matmul_nbits", {"bits": bits, "block": block}, bits, rows)


_OURS = "BinaryMatMul 2 bits"
# The first row is the reference of the ratios, and its file what the plain read reads.
_FILES = (
    _File(
        "write_binary_matmul",
        {"bits": 2.0},
        2.0,
        [_Row(_OURS, "ours"), _Row(f"{_OURS}, 2 MiB pages", "ours", pages="huge")],
    ),
    _File("write_binary_matmul", {"bits": 1.25}, 1.25, [_Row("BinaryMatMul 1.25 bits", "ours")]),
    _nbits(2, 128, lut=True),
    _nbits(2, 64),
    _nbits(4, 128),
    _nbits(4, 32),
    _File("write_matmul", {"dtype": np.float16}, 16, [_Row("MatMul fp16", "fp16")]),
    _File("write_matmul", {"dtype": np.float32}, 32, [_Row("MatMul fp32", "fp32")]),
)


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure.

    Attributes:
        shapes: (N, K) of each weight.
        tokens: Tokens of each product.
        threads: Threads of one operator.
        cold_mb: Weights to cycle through; 0 leaves the cold measurements out.
        warmups: Rounds before, not counted.
        repeats: Measured rounds.
    """

    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    threads: int
    cold_mb: int
    warmups: int
    repeats: int

    @property
    def rounds(self) -> int:
        """Rounds in all."""
        per_shape = sum(len(self.tokens_of(cold)) for cold in (False, True))
        return len(self.shapes) * per_shape * (self.warmups + self.repeats)

    def tokens_of(self, cold: bool) -> list[int]:
        """The numbers of tokens to measure hot or cold."""
        if not cold:
            return list(self.tokens)
        return [m for m in self.tokens if self.cold_mb and m <= COLD_UP_TO_TOKENS]


def new_request(
    shapes: Sequence[str] | None,
    tokens: Sequence[int] | None,
    threads: int | None,
    cold_mb: int | None,
    warmups: int,
    repeats: int,
) -> Request:
    """Check the options of the command line; None takes the default.

    Raises:
        RequestError: One cannot be carried out.
    """
    tokens = tokens or DEFAULT_TOKENS
    cold_mb = DEFAULT_COLD_MB if cold_mb is None else cold_mb
    for name, value, least in (
        *(("--tokens", m, 1) for m in tokens),
        ("--threads", 1 if threads is None else threads, 1),
        ("--cold-mb", cold_mb, 0),
        ("--warmups", warmups, 0),
        ("--repeats", repeats, 1),
    ):
        if value < least:
            raise RequestError(f"{name} {value} cannot be measured. Give {least} or more.")
    sizes = [_shape(text) for text in shapes or DEFAULT_SHAPES]
    return Request(sizes, tokens, threads or physical_cores(), cold_mb, warmups, repeats)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    n, k = (int(found[1]), int(found[2])) if found else (0, 0)
    if n < 1 or k < 1:
        raise RequestError(
            f"--shape '{text}' is not NxK: output features, x, input features. "
            "Give two numbers above 0, e.g. --shape 4096x4096."
        )
    return n, k


def run_kernels(request: Request, on_round: Callable[[int], None]) -> dict[str, Any]:
    """Measure every shape hot and cold and return all numbers, ready for JSON.

    Args:
        request: What to measure.
        on_round: Called with the number of rounds done.

    Raises:
        OpsLibraryError: The operator library is missing or does not load.
        RequestError: `onnx` is missing, memory or disk are too small, or ONNX Runtime lacks an
            operator.
    """
    library = custom_ops_library()
    models = _kernel_models()
    for n, k in request.shapes:
        _check_room(request, n, k, models.MAX_COPIES)
    done = 0

    def count_round() -> None:
        nonlocal done
        done += 1
        on_round(done)

    measured: list[dict[str, Any]] = []
    kernel = "automatic"
    for n, k in request.shapes:
        for cold in (False, True):
            if tokens := request.tokens_of(cold):
                with _Bench(models, library, request, n, k, cold=cold) as bench:
                    kernel = bench.kernel
                    measured += [bench.measure(m, count_round) for m in tokens]
    return {
        "benchmark": "bivlm-bench --kernels",
        "version": __version__,
        "onnxruntime": ort.__version__,
        "machine": machine(),
        "threads": request.threads,
        "kernel": kernel,
        "cold_mb": request.cold_mb,
        "warmups": request.warmups,
        "repeats": request.repeats,
        "notes": list(_NOTES),
        "kernels": [line for entry in measured for line in summary(entry, request.threads, kernel)],
        "measurements": measured,
    }


def _kernel_models() -> ModuleType:
    try:
        from bivlm_edge.export import kernel_models
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise RequestError(
            "--kernels writes graphs of single operators with the package 'onnx', which is not "
            "installed. Install it: pip install onnx."
        ) from error
    return kernel_models


class _Bench:
    """All operators for one shape, loaded; their files are deleted as soon as they are mapped."""

    def __init__(
        self, models: ModuleType, library: str, request: Request, n: int, k: int, *, cold: bool
    ) -> None:
        self._request, self._n, self._k, self._cold = request, n, k, cold
        self._fill = request.cold_mb * _MB if cold else 0
        self._models, self._library = models, library
        self._sessions: list[OperatorSession] = []
        self._readers: dict[Pages, WeightReader] = {}
        self.kernel = "automatic"

    def __enter__(self) -> _Bench:
        with tempfile.TemporaryDirectory(prefix="bivlm-bench-") as folder:
            for number, file in enumerate(_FILES):
                self._load(file, Path(folder) / f"{number}.onnx")
        return self

    def __exit__(self, *_: object) -> None:
        self._sessions.clear()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def measure(self, m: int, on_round: Callable[[], None]) -> dict[str, Any]:
        return measure(
            self._sessions,
            self._readers,
            m=m,
            n=self._n,
            k=self._k,
            threads=self._request.threads,
            cold=self._cold,
            warmups=self._request.warmups,
            repeats=self._request.repeats,
            on_round=on_round,
        )

    def _load(self, file: _File, path: Path) -> None:
        write = getattr(self._models, file.writer)
        model = write(path, self._n, self._k, fill_bytes=self._fill, **file.arguments)
        for row in file.rows:
            if row.pages == "huge" and not has_huge_pages():
                continue
            operator = Operator(
                row.label,
                row.role,
                file.bits,
                model.path,
                model.copies,
                model.weight_bytes,
                row.config,
                row.pages,
            )
            if not self._sessions:
                self.kernel = kernel_name(operator, self._library)
            self._sessions.append(OperatorSession(operator, self._library, self._request.threads))
            if file is _FILES[0]:
                reader = WeightReader(model.data, row.pages, self._request.threads)
                self._readers[row.pages] = reader
        # What is mapped stays; the rest must neither fill the disk nor be written to it.
        model.data.unlink()


def _check_room(request: Request, n: int, k: int, most_copies: int) -> None:
    """Refuse what memory, disk or the graph of a cold measurement cannot hold."""
    fill = request.cold_mb * _MB if request.tokens_of(cold=True) else 0
    advice = "Lower --cold-mb (0 measures hot only), or choose other shapes with --shape."
    if fill > most_copies * n * k // 8:  # 1 bit per weight, fewer than any operator has
        raise RequestError(
            f"--shape {n}x{k} is too small for --cold-mb {request.cold_mb}: the graph would have "
            f"more than {most_copies:,} nodes. {advice}"
        )
    quantized = sum(max(fill, int(file.bits * n * k / 8)) for file in _FILES[:-2])
    floats = max(fill, 4 * n * k)
    # Everything is mapped or read once, and copied: packed by ONNX Runtime, or into 2 MiB pages.
    needs = [("memory", _available_memory(), 2 * (quantized + 2 * floats))]
    folder = tempfile.gettempdir()
    needs.append((f"disk space in '{folder}'", shutil.disk_usage(folder).free, floats))
    for what, available, needed in needs:
        if available is not None and available < needed:
            raise RequestError(
                f"--kernels needs about {needed / _MB:,.0f} MB of {what} for {n}x{k} with "
                f"--cold-mb {request.cold_mb}; {available / _MB:,.0f} MB are free. {advice}"
            )


def _available_memory() -> int | None:
    """Bytes that programs can still take; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def summary(entry: dict[str, Any], threads: int, kernel: str) -> list[dict[str, Any]]:
    """One flat line per kind of our operator, beside the best of each kind of peer.

    Args:
        entry: What `measure` returned.
        threads: Threads of one operator.
        kernel: Name of our kernel.
    """
    best: dict[str, float] = {}
    for row in entry["operators"]:
        median = row["us"]["median"]
        best[row["role"]] = min(median, best.get(row["role"], median))
    return [
        {
            **{key: entry[key] for key in ("k", "n", "m", "cold")},
            "threads": threads,
            "bits": row["bits"],
            "true_bits": round(8 * row["weight_bytes"] / (entry["n"] * entry["k"]), 4),
            "pages": row["pages"],
            "ours_us": row["us"]["median"],
            **{f"{role}_us": best.get(role) for role in ("ort2", "ort4", "fp16", "fp32")},
            "ours_gbs": row["gbs"],
            "ours_gflops": row["gflops"],
            "bandwidth_gbs": entry["reads"][row["pages"]]["median"],
            "kernel": kernel,
        }
        for row in entry["operators"]
        if row["role"] == "ours"
    ]
