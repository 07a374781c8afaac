"""The compiled operators in ONNX Runtime against the numpy reference."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import bivlm_edge
from bivlm_edge.errors import OpsLibraryError
from bivlm_edge.export import reference, reference_prune, schemas
from bivlm_edge.export.fallback import BinaryMatMulConfiguration, binary_matmul_function
from bivlm_edge.export.fallback_attention import group_query_attention_function
from bivlm_edge.export.fallback_gated_silu import gated_silu_function
from bivlm_edge.export.fallback_group_matmul import group_matmul_function
from bivlm_edge.export.fallback_prune import token_prune_function
from bivlm_edge.export.prune_configuration import TokenPruneConfiguration

Array = NDArray[Any]
CONSTANTS = ("codes", "coefficients", "signs", "order")
LEADING = [(), (1,), (33,), (2, 3), (0,), (2, 0, 1)]
MODES = schemas.PRUNE_MODES
# runs every model of a folder on the input beside it; the environment chooses the kernel
WORKER = """
import sys
from pathlib import Path
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(sys.argv[2])
for path in Path(sys.argv[1]).glob("*.onnx"):
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"X": np.load(path.with_suffix(".x.npy"))})
    np.save(path.with_suffix(".y.npy"), y)
"""


@pytest.fixture(scope="session")
def library() -> str:
    try:
        return bivlm_edge.custom_ops_library()
    except OpsLibraryError as error:
        pytest.skip(str(error))


def _inputs(packed: Any) -> list[Array]:
    """Return an X for each shape of LEADING, in float32 and in float16."""
    k = packed.attributes["K"]
    rng = np.random.default_rng(k)
    drawn = [rng.standard_normal((*leading, k)) for leading in LEADING]
    return [x.astype(dtype) for x in drawn for dtype in (np.float32, np.float16)]


def _model(make_model: Callable[..., Any], packed: Any, x: Array, **more: Any) -> onnx.ModelProto:
    inputs = {"X": x, **packed.inputs}
    more = {"constants": CONSTANTS} | packed.attributes | more
    model: onnx.ModelProto = make_model("BinaryMatMul", inputs, ["Y"], **more)
    return model


def _wide_rounding(packed: Any, v: Array) -> Array:
    """Bound the error that the wide lookup rule of OPS.md, section Numbers, allows for rounding.

    Args:
        packed: The weight.
        v: Transformed activations, (..., Kp).

    Returns:
        One bound per output, (..., N).
    """
    n = packed.attributes["N"]
    bound = np.zeros((*v.shape[:-1], n))
    # |v| as (.., chunk, t, i, e); a group is all i
    part = np.abs(v).reshape(*v.shape[:-1], -1, 4, 4, 4)
    ends = sorted({alpha.shape[1] for alpha in packed.alpha})
    for begin, end in itertools.pairwise([0, *ends]):
        alphas = [np.abs(alpha[:n, begin]) for alpha in packed.alpha if begin < alpha.shape[1]]
        runs = (end - begin) // 5
        units = [
            (part[..., [first, first + 1], :, :, :], part[..., first + rest, :, fifths, :])
            for first, rest, fifths in (
                (begin + 5 * run + half, 4 - half, slice(half, half + 2))
                for run in range(runs)
                for half in (0, 2)
            )
        ]
        left = range(begin + 5 * runs, end, 2)
        units += [(part[..., at : min(at + 2, end), :, :, :], None) for at in left]
        for chunks, fifth in units:
            groups = chunks.sum(axis=-2)  # (.., chunk, t, e)
            if fifth is not None:
                groups = groups + np.swapaxes(fifth, -3, -2)
            groups = groups.reshape(*v.shape[:-1], -1)
            scale = groups.max(axis=-1, keepdims=True) / 127
            for pair in (alphas[:2], alphas[2:]):
                step = np.max(pair, axis=0) / 127 if len(pair) == 2 else 0.0
                for alpha in pair:
                    bound = bound + groups.shape[-1] * 0.501 * scale * (alpha + step / 2)
                    bound = bound + 0.501 * step * groups.sum(axis=-1, keepdims=True)
    return bound


def _rounding(packed: Any, v: Array, *, rule: str) -> Array:
    """Bound the error that a rule of OPS.md, section Numbers, allows for rounding.

    Args:
        packed: The weight.
        v: Transformed activations, (..., Kp).
        rule: "int8", "lookup" or "wide lookup".

    Returns:
        One bound per output, (..., N).
    """
    if rule == "wide lookup":
        return _wide_rounding(packed, v)
    n = packed.attributes["N"]
    bound = np.zeros((*v.shape[:-1], n))
    for chunk in range(v.shape[-1] // 64):
        part = np.abs(v[..., 64 * chunk : 64 * chunk + 64])
        terms = [
            (alpha[:n, chunk, None], 2.0 * bits[:n, 64 * chunk : 64 * chunk + 64] - 1)
            for alpha, bits in zip(packed.alpha, packed.bits, strict=True)
            if chunk < alpha.shape[1]
        ]
        if rule == "lookup":
            # column 16 t + 4 i + e: a group is all i
            groups = part.reshape(*part.shape[:-1], 4, 4, 4).sum(axis=-2)
            scale = groups.max(axis=(-1, -2))[..., None] / 127
            total = np.sum([np.abs(alpha).ravel() for alpha, _ in terms], axis=0)
            bound = bound + 16 * 0.501 * scale * total
            continue
        scale = part.max(axis=-1, keepdims=True) / 127
        for pair in (terms[:2], terms[2:]):
            if not pair:
                continue
            level = np.abs(sum(alpha * sign for alpha, sign in pair))
            bound = bound + (scale / 2) * level.sum(axis=1)
            if len(pair) == 2:
                step = (pair[0][0] + pair[1][0]).ravel() / 127
                bound = bound + (part + scale / 2).sum(axis=-1, keepdims=True) * step / 2
    return bound


def _require_contract(packed: Any, x: Array, y: Array, *, kernel: str) -> None:
    """Compare with the reference within the bound of OPS.md, section Numbers.

    Args:
        packed: The weight.
        x: Activations.
        y: What the operator made of them.
        kernel: The kernel that did; "": the one that the CPU has chosen.
    """
    expected = reference.binary_matmul(x, *packed.inputs.values(), **packed.attributes)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    n, k = packed.attributes["N"], packed.attributes["K"]
    columns = packed.attributes["plane_columns"]
    v = reference.transform(
        x, packed.signs, packed.order, k, packed.attributes.get("hadamard_block", 0)
    )
    weight = reference.unpack(packed.codes, packed.coefficients, n, columns)
    few = x.size // k <= 4
    if kernel == "":
        rules = {"int8", "lookup" if few else "wide lookup"}
    elif kernel == "generic":
        rules = set()
    elif few and kernel in ("avx512vbmi", "amx"):
        rules = {"lookup"}
    else:
        rules = {"wide lookup" if kernel == "avx512vbmi" else "int8"}
    # where planes cancel, sums of single planes are rounded more than those of their levels
    planes = sum(
        np.abs(v[..., : 64 * alpha.shape[1]]) @ np.repeat(np.abs(alpha[:n]), 64, axis=1).T
        for alpha in packed.alpha
    )
    float_sums = np.abs(v) @ np.abs(weight).T if rules <= {"int8"} else planes
    bound = 2 * columns[0] * 2.0**-23 * float_sums
    if rules:
        bound = bound + np.max([_rounding(packed, v, rule=rule) for rule in rules], axis=0)
    if x.dtype == np.float16:
        bound = bound * (1 + 2.0**-11) + 2.0**-11 * np.abs(expected) + 2.0**-25
    error = np.abs(y - expected)
    assert (error <= bound).all(), (packed.attributes, x.shape, x.dtype, error.max())


@pytest.mark.parametrize("threads", [1, 2])
def test_binary_matmul_keeps_its_bound(
    packed: Any,
    threads: int,
    library: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    for x in _inputs(packed):
        model = _model(make_model, packed, x)
        (y,) = run(model, {"X": x}, library=library, threads=threads)
        _require_contract(packed, x, y, kernel=os.environ.get("BIVLM_FORCE_KERNEL", ""))


@pytest.mark.parametrize("kernel", ["generic", "avx2", "avxvnni", "avx512", "avx512vbmi", "amx"])
def test_every_kernel_keeps_its_bound(
    packed: Any, kernel: str, library: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    inputs = _inputs(packed)
    for i, x in enumerate(inputs):
        onnx.save(_model(make_model, packed, x), tmp_path / f"{i}.onnx")
        np.save(tmp_path / f"{i}.x.npy", x)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path), library],
        env=os.environ | {"BIVLM_FORCE_KERNEL": kernel},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if "names no kernel" in done.stderr and kernel != "generic":
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    for i, x in enumerate(inputs):
        _require_contract(packed, x, np.load(tmp_path / f"{i}.y.npy"), kernel=kernel)


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are for Linux")
def test_huge_pages_do_not_change_the_outputs(
    packed: Any,
    library: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = _inputs(packed)[6]
    (y,) = run(_model(make_model, packed, x), {"X": x}, library=library)
    monkeypatch.setenv("BIVLM_HUGE_PAGES", "1")
    for constants in ({}, {"constants": ()}):
        model = _model(make_model, packed, x, **constants)
        feeds = {"X": x} | (packed.inputs if constants else {})
        (y_of_copy,) = run(model, feeds, library=library)
        np.testing.assert_array_equal(y_of_copy, y)


def test_weights_may_be_inputs_of_the_graph(
    packed: Any, library: str, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    x = _inputs(packed)[6]
    model = _model(make_model, packed, x, constants=())
    (y,) = run(model, {"X": x, **packed.inputs}, library=library)
    (y_of_constants,) = run(_model(make_model, packed, x), {"X": x}, library=library)
    np.testing.assert_array_equal(y, y_of_constants)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_token_that_is_not_finite_gives_nan_only_there(
    packed: Any,
    value: float,
    library: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    x = np.ones((3, packed.attributes["K"]), dtype=np.float32)
    x[1, -1] = value
    (y,) = run(_model(make_model, packed, x), {"X": x}, library=library)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("with_overload", [False, True])
def test_library_wins_over_the_functions(
    with_overload: bool,
    library: str,
    make_packed: Callable[..., Any],
    make_model: Callable[..., Any],
    attention_case: Callable[..., Any],
    prune_case: Callable[..., Any],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    optimized = str(tmp_path / "optimized.onnx")
    packed = make_packed(np.random.default_rng(0), 17, 300, (320, 256))
    matmul = BinaryMatMulConfiguration(300, 17, (320, 256))
    function = binary_matmul_function(matmul, "dense", matmul.overload if with_overload else "")
    x = np.ones((2, 300), dtype=np.float32)
    model = _model(make_model, packed, x, functions=[function])
    run(model, {"X": x}, library=library, optimized=optimized)
    assert [node.op_type for node in onnx.load(optimized).graph.node] == ["BinaryMatMul"]

    inputs, attributes = attention_case(0)
    function = group_query_attention_function(23)
    outputs = list(schemas.ATTENTION_OUTPUTS)
    model = make_model("GroupQueryAttention", inputs, outputs, functions=[function], **attributes)
    run(model, inputs, library=library, optimized=optimized)
    (node,) = onnx.load(optimized).graph.node
    assert (node.domain, node.op_type) == ("ai.bivlm", "GroupQueryAttention")

    x = np.ones((2, 8), dtype=np.float32)
    model = make_model("GatedSiLU", {"X": x}, ["Y"], functions=[gated_silu_function(23)])
    run(model, {"X": x}, library=library, optimized=optimized)
    assert [node.op_type for node in onnx.load(optimized).graph.node] == ["GatedSiLU"]

    inputs, attributes = prune_case(0, "mmr")
    given: dict[str, Any] = {
        name: value is not None for name, value in inputs.items() if name != "hidden"
    }
    prune = TokenPruneConfiguration(**given, lengths=False, **attributes)
    function = token_prune_function(prune, prune.overload if with_overload else "")
    outputs = ["pruned", "kept_indices"]
    model = make_model("TokenPrune", inputs, outputs, functions=[function], **attributes)
    run(model, inputs, library=library, optimized=optimized)
    assert [node.op_type for node in onnx.load(optimized).graph.node] == ["TokenPrune"]


def _require_attention(
    inputs: dict[str, Array], attributes: dict[str, Any], results: list[Array]
) -> None:
    """Compare with the reference; the cache exactly."""
    total = int(inputs["total_sequence_length"][0])
    expected = reference.group_query_attention(
        *list(inputs.values())[:6],
        total,
        num_heads=attributes["num_heads"],
        scale=attributes.get("scale", 0.0),
    )
    # sums of up to 240 terms in float32; float16 rounds the output once, to 11 bits
    tolerance = 4e-6 if inputs["qkv"].dtype == np.float32 else 1e-3
    assert results[0].dtype == inputs["qkv"].dtype
    np.testing.assert_allclose(results[0], expected[0], rtol=tolerance, atol=tolerance)
    for found, wanted in zip(results[1:], expected[1:], strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(found[:, :, :total], wanted[:, :, :total])


@pytest.mark.parametrize("seed", range(24))
def test_attention_equals_the_reference(
    seed: int,
    library: str,
    attention_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    inputs, attributes = attention_case(seed)
    outputs = list(schemas.ATTENTION_OUTPUTS)
    model = make_model("GroupQueryAttention", inputs, outputs, **attributes)
    results = run(model, inputs, library=library, threads=1 + seed // 6 % 2)
    _require_attention(inputs, attributes, results)
    # new memory: nothing of what lay behind the past's tokens comes along
    assert not any(np.isnan(result).any() for result in results)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(2, 3, 34), (1, 1, 3072), (300, 200), (0, 8), (6,)])
def test_gated_silu_equals_the_reference(
    shape: tuple[int, ...],
    dtype: type[Any],
    library: str,
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    x = (4 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    model = make_model("GatedSiLU", {"X": x}, ["Y"])
    (y,) = run(model, {"X": x}, library=library, threads=2)
    expected = reference.gated_silu(x)
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    tolerance = 4 * 2.0**-23 if dtype == np.float32 else 2.0**-10
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("constant", [True, False])
def test_group_matmul_keeps_its_bound(
    constant: bool,
    bits: int,
    block: int,
    dtype: type[Any],
    library: str,
    group_matmul_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    tensors, attributes = group_matmul_case(bits, bits, block, n=1500)
    width, rounds = attributes["K"], os.environ.get("BIVLM_FORCE_KERNEL") != "generic"
    for leading in LEADING:
        x = np.random.default_rng(1).standard_normal((*leading, width)).astype(dtype)
        inputs = {"X": x, **tensors}
        constants = tuple(tensors) if constant else ()
        model = make_model("GroupMatMul", inputs, ["Y"], constants=constants, **attributes)
        feeds = {"X": x} if constant else inputs
        (y,) = run(model, feeds, library=library, threads=2)
        expected = reference.group_matmul(x, *tensors.values(), **attributes)
        assert (y.dtype, y.shape) == (dtype, expected.shape)
        identity = np.eye(width)
        weight = np.abs(reference.group_matmul(identity, *tensors.values(), **attributes))
        magnitude = np.abs(x).astype(np.float64)
        bound = np.zeros(expected.shape)
        for begin in range(0, width, 64):
            part = slice(begin, begin + 64)
            step = magnitude[..., part].max(axis=-1, keepdims=True) / 127
            bound += rounds * step / 2 * weight[part].sum(axis=0)
        bound += 2 * width * 2.0**-23 * (bound + magnitude @ weight)
        if dtype == np.float16:
            bound = bound * (1 + 2.0**-11) + 2.0**-11 * np.abs(expected) + 2.0**-25
        assert (np.abs(y - expected) <= bound).all()


def test_group_matmul_of_the_library_is_taken_before_the_function(
    library: str,
    group_matmul_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    optimized = str(tmp_path / "optimized.onnx")
    tensors, attributes = group_matmul_case(0, 8, 64)
    x = np.ones((1, attributes["K"]), np.float32)
    functions = [group_matmul_function("nbits", 8, 23)]
    inputs = {"X": x, **tensors}
    model = make_model("GroupMatMul", inputs, ["Y"], functions=functions, **attributes)
    run(model, inputs, library=library, optimized=optimized)
    assert [node.op_type for node in onnx.load(optimized).graph.node] == ["GroupMatMul"]


@pytest.mark.parametrize("seed", range(12))
def test_attention_in_place_writes_the_new_tokens_alone(
    seed: int, library: str, attention_case: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    inputs, attributes = attention_case(seed)
    total = int(inputs["total_sequence_length"][0])
    for name in ("past_key", "past_value"):
        room = max(0, total + 2 - inputs[name].shape[2])
        inputs[name] = np.pad(
            inputs[name], [(0, 0), (0, 0), (0, room), (0, 0)], constant_values=np.nan
        )
    outputs = list(schemas.ATTENTION_OUTPUTS)
    model = make_model("GroupQueryAttention", inputs, outputs, **attributes)
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    session = ort.InferenceSession(model.SerializeToString(), options)
    binding = session.io_binding()
    given = {name: array.copy() for name, array in inputs.items()}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    for name in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])
    session.run_with_iobinding(binding)
    results = [value.numpy() for value in binding.get_outputs()]
    _require_attention(inputs, attributes, results)
    for result in results[1:]:
        assert np.isnan(result[:, :, total:]).all(), "written behind the tokens"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(30))
def test_token_prune_equals_the_reference_exactly(
    seed: int,
    mode: str,
    library: str,
    prune_case: Callable[..., Any],
    make_model: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    inputs, attributes = prune_case(seed, mode)
    outputs = ["pruned", "kept_indices", "lengths", "token_map"][: 2 + seed % 3]
    model = make_model("TokenPrune", inputs, outputs, **attributes)
    expected = reference_prune.token_prune(*inputs.values(), **attributes)
    results = run(model, inputs, library=library, threads=1 + seed // 2 % 2)
    assert len(results) == len(outputs)
    for output, wanted in zip(results, expected, strict=False):
        assert output.dtype == wanted.dtype
        np.testing.assert_array_equal(output, wanted)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("mode", ["maxmin", "mmr", "dpp", "coverage"])
def test_token_prune_agrees_on_real_features(
    mode: str, alike: bool, library: str, make_model: Callable[..., Any], run: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(7)
    hidden = rng.standard_normal((2, 576, 64))
    if alike:  # cosines of 0.99999, as a plain background has
        hidden[:, 60:] = hidden[:, :1] + 3e-3 * hidden[:, 60:]
    inputs: dict[str, Any] = {
        "hidden": hidden.astype(np.float32),
        "scores": rng.random((2, 576), dtype=np.float32),
        "segments": None,
        "keep": np.array([64]),
    }
    model = make_model("TokenPrune", inputs, ["pruned", "kept_indices"], mode=mode)
    _, indices = run(model, inputs, library=library)
    expected = reference_prune.token_prune(*inputs.values(), mode=mode).kept_indices
    for row, wanted in zip(indices, expected, strict=True):
        # float32 may turn a near tie; from there on the greedy choices differ
        assert len(set(row.tolist()) & set(wanted.tolist())) >= 0.95 * 64
