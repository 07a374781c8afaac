"""On a GPU, with the real library for CUDA: an export answers there as on the CPU.

Skipped, with the sentence that `--provider cuda` would say, where something is missing for it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from bivlm_edge._ops_library import cuda_ops_library
from bivlm_edge.bundle import BundlePaths
from bivlm_edge.datasets import load_easy_vqa
from bivlm_edge.errors import OpsLibraryError, RequestError
from bivlm_edge.runtime import Answerer, load
from bivlm_edge.runtime.providers import check_provider

TOOL_VARIABLE = "BIVLM_DEVICE"
QUESTIONS = 20


@pytest.fixture(scope="module")
def library() -> str:
    """The library for CUDA, where a GPU can run it."""
    try:
        check_provider("cuda")
        return cuda_ops_library()
    except (RequestError, OpsLibraryError) as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("export", ["two_bit_export", "pruned_export"])
def test_the_gpu_gives_the_tokens_of_the_cpu(export: str, request: pytest.FixtureRequest) -> None:
    paths: BundlePaths = request.getfixturevalue(export)
    on_cpu, on_gpu = (
        Answerer(load(paths.graph, threads=1, provider=name)) for name in ("cpu", "cuda")
    )
    for item in load_easy_vqa("test")[:QUESTIONS]:
        picture = item.image.open()
        wanted, found = (
            answerer.ask(item.question, answerer.picture(picture)) for answerer in (on_cpu, on_gpu)
        )
        assert list(found) == list(wanted), item.question
        assert found.kept_tokens == wanted.kept_tokens


def test_bivlm_device_gives_the_same_tokens_on_the_gpu(
    library: str, two_bit_export: BundlePaths, tmp_path: Path
) -> None:
    tool = os.environ.get(TOOL_VARIABLE)
    if tool is None:
        pytest.skip(f"{TOOL_VARIABLE} names no build of bivlm-device")
    runtime = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    answerer = Answerer(load(two_bit_export.graph, threads=1))
    for number, item in enumerate(load_easy_vqa("test")[:QUESTIONS]):
        path = tmp_path / f"{number}.png"
        item.image.open().save(path)
        on_gpu = ["--provider", "cuda", "--library", library, "--onnxruntime", runtime]
        done = subprocess.run(
            [tool, two_bit_export.graph, item.question, "--image", path, "--json", *on_gpu],
            stdout=subprocess.PIPE,
            check=True,
        )
        wanted = list(answerer.ask(item.question, answerer.picture(path)))
        assert json.loads(done.stdout)["token_ids"] == wanted, item.question
