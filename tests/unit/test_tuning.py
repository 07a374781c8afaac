"""Fine-tuning: gradients are those of the weight, planted optima are found, nothing gets worse."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import RequestError, TuningError, UnsupportedModelError
from bivlm_edge.quant.hadamard import pack_signs
from bivlm_edge.quant.packed import (
    BinaryWeight,
    pack_coefficients,
    pack_planes,
    padded_columns,
    plane_classes,
)
from bivlm_edge.quant.quantizer import QuantizedModel
from bivlm_edge.tuning.objective import Teacher, mean_divergence
from bivlm_edge.tuning.planes import PlaneWeight
from bivlm_edge.tuning.tune import drawn_batches, quantize_and_tune, split_batches, tune_model

VOCABULARY, TOKENS = 48, 20


class Part(NamedTuple):
    name: str
    blocks: Sequence[tuple[str, nn.Module]]


@dataclass
class TinyModel:
    """Stands in for models.LanguageModel."""

    module: Any

    def block_sequences(self) -> list[Part]:
        layers = enumerate(self.module.model.layers)
        return [Part("decoder", [(f"model.layers.{i}", block) for i, block in layers])]


def tiny_model() -> TinyModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    return TinyModel(LlamaForCausalLM(config).eval().requires_grad_(False))


def make_batches(count: int, samples: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(VOCABULARY, (samples, TOKENS), generator=generator)}
        for _ in range(count)
    ]


def make_weight(
    n: int, k: int, planes: tuple[int, ...], block: int, *, seed: int = 0, ordered: bool = True
) -> BinaryWeight:
    """Random planes; coefficients fall from plane to plane, as fitted ones do."""
    rng = np.random.default_rng(seed)
    kp = padded_columns(k)
    order = rng.permutation(kp).astype(np.uint16) if ordered else None
    channels = np.arange(kp) if order is None else order.astype(np.int64)
    signs = [rng.random((n, width)) < 0.5 for width in planes]
    if not block:
        for plane in signs:
            plane[:, (channels >= k)[: plane.shape[1]]] = False
    falling = np.array([1.0, 0.5, 0.25, 0.12])
    rows = [(0.5 + rng.random((n, 1))) * falling[: group.planes] for group in plane_classes(planes)]
    return BinaryWeight(
        n=n,
        k=k,
        plane_columns=planes,
        codes=pack_planes(signs),
        coefficients=pack_coefficients(np.concatenate(rows, axis=1).astype(np.float16) / 8),
        hadamard_block=block,
        signs=pack_signs(rng.random(kp) < 0.5) if block else None,
        order=order,
    )


SHAPES = [
    (20, 100, (128, 64), 0),
    (20, 100, (128, 64), 64),
    (33, 128, (128, 128, 64), 128),
    (16, 192, (192, 128, 64, 64), 64),
    (16, 64, (64,), 64),
]


@pytest.mark.parametrize(("n", "k", "planes", "block"), SHAPES)
@pytest.mark.parametrize("latent", [False, True])
def test_untouched_planes_are_the_packed_weight(
    n: int, k: int, planes: tuple[int, ...], block: int, latent: bool
) -> None:
    packed = make_weight(n, k, planes, block)
    values = packed.dequantize()
    noise = np.random.default_rng(1).normal(size=(n, k)).astype(np.float32)
    target = torch.from_numpy(values + 0.05 * noise) if latent else None
    weight = PlaneWeight(packed, target)
    np.testing.assert_allclose(weight.weight().numpy(), values, atol=1e-6)
    again = weight.pack()
    np.testing.assert_array_equal(again.dequantize(), values)
    assert again.nbytes == packed.nbytes
    assert again.plane_columns == packed.plane_columns


def test_planes_that_are_out_of_order_become_latent_weights_of_the_same_values() -> None:
    packed = make_weight(16, 128, (128, 128), 0)
    swapped = dataclasses.replace(
        packed, coefficients=np.ascontiguousarray(-packed.coefficients[:, ::-1])
    )
    weight = PlaneWeight(swapped, torch.zeros(16, 128))
    np.testing.assert_allclose(weight.weight().numpy(), swapped.dequantize(), atol=1e-6)
    np.testing.assert_array_equal(weight.pack().dequantize(), swapped.dequantize())


@pytest.mark.parametrize(("n", "k", "planes", "block"), SHAPES)
def test_gradients_of_coefficients_are_those_of_the_weight(
    n: int, k: int, planes: tuple[int, ...], block: int
) -> None:
    weight = PlaneWeight(make_weight(n, k, planes, block))
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(n, k, generator=generator)
    change = torch.randn(weight.coefficients.shape, generator=generator)
    slope, latent = weight.project(gradient)
    before = weight.weight().double()
    weight.coefficients += change
    expected = ((weight.weight().double() - before) * gradient).sum()
    assert float((slope * change).sum()) == pytest.approx(float(expected), rel=1e-3, abs=1e-3)
    assert latent is None


def test_latent_weights_lie_in_the_cells_of_their_signs_next_to_the_float_weight() -> None:
    packed = make_weight(16, 64, (64, 64), 0, ordered=False)
    values = torch.from_numpy(packed.dequantize())
    near = PlaneWeight(packed, values)
    assert near.latent is not None
    torch.testing.assert_close(near.latent, values)
    far = PlaneWeight(packed, -10 * values)
    assert far.latent is not None
    assert bool((far.latent.sign() == values.sign()).all())
    assert float(far.latent.abs().max()) < float(values.abs().max())


def quantized_with(module: Any, weights: dict[str, BinaryWeight]) -> QuantizedModel:
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_submodule(name).weight.copy_(torch.from_numpy(weight.dequantize()))
    return QuantizedModel(weights=dict(weights))


def planted(
    factor: float = 1.0, flipped: float = 0.0
) -> tuple[TinyModel, QuantizedModel, Teacher, dict[str, BinaryWeight]]:
    """A float model that the planes hold exactly, and a model with other coefficients or signs."""
    model = tiny_model()
    linear = [
        name
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]
    optimum = {}
    for number, name in enumerate(linear):
        n, k = model.module.get_submodule(name).weight.shape
        kp = padded_columns(k)
        optimum[name] = make_weight(n, k, (kp, kp), 64, seed=number, ordered=False)
    quantized_with(model.module, optimum)
    teacher = Teacher(copy.deepcopy(model.module))
    rng = np.random.default_rng(5)
    start = {}
    for name, weight in optimum.items():
        scale = factor ** rng.choice([-1.0, 1.0], size=weight.coefficients.shape)
        noise = rng.random((weight.codes.size, 8)) < flipped
        codes = weight.codes ^ np.packbits(noise).reshape(weight.codes.shape)
        start[name] = dataclasses.replace(
            weight,
            coefficients=(weight.coefficients * scale).astype(np.float16),
            codes=codes if weight.n % 16 == 0 else weight.codes,
        )
    return model, quantized_with(model.module, start), teacher, optimum


def silent(*_: object) -> None:
    """Takes progress."""


def check_module(model: TinyModel, quantized: QuantizedModel) -> None:
    for name, weight in quantized.weights.items():
        held = model.module.get_submodule(name).weight.numpy()
        np.testing.assert_array_equal(held, weight.dequantize())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize(
    ("tune", "rate", "steps", "gain"), [("blocks", 8.0, 1, 0.75), ("end-to-end", 24.0, 10, 0.6)]
)
def test_coefficients_return_to_a_planted_optimum(
    tune: str, rate: float, steps: int, gain: float
) -> None:
    model, quantized, teacher, optimum = planted(factor=1.15)
    size = quantized.nbytes
    config = QuantConfig(tune=tune, tune_rate=rate)
    if tune != "blocks":
        config = dataclasses.replace(config, tune_steps=steps)
    batches = make_batches(8, samples=16)
    report = tune_model(model, quantized, teacher, batches, config, silent)
    assert report.after < gain * report.before
    _, held_out = split_batches(batches)
    assert mean_divergence(model.module, held_out, teacher) == report.after
    check_module(model, quantized)
    assert quantized.nbytes == size
    for name, weight in quantized.weights.items():
        np.testing.assert_array_equal(weight.codes, optimum[name].codes)


def test_signs_are_trained_towards_a_planted_optimum() -> None:
    model, quantized, teacher, _ = planted(flipped=0.02)
    start = dict(quantized.weights)
    config = QuantConfig(tune="end-to-end", tune_signs=True, tune_steps=10, tune_rate=6.0)
    report = tune_model(model, quantized, teacher, make_batches(8, samples=16), config, silent)
    assert report.after < 0.7 * report.before
    check_module(model, quantized)
    for name, weight in quantized.weights.items():
        old = start[name]
        assert isinstance(weight, BinaryWeight)
        assert isinstance(old, BinaryWeight)
        assert not np.array_equal(weight.codes, old.codes)
        assert weight.nbytes == old.nbytes


@pytest.mark.parametrize("signs", [False, True])
def test_the_same_seed_tunes_alike(signs: bool) -> None:
    found = []
    for _ in range(2):
        model, quantized, teacher, _ = planted(factor=1.15)
        config = QuantConfig(tune="both", tune_signs=signs, tune_epochs=1, tune_steps=2, seed=3)
        tune_model(model, quantized, teacher, make_batches(6), config, silent)
        found.append(quantized.weights)
    for name, weight in found[0].items():
        np.testing.assert_array_equal(weight.dequantize(), found[1][name].dequantize())


@pytest.mark.parametrize("tune", ["blocks", "end-to-end"])
@pytest.mark.parametrize("signs", [False, True])
def test_what_gets_worse_is_put_back(tune: str, signs: bool) -> None:
    model, quantized, teacher, _ = planted(factor=1.02)
    before = copy.deepcopy(model.module.state_dict())
    config = QuantConfig(tune=tune, tune_signs=signs, tune_rate=1000.0)
    if tune != "blocks":
        config = dataclasses.replace(config, tune_steps=2)
    report = tune_model(model, quantized, teacher, make_batches(4), config, silent)
    assert report.after == report.before
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    check_module(model, quantized)


def test_a_loss_that_is_not_finite_stops_with_the_state_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, quantized, teacher, _ = planted(factor=1.15)
    before = copy.deepcopy(model.module.state_dict())
    monkeypatch.setattr("bivlm_edge.tuning.trainer.learning_rate_factor", lambda *_: float("nan"))
    config = QuantConfig(tune="end-to-end", tune_steps=4)
    with pytest.raises(TuningError, match=r"nan after step 1 of 4\. .*as it was before"):
        tune_model(model, quantized, teacher, make_batches(4), config, silent)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bad_requests_are_refused() -> None:
    model, quantized, teacher, _ = planted()
    config = QuantConfig(tune="end-to-end")
    with pytest.raises(RequestError, match="at least two calibration batches"):
        tune_model(model, quantized, teacher, make_batches(1), config, silent)
    with pytest.raises(RequestError, match="nothing to fine-tune"):
        tune_model(model, QuantizedModel(), teacher, make_batches(2), config, silent)
    with pytest.raises(RequestError, match="--tune 'all' is not known"):
        QuantConfig(tune="all")
    with pytest.raises(RequestError, match=r"--tune does not go with --method rtn.*bivlm-edge"):
        QuantConfig(method="rtn", bits=4, tune="both")
    with pytest.raises(RequestError, match="--tune-signs has no effect with --tune none"):
        QuantConfig(tune_signs=True)
    with pytest.raises(RequestError, match="--tune-epochs has no effect with --tune end-to-end"):
        QuantConfig(tune="end-to-end", tune_epochs=3)
    with pytest.raises(RequestError, match="--tune-steps has no effect with --tune blocks"):
        QuantConfig(tune="blocks", tune_steps=3)
    with pytest.raises(RequestError, match="--tune-samples has no effect with --tune none"):
        QuantConfig(tune_samples=3)
    with pytest.raises(RequestError, match="--tune-rate has no effect with --tune none"):
        QuantConfig(tune_rate=2.0)
    with pytest.raises(RequestError, match="--tune-epochs 0 is below"):
        QuantConfig(tune_epochs=0)
    with pytest.raises(RequestError, match="--tune-steps 0 is below"):
        QuantConfig(tune_steps=0)
    with pytest.raises(RequestError, match="--tune-rate -1 is not a positive"):
        QuantConfig(tune_rate=-1.0)
    with pytest.raises(UnsupportedModelError, match="no output embeddings"):
        mean_divergence(nn.Linear(2, 2), make_batches(1), Teacher(nn.Linear(2, 2)))


def test_model_that_cannot_be_tuned_is_refused_before_it_is_quantized() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.module.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match=r"is judged\. Use --tune none\.$"):
        quantize_and_tune(model, make_batches(2), QuantConfig(tune="blocks"))
    model.streamed = object()  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="Export with --no-stream"):
        quantize_and_tune(model, make_batches(2), QuantConfig(tune="blocks"))
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_tuning_draws_samples_of_its_own_where_it_asks_for_them() -> None:
    def draw(samples: int) -> list[dict[str, Tensor]]:
        return [{"x": torch.zeros(samples)}]

    def drawn(**options: Any) -> list[int | None]:
        config = QuantConfig(calibration_samples=5, **options)
        found = drawn_batches(config, draw)
        return [len(part[0]["x"]) if part else None for part in found]

    assert drawn(tune="blocks", tune_samples=7) == [5, 7]
    assert drawn(tune="blocks") == [5, None]
    assert drawn() == [5, None]
    assert drawn(method="none") == [None, None]


def test_only_predicted_labels_count() -> None:
    model, _, teacher, _ = planted(factor=1.15)
    batch = make_batches(1)[0]
    everywhere = mean_divergence(model.module, [batch], teacher)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 7] = 3
    one = {**batch, "labels": labels}
    hidden = teacher.hidden(one)
    assert hidden.shape == (len(labels), 64)
    torch.testing.assert_close(hidden, teacher.hidden(batch).view(len(labels), TOKENS, -1)[:, 6])
    assert mean_divergence(model.module, [one], teacher) != everywhere


def test_quantize_and_tune_keeps_the_budget() -> None:
    model = tiny_model()
    batches = make_batches(4, samples=4)
    # the weaker start leaves something to tune
    weak = ("propagation", "model-budget")
    config = QuantConfig(bits=2.6, tune="end-to-end", tune_steps=3, without=weak)
    steps: list[tuple[str, int, int]] = []
    quantized, report = quantize_and_tune(
        model, batches, config, lambda *call: steps.append(call), tuning_batches=make_batches(4)
    )
    assert report is not None
    assert report.after < report.before
    assert [entry["steps"] for entry in report.log if "steps" in entry] == [0, 1, 2, 3]
    assert steps[-1] == ("tuning end to end", 2, 3)
    assert quantized.true_bits <= 2.6
    assert all(layer.output_error is None for layer in quantized.reports)
    check_module(model, quantized)
    untuned, nothing = quantize_and_tune(tiny_model(), batches, QuantConfig(bits=2.6, without=weak))
    assert nothing is None
    assert untuned.nbytes == quantized.nbytes
