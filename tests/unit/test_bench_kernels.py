"""bivlm-bench --kernels: the graphs compute what they claim; numbers and options make sense."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from rich.console import Console

from bivlm_edge import report
from bivlm_edge._ops_library import custom_ops_library
from bivlm_edge.cli import bench, bench_kernels
from bivlm_edge.cli.bench_kernels import DEFAULT_SHAPES, DEFAULT_TOKENS, new_request, summary
from bivlm_edge.errors import RequestError
from bivlm_edge.export import kernel_models
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.runtime.kernel_bench import Operator, OperatorSession, WeightReader, kernel_name


def _weights(path: Path) -> dict[str, Any]:
    return {
        tensor.name: numpy_helper.to_array(tensor, base_dir=str(path.parent))
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
    }


def _outputs(path: Path, x: Any) -> list[Any]:
    options = ort.SessionOptions()
    options.register_custom_ops_library(custom_ops_library())
    found: list[Any] = ort.InferenceSession(str(path), options).run(None, {"x": x})
    return found


@pytest.mark.parametrize(
    ("n", "k", "bits", "planes"),
    [
        (100, 200, 2.0, (256, 256)),
        (16, 256, 1.25, (256, 64)),
        (64, 576, 1.25, (576, 128)),
        (33, 128, 1.0, (128,)),
    ],
)
def test_binary_weights_are_valid_and_computed(
    tmp_path: Path, n: int, k: int, bits: float, planes: tuple[int, ...]
) -> None:
    path = tmp_path / "m.onnx"
    model = kernel_models.write_binary_matmul(path, n, k, bits=bits, fill_bytes=0)
    tensors = _weights(path)
    weight = BinaryWeight(n, k, planes, tensors["w0_0"], tensors["w0_1"])  # checks the padding
    assert (model.copies, model.weight_bytes) == (1, weight.nbytes)
    x = np.random.default_rng(1).standard_normal((3, k), dtype=np.float32)
    want = x @ weight.dequantize().T
    (y,) = _outputs(path, x)
    assert np.abs(y - want).max() <= 0.03 * np.abs(want).max()  # int8 activations


@pytest.mark.parametrize(("bits", "block"), [(2, 128), (2, 64), (4, 32)])
def test_nbits_nodes_pad_k_to_whole_blocks(tmp_path: Path, bits: int, block: int) -> None:
    n, k = 48, 200
    path = tmp_path / "m.onnx"
    kernel_models.write_matmul_nbits(path, n, k, bits=bits, block=block, fill_bytes=0)
    tensors = _weights(path)
    codes, scales = tensors["w0_0"], tensors["w0_1"]
    steps = np.arange(0, 8, bits)
    levels = (codes[..., np.newaxis] >> steps & (1 << bits) - 1).reshape(n, -1, block)
    weight = (levels.astype(np.float32) - (1 << bits - 1)) * scales[..., np.newaxis]
    x = np.random.default_rng(1).standard_normal((2, k), dtype=np.float32)
    want = x @ weight.reshape(n, -1)[:, :k].T
    (y,) = _outputs(path, x)
    assert np.abs(y - want).max() <= 0.03 * np.abs(want).max()  # int8 activations


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_float_nodes_compute_the_product(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "m.onnx"
    model = kernel_models.write_matmul(path, 24, 40, dtype=dtype, fill_bytes=0)
    weight = _weights(path)["w0_0"]
    assert (weight.dtype, model.weight_bytes) == (dtype, weight.nbytes)
    x = np.random.default_rng(1).standard_normal((2, 40)).astype(dtype)
    (y,) = _outputs(path, x)
    want = x.astype(np.float64) @ weight.astype(np.float64)
    # float16 rounds the result once, and the output is below 4
    assert np.abs(y - want).max() <= (4 * 2.0**-11 if dtype == np.float16 else 1e-5)


def test_copies_fill_the_bytes_and_differ_as_onnxruntime_packs_equal_ones_once(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.onnx"
    model = kernel_models.write_matmul_nbits(path, 64, 128, bits=2, block=64, fill_bytes=10_000)
    tensors = _weights(path)
    assert model.copies == -(-10_000 // model.weight_bytes) == 4
    assert model.data.stat().st_size >= 10_000
    codes = [tensors[f"w{copy}_0"].reshape(-1) for copy in range(4)]
    assert len({code.tobytes() for code in codes}) == 4
    assert all(np.array_equal(code[2:], codes[0][2:]) for code in codes)
    initializers = onnx.load(str(path), load_external_data=False).graph.initializer
    offsets = [int(e.value) for t in initializers for e in t.external_data if e.key == "offset"]
    assert len(set(offsets)) == 8
    assert all(offset % 4096 == 0 for offset in offsets)


def test_more_copies_than_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="62500 copies of 16 x 64 are more than 20000"):
        kernel_models.write_matmul(
            tmp_path / "m.onnx", 16, 64, dtype=np.float32, fill_bytes=256_000_000
        )


def _binary_operator(folder: Path, pages: Any = "mapped") -> Operator:
    path = folder / "m.onnx"
    model = kernel_models.write_binary_matmul(path, 64, 128, bits=2.0, fill_bytes=0)
    return Operator("ours", "ours", 2.0, path, model.copies, model.weight_bytes, {}, pages)


@pytest.mark.parametrize(("pages", "seen"), [("mapped", None), ("huge", "1")])
def test_huge_pages_are_asked_for_while_the_session_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: str, seen: str | None
) -> None:
    import os

    from bivlm_edge.runtime import kernel_bench

    found = []
    create = kernel_bench._open

    def spy(*arguments: Any) -> Any:
        found.append(os.environ.get("BIVLM_HUGE_PAGES"))
        return create(*arguments)

    monkeypatch.setattr(kernel_bench, "_open", spy)
    monkeypatch.setenv("BIVLM_HUGE_PAGES", "outside")
    OperatorSession(_binary_operator(tmp_path, pages), custom_ops_library(), threads=1)
    assert found == [seen]
    assert os.environ["BIVLM_HUGE_PAGES"] == "outside"


def test_kernel_name_is_the_first_that_the_library_lists_or_the_forced_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = _binary_operator(tmp_path)
    monkeypatch.delenv("BIVLM_FORCE_KERNEL", raising=False)
    name = kernel_name(operator, custom_ops_library())
    monkeypatch.setenv("BIVLM_FORCE_KERNEL", name)
    OperatorSession(operator, custom_ops_library(), threads=1)
    monkeypatch.setenv("BIVLM_FORCE_KERNEL", "generic")
    assert kernel_name(operator, custom_ops_library()) == "generic"
    monkeypatch.setenv("BIVLM_FORCE_KERNEL", "nonsense")
    with pytest.raises(RequestError, match=r"available here: .*Set BIVLM_FORCE_KERNEL to one"):
        OperatorSession(operator, custom_ops_library(), threads=1)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    session = OperatorSession(_binary_operator(tmp_path), custom_ops_library(), threads=1)
    x = np.full((1, 128), np.inf, dtype=np.float32)
    with pytest.raises(RequestError, match="ours computed values that are not finite"):
        session.runner(x, 64)


@pytest.mark.parametrize("pages", ["mapped", "huge"])
@pytest.mark.parametrize("threads", [1, 3])
def test_reader_touches_every_byte_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: Any, threads: int
) -> None:
    from bivlm_edge.runtime import kernel_bench

    if pages == "huge" and not kernel_bench.has_huge_pages():
        pytest.skip("no MADV_HUGEPAGE here")
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 1000)
    seen: list[tuple[bytes, int]] = []

    def read(part: Any, passes: int) -> None:
        seen.append((part.tobytes(), passes))

    monkeypatch.setattr(kernel_bench, "_read", read)
    reader = WeightReader(path, pages, threads)
    reader.runner(200_001, 2)()
    reader.close()
    assert {passes for _, passes in seen} == {2}
    assert sorted(b"".join(part for part, _ in seen)) == sorted(path.read_bytes()[:200_001])
    assert reader.size() == 256_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["4096"]}, "--shape '4096' is not NxK"),
        ({"shapes": ["64x0"]}, "--shape '64x0' is not NxK"),
        ({"tokens": [4, 0]}, "--tokens 0 cannot be measured. Give 1 or more"),
        ({"threads": 0}, "--threads 0 cannot be measured"),
        ({"cold_mb": -1}, "--cold-mb -1 cannot be measured. Give 0 or more"),
        ({"repeats": 0}, "--repeats 0 cannot be measured"),
        ({"warmups": -1}, "--warmups -1 cannot be measured"),
    ],
)
def test_senseless_requests_are_refused(options: dict[str, Any], message: str) -> None:
    given = {
        "shapes": None, "tokens": None, "threads": 1, "cold_mb": 0, "warmups": 0, "repeats": 1
    }  # fmt: skip
    with pytest.raises(RequestError, match=message):
        new_request(**{**given, **options})


def test_defaults_and_rounds() -> None:
    request = new_request(None, None, None, None, warmups=2, repeats=10)
    assert len(request.shapes) == len(DEFAULT_SHAPES)
    assert request.shapes[1] == (576, 1536)
    assert request.threads >= 1
    assert (request.tokens_of(False), request.tokens_of(True)) == ([1, 4, 256], [1, 4])
    assert tuple(request.tokens) == DEFAULT_TOKENS
    assert request.rounds == 7 * 5 * 12
    assert new_request(None, [1], 1, 0, 0, 1).tokens_of(True) == []


def _fixed_entry() -> dict[str, Any]:
    def row(label: str, role: str, us: float, pages: str = "mapped") -> dict[str, Any]:
        spread = {"median": us, "q1": us - 1, "q3": us + 1}
        return {
            "label": label, "role": role, "bits": 2.0, "pages": pages, "copies": 3,
            "weight_bytes": 1000, "anonymous_bytes": 1500, "us": spread, "ratio": spread,
            "gbs": 7.5, "gflops": 250.0,
        }  # fmt: skip

    speed = {"median": 20.0, "q1": 19.0, "q3": 21.0}
    return {
        "n": 64, "k": 128, "m": 1, "cold": True, "reads": {"mapped": speed, "huge": speed},
        "operators": [
            row("ours", "ours", 10.0), row("ours huge", "ours", 8.0, "huge"),
            row("a", "ort2", 30.0), row("b", "ort2", 25.0), row("c", "ort4", 50.0),
        ],
    }  # fmt: skip


def test_summary_sets_ours_beside_the_best_peer_of_each_kind() -> None:
    mapped, huge = summary(_fixed_entry(), threads=2, kernel="avx2")
    assert (mapped["ours_us"], huge["ours_us"]) == (10.0, 8.0)
    assert (mapped["pages"], huge["pages"]) == ("mapped", "huge")
    assert mapped["ort2_us"] == huge["ort2_us"] == 25.0
    assert (mapped["ort4_us"], mapped["fp32_us"]) == (50.0, None)
    assert (mapped["k"], mapped["n"], mapped["m"], mapped["cold"]) == (128, 64, 1, True)
    assert (mapped["threads"], mapped["kernel"], mapped["bits"]) == (2, "avx2", 2.0)
    assert mapped["true_bits"] == pytest.approx(8000 / 8192, abs=1e-4)
    assert (mapped["ours_gbs"], mapped["bandwidth_gbs"]) == (7.5, 20.0)


def test_table_shows_a_fixed_result() -> None:
    result = {
        "machine": {"cpu": "Z", "cpu_flags": ["avx2"]}, "onnxruntime": "1.31", "kernel": "avx2",
        "threads": 2, "warmups": 1, "repeats": 5,
        "measurements": [_fixed_entry(), {**_fixed_entry(), "m": 256, "cold": False}],
    }  # fmt: skip
    (table,) = report.kernel_tables(result)
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    cold = next(line for line in lines if "1 cold" in line and "ours huge" in line)
    assert [cell.strip() for cell in cold.split("│")[3:9]] == [
        "8.0 (7.0-9.0)", "7.5", "-", "8.00 (7.00-9.00)x", "3", "0.50x",
    ]  # fmt: skip
    hot = next(line for line in lines if "256 hot" in line and " c " in line)
    assert [cell.strip() for cell in hot.split("│")[5:9]] == [
        "250",
        "50.00 (49.00-51.00)x",
        "3",
        "-",
    ]
    assert any("plain read, 2 MiB pages" in line and "20.0 (19.0-21.0)" in line for line in lines)


def _run(folder: Path, *arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            bench.app(list(map(str, arguments)))
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 0
    return code, out.getvalue(), err.getvalue()


def test_command_measures_every_operator_hot_and_cold(tmp_path: Path) -> None:
    code, out, err = _run(
        tmp_path, "--kernels", "--shape", "64x192", "--tokens", 1, "--tokens", 9, "--cold-mb", 1,
        "--repeats", 2, "--warmups", 0, "--threads", 1,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert "MatMulNBits 2 bits, block 128, LUT" in out
    assert "N = 64, K = 192" in out
    assert [(e["m"], e["cold"]) for e in found["measurements"]] == [
        (1, False), (9, False), (1, True),
    ]  # fmt: skip
    roles = [row["role"] for row in found["measurements"][0]["operators"]]
    assert set(roles) == {"ours", "ort2", "ort4", "fp16", "fp32"}
    assert len(found["kernels"]) == 3 * roles.count("ours")
    for line in found["kernels"]:
        assert {
            "k", "n", "m", "threads", "bits", "cold", "pages", "ours_us", "ort2_us", "ort4_us",
            "fp32_us", "ours_gbs", "bandwidth_gbs", "kernel",
        } <= line.keys()  # fmt: skip
        assert (line["n"], line["k"], line["threads"]) == (64, 192, 1)
        assert min(line[key] for key in line if key.endswith(("_us", "_gbs"))) > 0
    cold = found["measurements"][2]["operators"]
    assert all(row["copies"] * row["weight_bytes"] >= 1_000_000 for row in cold)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.onnx", "--kernels"), "MODEL is about a model"),
        (("--kernels", "--profile"), "--profile is about a model"),
        (("--kernels", "--new-tokens", "4"), "--new-tokens is about a model"),
        (("model.onnx", "--cold-mb", "5"), "--cold-mb is about --kernels"),
        (("model.onnx", "--image", "a.png", "--image", "b.png"), "--image is given 2 times"),
        (("model.onnx", "--profile", "--new-tokens", "2"), "--profile needs --new-tokens 3"),
        (("--kernels", "--synthetic", "smolvlm-256m"), "--synthetic is about a model"),
        ((), "neither MODEL nor --synthetic was given"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = _run(tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_too_little_memory_or_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "_available_memory", lambda: 100_000_000)
    code, _, err = _run(tmp_path, "--kernels", "--shape", "4096x4096", "--tokens", 1)
    assert code == 2
    assert "MB of memory for 4096x4096 with --cold-mb 720; 100 MB are free" in err
    monkeypatch.setattr(bench_kernels, "_available_memory", lambda: None)
    code, _, err = _run(tmp_path, "--kernels", "--shape", "999999x999999", "--tokens", 1)
    assert code == 2
    assert "disk space" in err


def test_shape_too_small_for_the_cold_pass_is_refused(tmp_path: Path) -> None:
    code, _, err = _run(
        tmp_path, "--kernels", "--shape", "16x64", "--tokens", 1, "--cold-mb", 100, "--repeats", 1
    )
    assert code == 2
    assert "16x64 is too small for --cold-mb 100: the graph would have more than 20,000" in err


def test_without_onnx_the_message_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "bivlm_edge.export.kernel_models")
    monkeypatch.delattr("bivlm_edge.export.kernel_models", raising=False)
    code, _, err = _run(tmp_path, "--kernels", "--shape", "64x64")
    assert code == 2
    assert "pip install onnx" in err
