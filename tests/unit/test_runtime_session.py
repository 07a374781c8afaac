"""What can be wrong with a bundle or the library, and the sentence that says so."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from bivlm_edge.bundle import BundlePaths, file_record
from bivlm_edge.errors import BundleError, OpsLibraryError, RequestError
from bivlm_edge.runtime import load, session


def _edit_manifest(bundle: Any, **changes: Any) -> None:
    path = bundle.paths.assets / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def _replace_graph(bundle: Any, content: bytes) -> None:
    """Put other bytes there and let the manifest agree, so that only ONNX Runtime can object."""
    bundle.graph.write_bytes(content)
    files = {"graph": file_record(bundle.graph), "data": file_record(bundle.paths.data)}
    records = {
        role: {"bytes": record.bytes, "sha256": record.sha256, "probe": record.probe}
        for role, record in files.items()
    }
    _edit_manifest(bundle, files=records)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nope\.onnx' is not there"):
        load(tmp_path / "nope.onnx")


def test_missing_data(bundle: Any) -> None:
    bundle.paths.data.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data' is missing"):
        load(bundle.graph)


def test_truncated_data(bundle: Any) -> None:
    data = bundle.paths.data.read_bytes()
    bundle.paths.data.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"the manifest says .*truncated"):
        load(bundle.graph)


def test_data_of_another_export(bundle: Any) -> None:
    data = bytearray(bundle.paths.data.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.paths.data.write_bytes(data)
    with pytest.raises(BundleError, match="belongs to another export"):
        load(bundle.graph)


def test_missing_assets(bundle: Any) -> None:
    shutil.rmtree(bundle.paths.assets)
    with pytest.raises(BundleError, match=r"manifest\.json' is missing"):
        load(bundle.graph)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("change", ["size", "byte", "missing"])
def test_text_assets_of_another_export(bundle: Any, name: str, change: str) -> None:
    path = bundle.paths.assets / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content + b" " if change == "size" else content)
    if change == "missing":
        path.unlink()
    expected = f"{name}' is missing" if change == "missing" else f"{name}' .*another export"
    with pytest.raises(BundleError, match=expected):
        load(bundle.graph)


def test_tokenizer_is_compared_between_the_probed_blocks_too(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bivlm_edge.bundle.PROBE_BLOCKS", 2)
    monkeypatch.setattr("bivlm_edge.bundle.PROBE_BLOCK_BYTES", 64)
    bundle = make_bundle()
    path = bundle.paths.assets / "tokenizer.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json' does not have the checksum"):
        load(bundle.graph)


def test_manifest_without_records_of_text_assets_is_accepted(bundle: Any) -> None:
    _replace_graph(bundle, bundle.graph.read_bytes())
    (bundle.paths.assets / "tokenizer.json").write_text("{}", encoding="utf-8")
    load(bundle.graph)


def test_three_parts_renamed_together(bundle: Any) -> None:
    renamed = BundlePaths(bundle.graph.with_name("other.onnx"))
    bundle.paths.data.rename(renamed.data)
    bundle.paths.assets.rename(renamed.assets)
    bundle.graph.rename(renamed.graph)
    message = r"was exported as 'model\.onnx'; .*the name 'model\.onnx\.data': rename the parts"
    with pytest.raises(BundleError, match=message):
        load(renamed.graph)


def test_corrupted_graph(bundle: Any) -> None:
    _replace_graph(bundle, b"this is not protobuf" * 9)
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        load(bundle.graph)


def test_graph_from_before_the_cache_in_place_is_to_be_exported_again(bundle: Any) -> None:
    model = onnx.load(str(bundle.graph))
    inputs = [value for value in model.graph.input if value.name != "past_length"]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    _replace_graph(bundle, model.SerializeToString())
    with pytest.raises(BundleError, match=r"no optional input past_length.* Export .* again"):
        load(bundle.graph)


def test_graph_with_other_names_is_refused(bundle: Any) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    length = helper.make_tensor_value_info("past_length", TensorProto.INT64, [])
    default = helper.make_tensor("past_length", TensorProto.INT64, [], [-1])
    graph = helper.make_graph([node], "other", [value, length], [result], [default])
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    _replace_graph(bundle, model.SerializeToString())
    with pytest.raises(BundleError, match=r"differ in .*input_ids.*logits"):
        load(bundle.graph)


def test_graph_with_more_layers_than_the_manifest_is_refused(bundle: Any) -> None:
    _edit_manifest(bundle, layers=1)
    with pytest.raises(BundleError, match=r"differ in past_key_values\.1\.key"):
        load(bundle.graph)


def test_operator_that_this_onnxruntime_lacks_asks_for_a_newer_one(bundle: Any) -> None:
    model = onnx.load(str(bundle.graph), load_external_data=False)
    model.opset_import[0].version = 99
    _replace_graph(bundle, model.SerializeToString())
    with pytest.raises(BundleError, match="pip install --upgrade onnxruntime"):
        load(bundle.graph)


@pytest.mark.parametrize("threads", [0, -3])
def test_threads_below_one_are_refused(bundle: Any, threads: int) -> None:
    with pytest.raises(RequestError, match=f"--threads {threads}"):
        load(bundle.graph, threads=threads)


def test_no_library_is_no_silent_fallback(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIVLM_OPS_LIBRARY", raising=False)
    monkeypatch.setattr("bivlm_edge._ops_library.metadata.files", lambda _: [])
    bundle = make_bundle(domain_node="fallback")
    with pytest.raises(OpsLibraryError, match="--no-custom-ops"):
        load(bundle.graph)
    assert load(bundle.graph, custom_ops=False).library is None


def test_library_is_not_asked_for_where_the_graph_needs_none(
    bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIVLM_OPS_LIBRARY", "/nonexistent.so")
    assert load(bundle.graph).library is None


def test_variable_that_names_no_file(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIVLM_OPS_LIBRARY", "/nonexistent.so")
    with pytest.raises(
        OpsLibraryError, match=r"BIVLM_OPS_LIBRARY='/nonexistent\.so' is not a file"
    ):
        load(make_bundle(domain_node="fallback").graph)


def test_library_that_is_no_library(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libbivlm_custom_ops.so"
    library.write_text("not ELF", encoding="utf-8")
    monkeypatch.setenv("BIVLM_OPS_LIBRARY", str(library))
    with pytest.raises(
        OpsLibraryError, match=r"does not load into ONNX Runtime \d.*--no-custom-ops"
    ):
        load(make_bundle(domain_node="fallback").graph)


_REFUSING_LIBRARY = """
#include <stddef.h>
typedef struct { const void* (*get_api)(unsigned); const char* (*version)(void); } Base;
typedef void* (*CreateStatus)(int, const char*);
void* RegisterCustomOps(void* options, const Base* base) {
  (void)options;
  if (base->get_api(9999) != NULL) return NULL;
  const CreateStatus* api = (const CreateStatus*)base->get_api(17);
  return api[0](1, "bivlm needs API version 9999");
}
"""


def test_library_for_another_api_version_says_what_it_says(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a library that refuses")
    source, library = tmp_path / "refuse.c", tmp_path / "librefuse.so"
    source.write_text(_REFUSING_LIBRARY, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    monkeypatch.setenv("BIVLM_OPS_LIBRARY", str(library))
    with pytest.raises(OpsLibraryError, match="bivlm needs API version 9999"):
        load(make_bundle(domain_node="fallback").graph)


def test_graph_without_fallback_says_that_it_needs_the_library(make_bundle: Any) -> None:
    bundle = make_bundle(domain_node="none")
    with pytest.raises(OpsLibraryError, match="--fallback none"):
        load(bundle.graph, custom_ops=False)


@pytest.mark.parametrize("version", ["1.26.3", "1.9.0", "0.99"])
def test_onnxruntime_that_ignores_overloads_needs_the_library(
    make_bundle: Any, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ops, without = make_bundle("a", domain_node="fallback"), make_bundle("b")
    monkeypatch.setattr(session.ort, "__version__", version)
    with pytest.raises(OpsLibraryError, match=rf"{version} picks the wrong .* upgrade to 1\.27"):
        load(with_ops.graph, custom_ops=False)
    load(without.graph, custom_ops=False)


@pytest.mark.parametrize("version", ["1.27.0", "1.27.0.dev20260101", "2.0.0"])
def test_onnxruntime_that_knows_overloads_does_without_the_library(
    make_bundle: Any, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.ort, "__version__", version)
    assert load(make_bundle(domain_node="fallback").graph, custom_ops=False).library is None


def test_missing_function_is_told_apart_even_if_the_manifest_promises_one(
    make_bundle: Any,
) -> None:
    bundle = make_bundle(domain_node="none")
    _edit_manifest(bundle, fallback="nbits")
    with pytest.raises(OpsLibraryError, match=r"ai\.bivlm without a fallback"):
        load(bundle.graph, custom_ops=False)


@pytest.mark.parametrize(
    "message",
    [
        "BIVLM_FORCE_KERNEL=amx, but this CPU lacks it. Available: generic.",
        "BIVLM_HUGE_PAGES=2 is neither 0 (weights stay where they are) nor 1.",
    ],
)
def test_variable_that_asks_for_what_is_not_there_is_a_request_error(message: str) -> None:
    found = session._load_error(Path("m.onnx"), RuntimeError(message), "lib.so")
    assert isinstance(found, RequestError)
    assert message.rstrip(".") in str(found)


def test_weights_stay_in_the_file(bundle: Any) -> None:
    """The lead's promise: model.onnx.data is mapped, not copied."""
    loaded = load(bundle.graph)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc here")
    assert str(bundle.paths.data) in maps.read_text(encoding="utf-8")
    assert loaded.output_names[:2] == ("logits", "kept_indices")
