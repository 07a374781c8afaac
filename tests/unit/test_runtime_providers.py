"""--provider: what each missing part is called, and a cache that lies on a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from bivlm_edge.errors import OpsLibraryError, RequestError
from bivlm_edge.runtime import Generation, kv_cache, load, providers
from bivlm_edge.runtime.generate import run_step
from bivlm_edge.runtime.kv_cache import GROWTH, KvCache

BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


class _Driver:
    """A libcuda that answers as told."""

    def __init__(self, init: int = 0, count: int = 1, count_code: int = 0) -> None:
        self._init, self._count, self._count_code = init, count, count_code

    def cuInit(self, _flags: int) -> int:  # noqa: N802 (NVIDIA's name)
        return self._init

    def cuDeviceGetCount(self, target: Any) -> int:  # noqa: N802
        target._obj.value = self._count
        return self._count_code


def _has_driver(monkeypatch: pytest.MonkeyPatch, driver: _Driver) -> None:
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda _name: driver)


def _has_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: BOTH)


def _starts(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_driver(monkeypatch, _Driver())
    _has_provider(monkeypatch)
    started = SimpleNamespace(get_providers=lambda: BOTH, run=lambda *_: None)
    monkeypatch.setattr(providers, "_new_session", lambda *_: started)


def _has_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIVLM_CUDA_OPS_LIBRARY", raising=False)
    monkeypatch.setattr("bivlm_edge._ops_library.metadata.files", lambda _: [])


def test_other_names_are_refused_with_those_accepted(bundle: Any) -> None:
    with pytest.raises(RequestError, match=r"--provider 'gpu' .* Accepted: cpu, cuda"):
        load(bundle.graph, provider="gpu")


def test_no_driver(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_DRIVER", "libnot-there.so.1")
    with pytest.raises(RequestError, match=r"no NVIDIA driver .*libnot-there.* --provider cpu"):
        load(bundle.graph, provider="cuda")


@pytest.mark.parametrize(
    "driver", [_Driver(init=100), _Driver(count=0), _Driver(count=0, count_code=100)]
)
def test_no_gpu(bundle: Any, driver: _Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    _has_driver(monkeypatch, driver)
    _has_provider(monkeypatch)
    with pytest.raises(RequestError, match="the NVIDIA driver finds no GPU"):
        load(bundle.graph, provider="cuda")


@pytest.mark.parametrize("driver", [_Driver(init=803), _Driver(count_code=803)])
def test_driver_that_does_not_start(
    bundle: Any, driver: _Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has_driver(monkeypatch, driver)
    with pytest.raises(RequestError, match=r"does not start \(CUDA error 803\)"):
        load(bundle.graph, provider="cuda")


def test_onnxruntime_without_the_provider(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _has_driver(monkeypatch, _Driver())
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: BOTH[1:])
    with pytest.raises(
        RequestError, match=r"built without CUDAExecutionProvider.*onnxruntime-gpu.*JETSON\.md"
    ):
        load(bundle.graph, provider="cuda")


def test_no_cuda_library(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _starts(monkeypatch)
    _has_nothing_installed(monkeypatch)
    message = (
        r"no CUDA operator library .*without nvcc or with BIVLM_CUDA=OFF.*CUDACXX.*--provider cpu"
    )
    with pytest.raises(OpsLibraryError, match=message):
        load(make_bundle(domain_node="fallback").graph, provider="cuda")


def test_variable_of_the_cuda_library_that_names_no_file(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _starts(monkeypatch)
    monkeypatch.setenv("BIVLM_CUDA_OPS_LIBRARY", "/nonexistent.so")
    with pytest.raises(OpsLibraryError, match=r"BIVLM_CUDA_OPS_LIBRARY='/nonexistent\.so' is not"):
        load(make_bundle(domain_node="fallback").graph, provider="cuda")


def test_cuda_library_is_registered_in_place_of_the_other(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _starts(monkeypatch)
    library = tmp_path / "libbivlm_custom_ops_cuda.so"
    library.write_text("not ELF", encoding="utf-8")
    monkeypatch.setenv("BIVLM_CUDA_OPS_LIBRARY", str(library))
    monkeypatch.setenv("BIVLM_OPS_LIBRARY", "/never/asked/for.so")
    message = (
        r"libbivlm_custom_ops_cuda\.so' does not load .*--provider cuda BIVLM_CUDA_OPS_LIBRARY"
    )
    with pytest.raises(OpsLibraryError, match=message):
        load(make_bundle(domain_node="fallback").graph, provider="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")  # this machine's ONNX Runtime lacks it
def test_provider_that_onnxruntime_does_not_start_is_no_silent_cpu(
    bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has_driver(monkeypatch, _Driver())
    _has_provider(monkeypatch)
    with pytest.raises(RequestError, match=r"CUDAExecutionProvider of .* does not start.*cuDNN"):
        load(bundle.graph, provider="cuda")

    def preload() -> None:
        print("Failed to load libcublas.so.13: libcublas.so.13: cannot open")  # noqa: T201
        print("Failed to load libcudart.so.13: no such file")  # noqa: T201

    monkeypatch.setattr(providers.ort, "preload_dlls", preload)
    monkeypatch.setattr(providers.ort, "cuda_version", "13.0", raising=False)
    message = (
        r"\(built for CUDA 13\.0\) does not start: libcublas\.so\.13, libcudart\.so\.13 cannot"
    )
    with pytest.raises(RequestError, match=message):
        load(bundle.graph, provider="cuda")


def test_onnxruntime_built_for_other_gpus(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package index's wheel on a Jetson: it has the provider, and no code for the GPU."""
    _starts(monkeypatch)

    def run(*_: Any) -> None:
        raise RuntimeError("CUDA failure 209: no kernel image is available for execution")

    started = SimpleNamespace(get_providers=lambda: BOTH, run=run)
    monkeypatch.setattr(providers, "_new_session", lambda *_: started)
    message = (
        r"starts, but runs nothing on this GPU \(CUDA failure 209: no kernel image.*JETSON\.md"
    )
    with pytest.raises(RequestError, match=message):
        load(bundle.graph, provider="cuda")


