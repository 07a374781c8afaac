"""The arithmetic of the export report, and its file sizes against the files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bivlm_edge.errors import BundleError, ValidationError
from bivlm_edge.runtime.inspection import inspect_bundle


def _edit_report(bundle: Any, **changes: Any) -> None:
    path = bundle.paths.assets / "export_report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**report, **changes}), encoding="utf-8")


def _layer(bundle: Any, **changes: Any) -> list[dict[str, Any]]:
    path = bundle.paths.assets / "export_report.json"
    return [{**json.loads(path.read_text(encoding="utf-8"))["layers"][0], **changes}]


def test_file_sizes_are_measured_and_bits_follow_from_reported_bytes(bundle: Any) -> None:
    found = inspect_bundle(bundle.graph, verify=True)
    graph, data = bundle.graph.stat().st_size, bundle.paths.data.stat().st_size
    assets = sum(file.stat().st_size for file in bundle.paths.assets.iterdir())
    assert found.file_bytes == {
        "graph": graph, "data": data, "assets": assets, "total": graph + data + assets,
    }  # fmt: skip
    assert found.true_bits_per_weight == 250 * 8 / 1024
    assert found.layers[0].true_bits == 250 * 8 / 1024
    assert found.skipped == {"mock.head": "too small"}
    assert found.verified


def test_verify_finds_a_change_between_the_probed_blocks(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bivlm_edge.bundle.PROBE_BLOCKS", 2)
    bundle = make_bundle()
    data = bytearray(bundle.paths.data.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.paths.data.write_bytes(data)
    assert not inspect_bundle(bundle.graph).verified
    with pytest.raises(BundleError, match="checksum"):
        inspect_bundle(bundle.graph, verify=True)


def test_bits_that_do_not_follow_from_the_reported_bytes_are_refused(bundle: Any) -> None:
    _edit_report(bundle, layers=_layer(bundle, true_bits=1.08))
    with pytest.raises(ValidationError, match=r"claims 1\.08 true bits .* make 1\.9531"):
        inspect_bundle(bundle.graph)


def test_stand_in_of_a_baseline_shows_both_counts(bundle: Any) -> None:
    layers = _layer(bundle, op="MatMul (dense stand-in)", bytes=16 * 64 * 4, true_bits=3.39)
    _edit_report(bundle, layers=layers, true_bits_per_weight=None)
    found = inspect_bundle(bundle.graph)
    assert (found.layers[0].true_bits, found.layers[0].reported_bits) == (32.0, 3.39)
    assert found.true_bits_per_weight is None


def test_layer_left_in_float_needs_no_method(bundle: Any) -> None:
    row = {"name": "v.conv", "op": "Conv", "n": 4, "k": 8, "bytes": 128, "true_bits": 32.0}
    _edit_report(bundle, layers=[row], true_bits_per_weight=None)
    layer = inspect_bundle(bundle.graph).layers[0]
    assert (layer.method, layer.planes, layer.output_error) == (None, None, None)


def test_operator_of_a_layer_is_passed_on_where_reported(bundle: Any) -> None:
    assert inspect_bundle(bundle.graph).layers[0].node is None
    _edit_report(bundle, layers=_layer(bundle, node="mock.gate_proj+up_proj"))
    assert inspect_bundle(bundle.graph).layers[0].node == "mock.gate_proj+up_proj"


def test_total_that_does_not_follow_from_the_reported_layers_is_refused(bundle: Any) -> None:
    _edit_report(bundle, true_bits_per_weight=1.0)
    with pytest.raises(ValidationError, match=r"claims 1\.0 .* the whole model"):
        inspect_bundle(bundle.graph)


def test_reported_file_sizes_are_compared_with_the_files(bundle: Any) -> None:
    _edit_report(bundle, file_bytes={"graph": 1, "data": 2})
    with pytest.raises(ValidationError, match="claims 1 bytes of graph"):
        inspect_bundle(bundle.graph)


def test_more_reported_weight_bytes_than_the_files_have_are_refused(bundle: Any) -> None:
    layers = _layer(bundle, bytes=10**9, n=10**5, k=8 * 10**4, true_bits=1.0)
    _edit_report(bundle, layers=layers, true_bits_per_weight=1.0)
    with pytest.raises(ValidationError, match="lists 1000000000 bytes of weights"):
        inspect_bundle(bundle.graph)


def test_model_without_quantized_layers_has_no_bits(bundle: Any) -> None:
    _edit_report(bundle, layers=_layer(bundle, op="MatMul"), true_bits_per_weight=None)
    assert inspect_bundle(bundle.graph).true_bits_per_weight is None


@pytest.mark.parametrize("content", ["", "[]", '{"layers": [{"name": "x"}]}', '{"layers": 3}'])
def test_malformed_report_is_refused(bundle: Any, content: str) -> None:
    (bundle.paths.assets / "export_report.json").write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match="not a report of bivlm-export"):
        inspect_bundle(bundle.graph)


@pytest.mark.parametrize("key", ["true_bits_all_linear", "file_bits_per_parameter"])
def test_other_bits_are_passed_on_where_reported(bundle: Any, key: str) -> None:
    assert getattr(inspect_bundle(bundle.graph), key) is None
    for value in (2.5, None):
        _edit_report(bundle, **{key: value})
        assert getattr(inspect_bundle(bundle.graph), key) == value
    for bad in (float("nan"), "much", [2.5]):
        _edit_report(bundle, **{key: bad})
        with pytest.raises(BundleError, match="not a report of bivlm-export"):
            inspect_bundle(bundle.graph)


def test_missing_report_is_named(bundle: Any) -> None:
    (bundle.paths.assets / "export_report.json").unlink()
    with pytest.raises(BundleError, match=r"export_report\.json' is missing"):
        inspect_bundle(bundle.graph)
