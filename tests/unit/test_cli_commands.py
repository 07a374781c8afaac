"""The commands as a user runs them: in another folder, by exit code, stdout and stderr."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGBA", (9, 7), (2, 0, 0, 255)).save(path)
    return str(path)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def _run(folder: Path, command: str, *arguments: object) -> Result:
    """Run a command in this process, which is quick; `_run_process` is the real thing."""
    module = importlib.import_module(f"bivlm_edge.cli.{command}")
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            module.app(list(map(str, arguments)))
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 0
    return Result(code, out.getvalue(), err.getvalue())


def _run_process(folder: Path, command: str, *arguments: object) -> Result:
    words = [sys.executable, "-P", "-m", f"bivlm_edge.cli.{command}", *map(str, arguments)]
    found = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    return Result(found.returncode, found.stdout, found.stderr)


def _last_json(result: Result) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("command", ["run", "eval", "bench", "inspect", "redundancy"])
def test_help_has_examples(tmp_path: Path, command: str) -> None:
    result = _run(tmp_path, command, "--help")
    assert result.returncode == 0
    assert f"bivlm-{command} model.onnx" in result.stdout
    assert "--debug" in result.stdout


@pytest.mark.parametrize("command", ["run", "eval", "bench", "inspect", "redundancy"])
def test_unknown_option_and_missing_argument_exit_2(tmp_path: Path, command: str) -> None:
    for arguments in (("--nonsense",), ()):
        result = _run(tmp_path, command, *arguments)
        assert result.returncode == 2
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("run", ("hi",)),
        ("eval", ("--data", "easy-vqa")),
        ("bench", ()),
        ("inspect", ()),
        ("redundancy", ("--data", "easy-vqa")),
    ],
)
def test_missing_model_exits_3_in_one_line(
    tmp_path: Path, command: str, rest: tuple[str, ...]
) -> None:
    result = _run_process(tmp_path, command, "nope.onnx", *rest)
    assert result.returncode == 3
    assert result.stderr.startswith(f"bivlm-{command}: 'nope.onnx' is not there.")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither MODEL nor --synthetic was given"),
        (("model.onnx", "--synthetic", "smolvlm-256m"), "both MODEL and --synthetic was given"),
        (("--synthetic", "smolvlm-1m"), "--synthetic 'smolvlm-1m' is not known. Accepted: smol"),
        (("model.onnx", "--refresh"), "--refresh goes with --synthetic only"),
        (("model.onnx", "--vocabulary-bits", "4"), "--vocabulary-bits goes with --synthetic only"),
        (("--synthetic", "smolvlm-256m", "--vocabulary-bits", "5"), "5 is not known. Accepted: 8"),
    ],
)
def test_bench_takes_a_model_or_a_synthetic_one(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = _run(tmp_path, "bench", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_bench_says_what_building_a_synthetic_model_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "bivlm_edge.synthetic.build", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # as on a device
    result = _run(tmp_path, "bench", "--synthetic", "smolvlm-256m")
    assert result.returncode == 2
    assert "must be built first, which needs torch" in result.stderr


def test_run_prints_the_answer_and_json_agrees(bundle: Any, image: str, tmp_path: Path) -> None:
    plain = _run_process(tmp_path, "run", bundle.graph, "--image", image, "what is this?")
    found = _last_json(
        _run(tmp_path, "run", bundle.graph, "--image", image, "what is this?", "--json")
    )
    assert plain.returncode == 0
    assert plain.stdout == found["text"] + "\n"
    assert found["new_tokens"] > 0
    assert found["prompt_tokens"] == found["kept_tokens"] == len("what is this?") + 8
    assert found["stop_reason"] in ("end", "length")


def test_run_without_a_picture_and_with_a_seed(bundle: Any, tmp_path: Path) -> None:
    arguments = (bundle.graph, "hello", "--temperature", "5", "--seed", "1", "--json")
    first, second = (_last_json(_run(tmp_path, "run", *arguments)) for _ in range(2))
    assert first["text"] == second["text"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("",), 2, "prompt is empty"),
        (("x" * 60,), 2, "the prompt has 62 tokens"),
        (("hi", "--max-new-tokens", "0"), 2, "--max-new-tokens 0"),
        (("hi", "--threads", "0"), 2, "--threads 0"),
        (("hi", "--temperature", "-1"), 2, "--temperature -1"),
        (("hi", "--image", "nope.png"), 3, "'nope.png' does not exist"),
        (("hi", "--image", "a.png", "--image", "b.png"), 2, "one picture per question"),
        (("hi", "--image", "."), 3, "cannot be read as a picture"),
        (("hi", "--show-tokens", "t.png"), 2, "--show-tokens draws on the picture"),
        (("hi", "--image", "a.png", "--show-tokens", "t.jpg"), 2, "t.jpg is no PNG"),
    ],
)
def test_run_refuses_with_exit_code_and_sentence(
    bundle: Any, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = _run(tmp_path, "run", bundle.graph, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_run_without_library_names_the_way_out(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIVLM_OPS_LIBRARY", str(tmp_path / "nope.so"))
    bundle = make_bundle(domain_node="fallback")
    assert _run(tmp_path, "run", bundle.graph, "hi").returncode == 2
    assert _run(tmp_path, "run", bundle.graph, "hi", "--no-custom-ops").returncode == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = _run(tmp_path, "run", "nope.onnx", "hi", "--debug")
    assert result.returncode == 3
    assert "read_manifest" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("bivlm-run: 'nope.onnx'")


def _write_questions(folder: Path, image: str, count: int) -> Path:
    path = folder / "questions.jsonl"
    rows = [{"image": image, "question": f"q{n}", "answer": "yes"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_eval_ends_with_one_line_of_json(bundle: Any, image: str, tmp_path: Path) -> None:
    data = _write_questions(tmp_path, image, 5)
    result = _run(tmp_path, "eval", bundle.graph, "--data", data, "--limit", "3")
    found = _last_json(result)
    assert (found["n"], found["correct"], found["accuracy"]) == (3, 0, 0.0)
    assert found["open_ended_accuracy"] is None
    assert found["per_kind"]["yes_no"]["n"] == 3
    assert found["interval"][0] == 0.0
    assert "95 % interval" in result.stdout
    only = _run(tmp_path, "eval", bundle.graph, "--data", data, "--json")
    assert len(only.stdout.splitlines()) == 1
    assert _last_json(only)["n"] == 5


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        ('{"image": 3}', (), 3, "questions.jsonl:1"),
        ("not json", (), 3, "questions.jsonl:1 is not JSON"),
        ("", (), 3, "holds no questions"),
        (None, (), 3, "cannot be read"),
        ("{}", ("--limit", "0"), 2, "--limit 0"),
        ("{}", ("--data", "easy-vqa", "--split", "val"), 2, "--split 'val' is not known"),
        ("{}", ("--data", "scenes", "--split", "dev"), 2, "Accepted: train, validation, test."),
    ],
)
def test_eval_refuses_bad_data(
    bundle: Any, tmp_path: Path, content: str | None, arguments: tuple[str, ...], code: int,
    message: str,
) -> None:  # fmt: skip
    data = tmp_path / "questions.jsonl"
    if content is not None:
        data.write_text(content, encoding="utf-8")
    result = _run(tmp_path, "eval", bundle.graph, "--data", data, *arguments)
    assert result.returncode == code
    assert message in result.stderr


def test_bench_compares_and_ends_with_json(make_bundle: Any, tmp_path: Path) -> None:
    first, second = make_bundle("first", domain_node="fallback"), make_bundle("second")
    result = _run(
        tmp_path, "bench", first.graph, "--no-custom-ops", "--compare", second.graph, "--repeats",
        "2", "--warmups", "0", "--new-tokens", "3", "--prompt", "hi",
    )  # fmt: skip
    found = _last_json(result)
    assert [model["operators"] for model in found["models"]] == ["fallback", "standard"]
    assert [model["label"] for model in found["models"]] == ["first/model", "second/model"]
    assert found["ratios"][0]["decode_ms"]["median"] > 0
    assert "RssAnon" in result.stdout


def test_bench_profiles_at_a_length_of_context(bundle: Any, tmp_path: Path) -> None:
    result = _run(
        tmp_path, "bench", bundle.graph, "--repeats", "1", "--warmups", "0", "--new-tokens", "4",
        "--prompt", "hi", "--context", "30", "--profile",
    )  # fmt: skip
    (model,) = _last_json(result)["models"]
    assert model["kv_cache_bytes"] == (30 + 3) * 16
    assert model["profile"]["decode"]["cached"] == 31
    assert "model: one decode step" in result.stdout


def test_bench_refuses_a_missing_picture(bundle: Any, tmp_path: Path) -> None:
    result = _run(tmp_path, "bench", bundle.graph, "--image", "nope.png")
    assert result.returncode == 3
    assert "'nope.png' does not exist" in result.stderr


def test_inspect_table_and_json(bundle: Any, tmp_path: Path) -> None:
    plain = _run(tmp_path, "inspect", bundle.graph)
    assert plain.returncode == 0
    assert "mock.q_proj" in plain.stdout
    assert "1.9531" in plain.stdout
    found = _last_json(_run(tmp_path, "inspect", bundle.graph, "--verify", "--json"))
    assert found["true_bits_per_weight"] == 250 * 8 / 1024
    assert found["verified"] is True
    assert {"file_bytes", "layers", "skipped"} <= set(found)


def test_inspect_shows_other_bits_where_reported(bundle: Any, tmp_path: Path) -> None:
    assert "per parameter" not in _run(tmp_path, "inspect", bundle.graph).stdout
    path = bundle.paths.assets / "export_report.json"
    values = {"file_bits_per_parameter": 3.125, "true_bits_all_linear": 2.0625}
    report = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**report, **values}), encoding="utf-8")
    plain = _run(tmp_path, "inspect", bundle.graph).stdout
    assert "3.1250" in plain
    assert "2.0625" in plain
    found = _last_json(_run(tmp_path, "inspect", bundle.graph, "--json"))
    assert {name: found[name] for name in values} == values


def test_inspect_of_a_report_that_contradicts_itself_exits_1(bundle: Any, tmp_path: Path) -> None:
    path = bundle.paths.assets / "export_report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**report, "true_bits_per_weight": 1.0}), encoding="utf-8")
    result = _run(tmp_path, "inspect", bundle.graph)
    assert result.returncode == 1
    assert "true bits" in result.stderr


def test_reader_that_leaves_gets_no_complaint(bundle: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "bivlm_edge.cli.inspect", str(bundle.graph)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), complaint) == (141, "")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("run", ["hi"]), ("bench", []), ("eval", ["--data", "easy-vqa"])],
)
def test_provider_that_is_not_known_or_not_there_is_refused(
    bundle: Any, tmp_path: Path, command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = _run(tmp_path, command, bundle.graph, *arguments, "--provider", "gpu")
    assert unknown.returncode == 2
    assert "--provider 'gpu' is not known. Accepted: cpu, cuda." in unknown.stderr
    monkeypatch.setattr("bivlm_edge.runtime.providers._DRIVER", "libnot-there.so.1")
    missing = _run(tmp_path, command, bundle.graph, *arguments, "--provider", "cuda")
    assert missing.returncode == 2
    assert f"bivlm-{command}: --provider cuda: no NVIDIA driver" in missing.stderr


def test_kernels_take_no_provider(tmp_path: Path) -> None:
    found = _run(tmp_path, "bench", "--kernels", "--provider", "cuda")
    assert found.returncode == 2
    assert "--provider is about a model" in found.stderr
