"""Calibration on a device, with a stand-in for one: tensors that refuse those of the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
import typer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from bivlm_edge import distributed
from bivlm_edge.calibration import precision
from bivlm_edge.calibration.capture import walk
from bivlm_edge.calibration.place import HOME, Place, find_place
from bivlm_edge.cli.compare import app as compare_app
from bivlm_edge.cli.export import app as export_app
from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import RequestError
from bivlm_edge.quant import quantizer
from bivlm_edge.quant.quantizer import quantize_model
from bivlm_edge.quant.work_folder import pack_weight

GPU = torch.device("cuda", 0)
ACROSS = {Tensor.to, Tensor.copy_, Tensor.cpu, Tensor.__getitem__}  # take tensors of both
PRODUCTS = {torch._C._nn.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}


class OnDevice(Tensor):
    """Values in the processor's memory that count as being on a GPU.

    An operation fails if another operand, other than a number, is not there as well.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU
        if func == Tensor.numpy:
            raise TypeError("can't convert a tensor on the device to numpy")
        operands = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, Tensor)]
        if func not in ACROSS and any(
            not isinstance(one, OnDevice) and one.ndim for one in operands
        ):
            raise RuntimeError(f"{func}: operands are on the device and on the processor")
        return super().__torch_function__(func, types, args, kwargs or {})


class Device(TorchFunctionMode):
    """Makes `device=GPU` mean `OnDevice`, and counts matrix products here and there."""

    def __init__(self) -> None:
        super().__init__()
        self.here = self.there = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in PRODUCTS:
            is_there = any(isinstance(one, OnDevice) for one in args)
            self.there, self.here = self.there + is_there, self.here + (not is_there)
        if func == Tensor.cpu:
            return moved(args[0], torch.device("cpu"))
        if func == Tensor.to:
            places = [one for one in (*args[1:], kwargs.pop("device", None)) if is_device(one)]
            rest = [one for one in args[1:] if not is_device(one)]
            value = func(args[0], *rest, **kwargs) if rest or kwargs else args[0]
            return moved(value, *places) if places else value
        if kwargs.get("device") == GPU:
            return moved(func(*args, **{**kwargs, "device": None}), GPU)
        return func(*args, **kwargs)


def is_device(value: object) -> bool:
    return isinstance(value, torch.device)


def moved(value: Tensor, target: torch.device) -> Tensor:
    is_there = isinstance(value, OnDevice)
    if is_there == (target == GPU):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.clone().as_subclass(Tensor if is_there else OnDevice)  # shares no memory


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast of the processor does not reach what is on a device."""
    monkeypatch.setattr(precision, "compute_dtype", lambda: torch.float32)


@contextmanager
def device() -> Iterator[Device]:
    with pytest.MonkeyPatch.context() as patched, Device() as found:
        patched.setattr(quantizer, "find_place", lambda _: Place(GPU))
        yield found


class Part:
    name = "decoder"

    def __init__(self, module: Any) -> None:
        self.blocks = [(f"model.layers.{i}", block) for i, block in enumerate(module.model.layers)]


class Model:
    """A decoder with masks of two kinds and biases to correct."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            attn_implementation="eager",
            tie_word_embeddings=True,
        )
        self.module: Any = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)

    def block_sequences(self) -> list[Part]:
        return [Part(self.module)]


def make_batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 32, (2, 20), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def contents(model: Model, config: QuantConfig) -> dict[str, Any]:
    """Everything that a quantization leaves behind."""
    result = quantize_model(model, make_batches(), config)
    found: dict[str, Any] = {"reports": result.reports}
    for name, weight in result.weights.items():
        values, arrays = pack_weight(name, weight)
        found |= {key: array.tobytes() for key, array in arrays.items()} | {name: values}
    for name, value in model.module.state_dict().items():
        assert type(value) is Tensor, f"{name} stayed on the device"
        found[f"module {name}"] = value.numpy().tobytes()
    return found


@pytest.mark.parametrize("importance", ["none", "vlmq", "loss"])
def test_what_is_measured_on_a_device_is_what_is_measured_without(importance: str) -> None:
    config = {"bits": 2.0, "importance": importance}
    expected = contents(Model(), QuantConfig(**config))
    with device() as found:
        assert contents(Model(), QuantConfig(**config, device="cuda")) == expected
    assert found.there > 100


def test_all_passes_through_blocks_run_on_the_device() -> None:
    model = Model()
    with device() as found:
        for group in walk(model.module, model.block_sequences(), make_batches(), place=Place(GPU)):
            for layer in group.layers.values():  # as a quantizer finds them
                assert type(layer.weight.data) is Tensor
            assert type(group.inputs.fit.hessian) is Tensor
            found.here = 0  # what captured the arguments, before the first group
        assert found.here == 0
        found.there = 0
        for _ in walk(model.module, model.block_sequences(), make_batches()):
            pass
        assert found.there == 0


def test_module_is_as_it_was_after_it_was_on_a_device() -> None:
    module = Model().module
    before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with device(), Place(GPU).holding(module):
        moved = dict(module.named_parameters())
        assert all(isinstance(value, OnDevice) for value in moved.values())
        assert module.lm_head.weight is module.model.embed_tokens.weight  # tied
        assert all(isinstance(value, OnDevice) for value in module.buffers())
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is value for name, value in before.items())
    with HOME.holding(module):
        assert all(one is before[name] for name, one in module.named_parameters())


def test_stand_in_refuses_operands_from_both_sides() -> None:
    with device():
        there = torch.ones(2).to(GPU)
        with pytest.raises(RuntimeError, match="on the device and on the processor"):
            there + torch.ones(2)
        with pytest.raises(RuntimeError, match="on the device and on the processor"):
            nn.Linear(2, 2)(there)
        assert type((there * 2 + torch.tensor(1.0)).cpu()) is Tensor


def test_cuda_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RequestError, match=r"this PyTorch \(.*\) was built without CUDA"):
        quantize_model(Model(), make_batches(), QuantConfig(device="cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="finds no NVIDIA GPU"):
        find_place("cuda")
    with pytest.raises(RequestError, match=r"--device 'gpu' is not known. Accepted: cpu, cuda"):
        QuantConfig(device="gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("app", [export_app, compare_app])
def test_commands_refuse_a_device_that_is_not_there(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.chdir(tmp_path)
    own = ["m.onnx"] if app is export_app else ["--run", "gptq@2", "--no-plot"]
    done = CliRunner().invoke(app, [*own, "--device", "cuda"])
    assert done.exit_code == 2
    assert "was built without CUDA" in done.stderr
    assert not list(tmp_path.iterdir())


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_place("cuda").device == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_place("cuda").device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RequestError, match="process 2 of this machine has no GPU of its own"):
        find_place("cuda")
    assert find_place("cpu") is HOME


def test_moments_on_gpus_are_summed_over_nccl_and_all_else_over_gloo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    chosen: list[torch.device] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backends, **_: started.append(backends))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for place in (HOME, Place(torch.device("cuda", 1))):
        with distributed.joined(place.device):
            pass
    assert chosen == [torch.device("cuda", 1)]
    assert started[0] == "gloo"
    by_device = dist.BackendConfig(dist.Backend(started[1])).get_device_backend_map()
    assert by_device == {"cpu": "gloo", "cuda": "nccl"}