def test_the_probe_is_a_model() -> None:
    session = ort.InferenceSession(providers._PROBE, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.full(1, -3, np.float32)})
    assert y.tolist() == [3]


def test_operator_that_runs_on_the_cpu_is_named(bundle: Any) -> None:
    on_cpu = SimpleNamespace(
        ep_name="CPUExecutionProvider",
        get_nodes=lambda: [SimpleNamespace(op_type="TokenPrune"), SimpleNamespace(op_type="Shape")],
    )
    on_gpu = SimpleNamespace(
        ep_name="CUDAExecutionProvider",
        get_nodes=lambda: [SimpleNamespace(op_type="BinaryMatMul")],
    )
    found: Any = SimpleNamespace(get_provider_graph_assignment_info=lambda: [on_gpu, on_cpu])
    with pytest.raises(OpsLibraryError, match="runs TokenPrune of this model on the CPU"):
        providers._check_assignment(found, ("BinaryMatMul", "TokenPrune"))
    providers._check_assignment(found, ("BinaryMatMul",))
    older: Any = SimpleNamespace()
    providers._check_assignment(older, ("TokenPrune",))
    assert load(bundle.graph).provider == "cpu"


def test_export_without_fallback_is_refused_on_cuda(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _starts(monkeypatch)
    with pytest.raises(OpsLibraryError, match=r"--fallback none: on CUDA its attention and head"):
        load(make_bundle(domain_node="none").graph, provider="cuda")


def test_this_machine_says_what_it_lacks_or_runs(bundle: Any) -> None:
    """No monkeypatching: the sentence of this very machine."""
    try:
        ctypes.CDLL("libcuda.so.1")
        has_driver = True
    except OSError:
        has_driver = False
    if has_driver and "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine has a driver and a CUDA provider")
    wanted = "built without CUDA|finds no GPU|does not start" if has_driver else "no NVIDIA driver"
    with pytest.raises(RequestError, match=f"--provider cuda: .*({wanted}).*--provider cpu"):
        load(bundle.graph, provider="cuda")


class _CopyingBinding:
    """A binding that reads its inputs when they are bound, as one to a GPU does."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self._values: dict[str, ort.OrtValue] = {}

    def bind_ortvalue_input(self, name: str, value: ort.OrtValue) -> None:
        if not name.startswith("past_key_values"):  # those lie on the GPU
            value = _FROM_NUMPY(value.numpy().copy())
        self._values[name] = value
        self.real.bind_ortvalue_input(name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _CopyingSession:
    def __init__(self, real: ort.InferenceSession) -> None:
        self._real = real

    def io_binding(self) -> _CopyingBinding:
        return _CopyingBinding(self._real.io_binding())

    def run_with_iobinding(self, binding: _CopyingBinding, options: ort.RunOptions) -> None:
        self._real.run_with_iobinding(binding.real, options)


_FROM_NUMPY = ort.OrtValue.ortvalue_from_numpy


def _on_gpu(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session whose inputs and cache lie in memory that only copies reach, as a GPU's."""

    def copied(array: np.ndarray[Any, Any], device: str = "cpu") -> ort.OrtValue:
        return _FROM_NUMPY(array.copy() if device == "cuda" else array)

    values = SimpleNamespace(ortvalue_from_numpy=copied)
    monkeypatch.setattr(
        kv_cache, "ort", SimpleNamespace(OrtValue=values, RunOptions=ort.RunOptions)
    )
    session = load(bundle.graph)
    return replace(session, provider="cuda", ort=_CopyingSession(session.ort))


def test_answer_is_the_same_with_the_cache_on_a_gpu(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(fp16=True)
    session = _on_gpu(bundle, monkeypatch)
    assert session.cache_device == "cuda"
    prompt = [3, 20, 30, 40]
    ids = np.array(prompt, np.int64)
    assert list(Generation(session, ids)) == bundle.answer(
        prompt, 0, session.manifest.max_new_tokens
    )


def test_cache_on_a_gpu_grows_and_is_copied_with_its_contents(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _on_gpu(make_bundle(fp16=True, context=4 * GROWTH), monkeypatch)
    cache = KvCache(session, 4)
    run_step(session, np.array([3, 20, 30, 40], np.int64), cache)
    filled = [tensor.numpy().copy() for tensor in cache.tensors]
    other = cache.copy()
    cache.reserve(5)
    assert cache.capacity == 4 + GROWTH
    assert cache.allocated_bytes == cache.capacity * KvCache.bytes_per_token(session)
    for old, grown, copied in zip(filled, cache.tensors, other.tensors, strict=True):
        np.testing.assert_array_equal(grown.numpy()[:, :, :4], old)
        np.testing.assert_array_equal(copied.numpy(), old)
    one = run_step(session, np.array([50], np.int64), cache).logits
    two = run_step(session, np.array([50], np.int64), other).logits
    np.testing.assert_array_equal(one, two)


def test_float32_cache_stays_where_attention_runs(bundle: Any) -> None:
    assert replace(load(bundle.graph), provider="cuda").cache_device == "cpu"
