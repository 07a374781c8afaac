"""Broken weights and activations are refused by name; what can be handled is quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bivlm_edge.calibration.moments import InputStatistics, StatisticsCollector
from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import CheckpointError, DataError
from bivlm_edge.quant.quantizer import QuantizedModel, quantize_model


class Part(NamedTuple):
    name: str
    blocks: Sequence[tuple[str, nn.Module]]


class Pair(nn.Module):
    """Two layers behind one another, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


@dataclass
class Model:
    module: nn.Module

    def block_sequences(self) -> list[Part]:
        return [Part("decoder", [("body", self.module.get_submodule("body"))])]


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Pair()

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def make_model() -> Model:
    torch.manual_seed(0)
    return Model(Whole().eval().requires_grad_(False))


def make_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(90, 64, generator=generator)} for _ in range(3)]


def quantize(model: Model, batches: list[dict[str, Tensor]], method: str) -> QuantizedModel:
    bits = 2.5 if method == "bivlm-edge" else 2.0
    return quantize_model(model, batches, QuantConfig(method=method, bits=bits))  # type: ignore[arg-type]


METHODS = ["bivlm-edge", "gptq", "rtn"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, parameter: str) -> None:
    model = make_model()
    getattr(model.module.get_submodule("body.second"), parameter).view(-1)[:2] = value
    with pytest.raises(CheckpointError, match=f"{parameter} of 'body.second' holds 2 NaN"):
        quantize(model, make_batches(), "rtn")


