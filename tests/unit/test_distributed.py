"""Two processes quantize what one does: same statistics, same plans, errors within rounding."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bivlm_edge import distributed
from bivlm_edge.calibration.capture import FixedWeights, walk
from bivlm_edge.calibration.importance import token_importance
from bivlm_edge.config import QuantConfig
from bivlm_edge.distributed import Team
from bivlm_edge.errors import DataError, RequestError
from bivlm_edge.quant.quantizer import quantize_model

CHAIN = Path(__file__).with_name("test_work_folder.py")
CONFIG = QuantConfig(bits=2.5)


def load_chain() -> Any:
    """The small model of test_work_folder.py."""
    spec = importlib.util.spec_from_file_location("chain_model", CHAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        return self.o_proj((self.q_proj(x) @ x.mT).softmax(dim=-1) @ self.v_proj(x))


class AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.Linear(64, 64)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x: Tensor = hidden_states + self.self_attn(hidden_states)
        return x + self.mlp(x).relu()


class Words(nn.Module):
    """A decoder, to which token 3 stands for image features."""

    config = SimpleNamespace(image_token_id=3)

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 64)
        self.blocks = nn.ModuleList([AttentionBlock() for _ in range(2)])

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed_tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class WordsModel:
    """Stands in for models.VisionLanguageModel."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = Words().eval().requires_grad_(False)

    def block_sequences(self) -> list[Any]:
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(self.module.blocks)]
        return [SimpleNamespace(name="decoder", blocks=blocks)]


def mean_weights() -> dict[str, Any]:
    """Mean token weights of VLMQ, by layer; the batches have 0 to 4 image tokens."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for images in range(5):
        ids = torch.randint(4, 30, (2, 9), generator=generator)
        ids[:, :images] = 3
        batches.append({"input_ids": ids})
    config = QuantConfig(method="gptq", bits=2, importance="vlmq")
    return quantize_model(WordsModel(), batches, config).modalities


def resume(folder: Path) -> tuple[list[str], dict[str, bytes]]:
    """What a second start does after the first was stopped, and what is there in the end."""
    chain = load_chain()
    batches = chain.make_batches(5)
    stop = chain.stop_at("blocks.1.left")
    with pytest.raises(chain.Stopped):
        quantize_model(chain.ChainModel(), batches, CONFIG, stop, folder)
    done: list[str] = []
    model = chain.ChainModel()
    result = quantize_model(model, batches, CONFIG, lambda name, *_: done.append(name), folder)
    return done, chain.contents(model, result)


def measure(folder: Path) -> dict[str, Any]:
    """What one process finds of everything that all must agree on."""
    chain, team = load_chain(), distributed.current()
    batches = chain.make_batches(5)
    model = chain.ChainModel()
    own = team.share(batches)
    weights = token_importance(model.module, model.block_sequences(), own, 0, team)
    parts = model.block_sequences()
    statistics = {}
    for group in walk(model.module, parts, own, FixedWeights(weights), team=team):
        for name, found in group.weighted.items():
            moments = [found.fit, found.held_out]
            statistics[name] = [
                [m.hessian.flatten().tolist(), m.mean.tolist(), m.rows, m.weight] for m in moments
            ]
    result = quantize_model(model, batches, CONFIG, work_folder=folder)
    done, resumed = resume(folder.with_name(f"{folder.name}-resumed"))
    return {
        "mean weights": mean_weights(),
        "done again": done,
        "resumed is the same": resumed == chain.contents(model, result),
        "statistics": statistics,
        "errors": [report.output_error for report in result.reports],
        "planes": [report.planes for report in result.reports],
        "bytes": result.nbytes,
        "weights": {name: w.dequantize().tolist() for name, w in result.weights.items()},
    }


def worker(task: str, out: Path) -> None:
    """Runs in each process; what it raises or writes is the result."""
    with distributed.joined() as team:
        if task == "measure":
            found = measure(out / "work")
            (out / f"{team.rank}.json").write_text(json.dumps(found))
        elif task == "fail":
            chain = load_chain()
            batches = chain.make_batches(4)
            batches[1]["x"][0, 0, 0] = float("nan")  # of the second process
            try:
                quantize_model(chain.ChainModel(), batches, CONFIG, work_folder=out / "work")
            except DataError:
                (out / f"{team.rank}.said").write_text("DataError")
                raise
        else:
            quantize_model(load_chain().ChainModel(), load_chain().make_batches(1), CONFIG)


def start(task: str, out: Path, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run `worker` in processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import importlib.util, pathlib, sys, torch\n"
        "torch.set_num_threads(1)\n"
        f"spec = importlib.util.spec_from_file_location('worker', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module.worker({task!r}, pathlib.Path({str(out)!r}))\n"
    )
    environment = os.environ | {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", script],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    finished = []
    for process in running:
        output, errors = process.communicate(timeout=240)
        finished.append(
            subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        )
    return finished


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    for process in start("measure", tmp_path):
        assert process.returncode == 0, process.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]  # the same bits in all processes
    alone = json.loads(json.dumps(measure(tmp_path / "alone")))
    assert found[0]["statistics"].keys() == alone["statistics"].keys()
    for name, expected in alone["statistics"].items():
        for ours, theirs in zip(found[0]["statistics"][name], expected, strict=True):
            for a, b in zip(ours[:2], theirs[:2], strict=True):
                scale = np.abs(b).max()
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * scale)
            assert ours[2] == theirs[2]
            assert ours[3] == pytest.approx(theirs[3], rel=1e-10)
    assert found[0]["mean weights"].keys() == alone["mean weights"].keys()
    for name, (text, image) in alone["mean weights"].items():
        assert found[0]["mean weights"][name] == pytest.approx([text, image], rel=1e-3)
        assert (text != image) == ("blocks.1" in name)  # before the first layer all weigh alike
    for one in (found[0], alone):
        assert one["resumed is the same"]
        layers = ("left", "right", "out")
        assert one["done again"] == [f"blocks.{i}.{name}" for i in (1, 2) for name in layers]
    assert found[0]["planes"] == alone["planes"]
    assert found[0]["bytes"] == alone["bytes"]
    np.testing.assert_allclose(found[0]["errors"], alone["errors"], rtol=1e-3)
    run = json.loads((tmp_path / "work" / "run.json").read_text())
    assert run["processes"] == 2


def test_the_process_that_fails_speaks_for_all(tmp_path: Path) -> None:
    first, second = start("fail", tmp_path)
    assert first.returncode == distributed.EXIT_PEER_FAILED
    assert second.returncode == 1
    assert "calibration batch 1 makes NaN" in second.stderr
    assert "Traceback" not in first.stderr
    assert [file.name for file in tmp_path.glob("*.said")] == ["1.said"]
    assert not list((tmp_path / "work").glob("layers.*"))


def test_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    errors = [process.stderr for process in start("too few batches", tmp_path)]
    said = [text for text in errors if "1 calibration batches cannot be divided over 2" in text]
    assert len(said) == 1


def test_batches_are_taken_in_turn() -> None:
    items = list("abcde")
    assert Team(1, 3).share(items) == ["b", "e"]
    assert list(Team(1, 3).numbers(2)) == [1, 4]
    assert Team().share(items) == items
    with pytest.raises(RequestError, match="cannot be divided over 6"):
        Team(0, 6).share(items)
    assert not dist.is_initialized()
    assert distributed.current() == Team()
    assert torch.equal(Team().concatenate(torch.eye(2)), torch.eye(2))
