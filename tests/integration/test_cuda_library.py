"""The library for CUDA in ONNX Runtime, its kernels run on the CPU by the shim of custom_ops/tests.

All but the GPU is real: the operators' attributes, checks, sizes and scratch memory in a session.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from bivlm_edge._ops_library import LIBRARY_VARIABLE, custom_ops_library
from bivlm_edge.bundle import BundlePaths
from bivlm_edge.export import reference, reference_prune, schemas

ROOT = Path(__file__).parents[2]
SHIM_VARIABLE = "BIVLM_CUDA_ON_CPU_LIBRARY"  # a build of it to test in place of one made here
TARGET = "bivlm_custom_ops_cuda_on_cpu"
Array = NDArray[Any]
ASK = """
import sys
import numpy as np
from PIL import Image
from bivlm_edge.runtime import Answerer, load
answerer = Answerer(load(sys.argv[1], threads=1))
picture = answerer.picture(Image.fromarray(np.full((64, 64, 3), (200, 30, 30), np.uint8)))
print(list(answerer.ask("what color is the shape?", picture, max_new_tokens=4)))
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library, built once."""
    if built := os.environ.get(SHIM_VARIABLE):
        return built
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    options = ["-DBIVLM_CUDA=OFF", "-DBIVLM_BUILD_TESTS=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    for command in (
        ["cmake", "-S", ROOT / "custom_ops", "-B", folder, *options],
        ["cmake", "--build", folder, "--target", TARGET, "--parallel", "2"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(folder / "tests" / f"lib{TARGET}.so")


@pytest.mark.parametrize("mode", schemas.PRUNE_MODES)
@pytest.mark.parametrize("seed", range(10))
def test_token_prune_equals_the_reference_exactly(
    seed: int,
    mode: str,
    shim: str,
    prune_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    inputs, attributes = prune_case(seed, mode)
    outputs = ["pruned", "kept_indices", "lengths", "token_map"][: 2 + seed % 3]
    model = make_model("TokenPrune", inputs, outputs, **attributes)
    expected = reference_prune.token_prune(*inputs.values(), **attributes)
    results = run(model, inputs, library=shim)
    for name, got, want in zip(outputs, results, expected, strict=False):
        assert got.dtype == want.dtype, name
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [(), (1,), (2, 5), (0,)])
def test_binary_matmul_is_near_the_reference(
    tokens: tuple[int, ...],
    dtype: type[Any],
    packed: Any,
    shim: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    """Bit by bit the kernels are held to the int8 rule in custom_ops/tests."""
    k = packed.attributes["K"]
    x = np.random.default_rng(k).standard_normal((*tokens, k)).astype(dtype)
    names = ("codes", "coefficients", "signs", "order")
    model = make_model(
        "BinaryMatMul", {"X": x, **packed.inputs}, ["Y"], constants=names, **packed.attributes
    )
    (y,) = run(model, {"X": x}, library=shim)
    expected = reference.binary_matmul(x, *packed.inputs.values(), **packed.attributes)
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    if x.size:
        error = np.linalg.norm(y.astype(np.float64) - expected) / np.linalg.norm(expected)
        assert error < 0.02  # OPS.md: about 0.6 %; single rows have more


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(2, 3, 34), (1, 1, 3072), (0, 8), (6,)])
def test_gated_silu_equals_the_reference(
    shape: tuple[int, ...],
    dtype: type[Any],
    shim: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    x = (4 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    (y,) = run(make_model("GatedSiLU", {"X": x}, ["Y"]), {"X": x}, library=shim)
    tolerance = 4 * 2.0**-23 if dtype == np.float32 else 2.0**-10
    np.testing.assert_allclose(y, reference.gated_silu(x), rtol=tolerance, atol=1e-7)


def test_errors_are_those_of_the_cpu_operators(
    shim: str, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    hidden = np.zeros((1, 4, 2), np.float32)
    scores = np.zeros((1, 4), np.float32)
    for keep, what in ((-1, "keep is -1, expected 0 or more"), (3, None)):
        inputs = {"hidden": hidden, "scores": scores, "segments": None}
        inputs["keep"] = np.array([keep], np.int64)
        model = make_model("TokenPrune", inputs, ["pruned", "kept_indices"])
        if what is None:
            assert run(model, inputs, library=shim)[0].shape == (1, 3, 2)
        else:
            with pytest.raises(Exception, match=what):
                run(model, inputs, library=shim)
    with pytest.raises(Exception, match="mode is 'best', expected topk_score"):
        run(
            make_model("TokenPrune", inputs, ["pruned", "kept_indices"], mode="best"),
            inputs,
            library=shim,
        )


def test_order_must_be_a_constant_permutation(
    shim: str, make_packed: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    packed = make_packed(np.random.default_rng(1), 16, 128, (128,), order="columns")
    x = np.zeros((1, 128), np.float32)
    inputs = {"X": x, **packed.inputs}

    def session(constants: tuple[str, ...], given: dict[str, Any]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(shim)
        model = make_model("BinaryMatMul", given, ["Y"], constants=constants, **packed.attributes)
        return ort.InferenceSession(model.SerializeToString(), options)

    twice = inputs | {"order": np.zeros_like(packed.order)}
    with pytest.raises(Exception, match="order is not a permutation"):
        session(("codes", "coefficients", "order"), twice)
    later = session(("codes", "coefficients"), inputs)
    with pytest.raises(Exception, match="order is not a constant; on CUDA it must be one"):
        later.run(None, {"X": x, "order": packed.order})


@pytest.mark.parametrize("forced", ["avx2", "cuda"])
def test_a_kernel_of_the_cpu_cannot_be_forced(
    forced: str,
    shim: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BIVLM_FORCE_KERNEL", forced)
    x = np.ones((2, 8), np.float32)
    model = make_model("GatedSiLU", {"X": x}, ["Y"])
    if forced == "cuda":
        assert run(model, {"X": x}, library=shim)[0].shape == (2, 4)
        return
    with pytest.raises(Exception, match=r"BIVLM_FORCE_KERNEL=avx2 names no kernel .*here: cuda"):
        run(model, {"X": x}, library=shim)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (209, r"ops_cuda has no code for this GPU, .* 8\.7; build it with .*ARCHITECTURES=87"),
        (35, r"driver is too old: it knows CUDA 12\.6, .*ops_cuda was built with CUDA 13\.0"),
    ],
)
@pytest.mark.parametrize("op", ["BinaryMatMul", "GatedSiLU", "TokenPrune"])
def test_a_gpu_that_the_library_has_no_code_for(
    op: str,
    error: int,
    sentence: str,
    shim: str,
    make_packed: Callable[..., Any],
    prune_case: Callable[..., Any],
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Said when the session is created, by every operator; not in the middle of a run."""
    if op == "BinaryMatMul":
        packed = make_packed(np.random.default_rng(1), 16, 128, (128,))
        inputs = {"X": np.zeros((1, 128), np.float32), **packed.inputs}
        names = ("codes", "coefficients")
        model = make_model(op, inputs, ["Y"], constants=names, **packed.attributes)
    elif op == "GatedSiLU":
        model = make_model(op, {"X": np.ones((2, 8), np.float32)}, ["Y"])
    else:
        inputs, attributes = prune_case(0, "mmr")
        model = make_model(op, inputs, ["pruned", "kept_indices"], **attributes)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(shim)
    ort.InferenceSession(model.SerializeToString(), options)
    monkeypatch.setenv("BIVLM_SHIM_GPU_ERROR", str(error))
    with pytest.raises(Exception, match=sentence):
        ort.InferenceSession(model.SerializeToString(), options)


def test_two_libraries_of_the_domain_are_one_too_many(
    shim: str, make_model: Callable[..., Any]
) -> None:
    """Why the one for CUDA takes the place of the other: the day this fails it need not."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(custom_ops_library())
    options.register_custom_ops_library(shim)
    model = make_model("GatedSiLU", {"X": np.ones((2, 8), np.float32)}, ["Y"])
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(model.SerializeToString(), options)


def test_a_model_answers_as_with_the_library_for_the_cpu(
    shim: str, two_bit_export: BundlePaths
) -> None:
    """With attention by the model-local function, as on a GPU."""
    answers = []
    for path in (custom_ops_library(), shim):
        done = subprocess.run(
            [sys.executable, "-P", "-c", ASK, str(two_bit_export.graph)],
            env=os.environ | {LIBRARY_VARIABLE: path},
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(done.stdout)
    assert answers[0] == answers[1]
    assert answers[0].startswith("[")