class Speaking(nn.Module):
    """A body between a token table and a head that no method quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 64)
        self.body = Pair()
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 30, bias=False)

    def forward(self, input_ids: Tensor, gain: Tensor) -> SimpleNamespace:
        hidden = self.norm(self.body(self.embed_tokens(input_ids)))
        return SimpleNamespace(logits=self.lm_head(hidden) * gain)


def make_speaking(*gains: float) -> tuple[Model, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    ids = torch.arange(30).reshape(2, 15)
    batches = [{"input_ids": ids, "gain": torch.tensor(gain)} for gain in gains]
    return Model(Speaking().eval().requires_grad_(False)), batches


@pytest.mark.parametrize("method", ["bivlm-edge", "rtn", "none"])
@pytest.mark.parametrize(
    ("part", "kind"),
    [("lm_head", "weight"), ("embed_tokens", "weight"), ("norm", "weight"), ("norm", "bias")],
)
def test_parts_that_are_not_quantized_are_refused_by_name_too(
    part: str, kind: str, method: str
) -> None:
    model, batches = make_speaking(1.0, 1.0)
    getattr(model.module.get_submodule(part), kind).view(-1)[3] = math.nan
    with pytest.raises(CheckpointError, match=f"the {kind} of '{part}' holds 1 NaN or infinite"):
        quantize(model, batches, method)


@pytest.mark.parametrize("gain", [math.nan, math.inf])
def test_answers_that_are_not_finite_are_refused_with_layer_and_batch(gain: float) -> None:
    model, batches = make_speaking(1.0, 1.0, gain)
    expected = (
        r"batch 2 makes NaN or infinity in the gradient of the output of 'body.second' "
        r"\(30 of 30 tokens\)"
    )
    with pytest.raises(DataError, match=expected):
        quantize(model, batches, "bivlm-edge")


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_finite_are_refused_with_layer_and_batch(method: str) -> None:
    batches = make_batches()
    batches[1]["x"][5:7, 3] = math.nan
    expected = r"batch 1 makes NaN or infinity in the input of 'body.first' \(2 of 90 tokens\)"
    with pytest.raises(DataError, match=expected):
        quantize(make_model(), batches, method)


def test_activations_too_large_for_their_squares_are_refused_by_name() -> None:
    batches = make_batches()
    batches[0]["x"] *= 1e20
    with pytest.raises(DataError, match=r"squares of the inputs of 'body.first' exceed"):
        quantize(make_model(), batches, "gptq")


@pytest.mark.parametrize("method", METHODS)
def test_dead_channels_zero_rows_and_few_tokens_are_quantized(method: str) -> None:
    model = make_model()
    batches = [{"x": batch["x"][:5]} for batch in make_batches()]  # 10 rows for 64 columns
    for batch in batches:
        batch["x"][:, 7] = 0
    first: Any = model.module.get_submodule("body.first")
    first.weight[9] = 0
    result = quantize(model, batches, method)
    assert result.skipped == {"body.unused": "not reached by the calibration inputs"}
    assert np.isfinite(result.weights["body.first"].dequantize()).all()
    assert np.abs(result.weights["body.first"].dequantize()[9]).max() < 1e-6
    assert all(math.isfinite(report.output_error) for report in result.reports)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_never_change_are_quantized(method: str) -> None:
    """Zero in front of the first layer, its bias in front of the second."""
    result = quantize(make_model(), [{"x": torch.zeros(9, 64)}] * 2, method)
    for weight in result.weights.values():
        assert np.isfinite(weight.dequantize()).all()


def test_layer_that_only_a_held_out_batch_reaches_is_fitted_to_it() -> None:
    class Sometimes(Pair):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return self.second(x) if len(x) == 50 else x

    torch.manual_seed(0)
    whole = Whole()
    whole.body = Sometimes()
    batches = [{"x": torch.randn(50 if i == 0 else 20, 64)} for i in range(11)]  # 0, 10 held out
    result = quantize(Model(whole.eval().requires_grad_(False)), batches, "gptq")
    assert [report.error_is_held_out for report in result.reports] == [True, False]
    assert result.reports[1].output_error < 0.2


def test_layer_that_the_first_batch_does_not_reach_is_quantized() -> None:
    class Branching(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.between = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x)
            if len(x) == 50:
                hidden = hidden + self.between(hidden)
            return self.second(hidden)

    torch.manual_seed(0)
    whole = Whole()
    whole.body = Branching()
    batches = [{"x": torch.randn(20 + 30 * (i % 2), 64)} for i in range(3)]
    result = quantize(Model(whole.eval().requires_grad_(False)), batches, "gptq")
    assert list(result.weights) == ["body.first", "body.between", "body.second"]
    assert result.skipped == {"body.unused": "not reached by the calibration inputs"}


def with_hessian(monkeypatch: pytest.MonkeyPatch, diagonal: float, others: float) -> None:
    """Let every layer's inputs to fit have the same unsound Hessian."""
    finish = StatisticsCollector.finish

    def broken(collector: StatisticsCollector) -> InputStatistics:
        found = finish(collector)
        hessian = torch.full_like(found.fit.hessian, others).fill_diagonal_(diagonal)
        mean = torch.zeros_like(found.fit.mean)
        return replace(found, fit=replace(found.fit, hessian=hessian, mean=mean))

    monkeypatch.setattr(StatisticsCollector, "finish", broken)


@pytest.mark.parametrize("method", ["bivlm-edge", "gptq"])
def test_hessian_that_no_damping_helps_is_refused_by_name(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_hessian(monkeypatch, 1e-9, 1e9)
    with pytest.raises(DataError, match=r"inputs of 'body.first': .* not positive definite"):
        quantize(make_model(), make_batches(), method)


@pytest.mark.parametrize("method", ["bivlm-edge", "gptq", "pb-llm", "billm"])
def test_raised_damping_is_logged_with_the_names_of_the_layers(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_hessian(monkeypatch, 1.0, -0.02)  # least eigenvalue 1 - 63 * 0.02 = -0.26
    quantize(make_model(), make_batches(), method)
    raised = [
        text for text in caplog.messages if "Cholesky failed with damping 0.1, trying" in text
    ]
    layers = {text.partition(": ")[0] for text in raised}
    assert layers == {"the inputs of 'body.first'", "the inputs of 'body.second'"}
