"""Whole models: every layer is accounted for, the module computes what the packed weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bivlm_edge.calibration.calls import Call
from bivlm_edge.calibration.vlmq import VlmqWeighting
from bivlm_edge.config import STAGES, QuantConfig
from bivlm_edge.errors import RequestError
from bivlm_edge.quant import methods
from bivlm_edge.quant.packed import BinaryWeight
from bivlm_edge.quant.quantizer import QuantizedModel, quantize_model
from bivlm_edge.quant.weights import DenseWeight, GroupWeight


class Part(NamedTuple):
    name: str
    blocks: Sequence[tuple[str, nn.Module]]


@dataclass
class TinyLlava:
    """Stands in for models.VisionLanguageModel around a small random LLaVA."""

    module: Any

    def block_sequences(self) -> list[Part]:
        names = {id(part): name for name, part in self.module.named_modules()}
        tower = self.module.model.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        parts = [
            ("vision", list(layers[:1])),
            ("projector", [self.module.model.multi_modal_projector]),
            ("decoder", list(self.module.model.language_model.layers)),
        ]
        return [Part(name, [(names[id(b)], b) for b in blocks]) for name, blocks in parts]


def tiny_llava() -> TinyLlava:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=40,
            hidden_size=96,
            intermediate_size=130,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        image_token_id=3,
        image_seq_length=4,
        vision_feature_layer=-2,
    )
    module = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for layer in module.modules():  # biases start at zero, which would hide a wrong sign
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.bias.normal_()
    return TinyLlava(module)


def make_inputs(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, 40, (4, 12), generator=generator)
        ids[:, 1:5] = 3
        pixels = torch.randn(4, 3, 16, 16, generator=generator) + 0.5
        batches.append({"input_ids": ids, "pixel_values": pixels})
    return batches


def layers_of(vlm: TinyLlava) -> dict[str, nn.Linear]:
    return {n: m for n, m in vlm.module.named_modules() if isinstance(m, nn.Linear)}


def check_account(vlm: TinyLlava, result: QuantizedModel) -> None:
    layers = layers_of(vlm)
    assert set(result.weights) | set(result.skipped) == set(layers)
    assert not set(result.weights) & set(result.skipped)
    assert [report.name for report in result.reports] == list(result.weights)
    for name, weight in result.weights.items():
        np.testing.assert_array_equal(layers[name].weight.detach().numpy(), weight.dequantize())


@pytest.mark.parametrize("method", methods.names())
def test_the_module_holds_what_the_weights_decode_to(method: str) -> None:
    vlm = tiny_llava()
    result = quantize_model(vlm, make_inputs(), QuantConfig(method=method, bits=2.0 + 2.0))
    check_account(vlm, result)
    kinds = {type(weight) for weight in result.weights.values()}
    assert len(kinds) == 1
    assert kinds <= {BinaryWeight, GroupWeight, DenseWeight}
    assert result.skipped["lm_head"] == "vocabulary: exported apart"
    unused = [name for name in result.skipped if ".layers.1." in name and "vision" in name]
    assert len(unused) == 6
    assert all("outside the blocks" in result.skipped[name] for name in unused)
    for report in result.reports:
        assert report.error_is_held_out
        assert report.method == method
        assert report.claimed_bits <= report.true_bits
        assert 0 <= report.output_error < 1.5


@pytest.mark.parametrize("bits", [2.1, 3.3])
def test_budget_is_kept_over_all_layers_and_nearly_spent(bits: float) -> None:
    vlm = tiny_llava()
    result = quantize_model(vlm, make_inputs(), QuantConfig(bits=bits))
    numel = sum(weight.n * weight.k for weight in result.weights.values())
    assert 8 * result.nbytes <= bits * numel
    assert result.true_bits == pytest.approx(8 * result.nbytes / numel)
    assert result.true_bits > 0.9 * bits
    repeated = {name for names in result.stacked for name in names[1:]}
    assert result.nbytes == sum(
        tensor.nbytes
        for name, weight in result.weights.items()
        if isinstance(weight, BinaryWeight)
        for tensor in (
            weight.codes,
            weight.coefficients,
            *((weight.signs, weight.order) if name not in repeated else ()),
        )
        if tensor is not None
    )


def test_layers_with_the_same_input_share_planes_and_transform() -> None:
    result = quantize_model(tiny_llava(), make_inputs(), QuantConfig(bits=2.3))
    names = [name for name in result.weights if "language_model.layers.0" in name]
    attention, mlp = names[:3], names[4:6]
    assert [name.rsplit(".", 1)[1] for name in attention + mlp] == [
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    ]  # fmt: skip
    for group in (attention, mlp):
        weights = [result.weights[name] for name in group]
        plans = set()
        for weight in weights:
            assert isinstance(weight, BinaryWeight)
            signs = None if weight.signs is None else weight.signs.tobytes()
            order = None if weight.order is None else weight.order.tobytes()
            plans.add((weight.plane_columns, weight.hadamard_block, signs, order))
        assert len(plans) == 1
    assert tuple(attention) in result.stacked
    # 130 rows of gate_proj fill no whole panels, so up_proj cannot stand behind them
    assert not any(name in names for names in result.stacked for name in mlp)


def test_budget_below_one_plane_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(RequestError, match=r"--bits 1.2 .* Choose at least 1\.\d") as caught:
        quantize_model(tiny_llava(), make_inputs(), QuantConfig(bits=1.2))
    least = float(str(caught.value).split("at least ")[1].rstrip("."))
    result = quantize_model(tiny_llava(), make_inputs(), QuantConfig(bits=least))
    assert result.true_bits <= least


def test_bias_takes_up_the_mean_error() -> None:
    vlm = tiny_llava()
    before = {name: layer.weight.clone() for name, layer in layers_of(vlm).items()}
    biases = {
        name: layer.bias.clone()
        for name, layer in layers_of(vlm).items()
        if "bias" in layer.state_dict()
    }
    batches = make_inputs()
    result = quantize_model(vlm, batches, QuantConfig(bits=3.0))
    name = next(name for name in result.weights if name.endswith("layers.0.mlp.fc1"))
    layer = layers_of(vlm)[name]
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches[:-1]:  # the last is held out
        vlm.module(**batch)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    wanted = rows @ before[name].T + biases[name]
    found = rows @ layer.weight.T + layer.bias
    difference = (found - wanted).mean(dim=0)
    uncorrected = (rows @ (layer.weight - before[name]).T).mean(dim=0)
    assert difference.norm() < 0.5 * uncorrected.norm()  # token weights shift the mean a little


def test_better_methods_and_more_bits_leave_less_error() -> None:
    def mean_error(method: str, bits: float) -> float:
        config = QuantConfig(method=method, bits=bits)
        reports = quantize_model(tiny_llava(), make_inputs(), config).reports
        return float(np.mean([report.output_error for report in reports]))

    assert mean_error("gptq", 2) < mean_error("rtn", 2)
    assert mean_error("bivlm-edge", 4.0) < mean_error("bivlm-edge", 2.2)


def test_same_seed_same_bytes() -> None:
    first, second = (
        quantize_model(tiny_llava(), make_inputs(), QuantConfig(bits=2.5, seed=7)) for _ in range(2)
    )
    for name, weight in first.weights.items():
        other = second.weights[name]
        assert isinstance(weight, BinaryWeight)
        assert isinstance(other, BinaryWeight)
        assert weight.codes.tobytes() == other.codes.tobytes()
        assert weight.coefficients.tobytes() == other.coefficients.tobytes()


def test_method_none_changes_nothing() -> None:
    vlm = tiny_llava()
    before = {name: layer.weight.clone() for name, layer in layers_of(vlm).items()}
    result = quantize_model(vlm, [], QuantConfig(method="none"))
    assert not result.weights
    assert set(result.skipped) == set(before)
    assert result.true_bits == 0
    assert all(torch.equal(layer.weight, before[n]) for n, layer in layers_of(vlm).items())


def test_no_batches_are_refused() -> None:
    with pytest.raises(RequestError, match="no calibration batches"):
        quantize_model(tiny_llava(), [], QuantConfig())


def test_progress_names_each_layer_once() -> None:
    calls: list[tuple[str, int, int]] = []
    config = QuantConfig(method="rtn", bits=4)
    result = quantize_model(tiny_llava(), make_inputs(1), config, lambda *call: calls.append(call))
    assert [name for name, _, _ in calls] == list(result.weights)
    assert [done for _, done, _ in calls] == list(range(len(calls)))
    assert {total for _, _, total in calls} == {len(calls)}
    assert not any(report.error_is_held_out for report in result.reports)


class Stack(nn.Module):
    """Plain layers without logits: a narrow one, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 8, bias=False))
        self.spare = nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


@dataclass
class StackModel:
    module: Stack

    def block_sequences(self) -> list[Part]:
        return [Part("decoder", [("body", self.module.body)])]


def test_plain_modules_are_quantized_and_small_layers_stay() -> None:
    torch.manual_seed(0)
    vlm = StackModel(Stack().eval().requires_grad_(False))
    batches = [{"x": torch.randn(64, 128)} for _ in range(3)]
    result = quantize_model(vlm, batches, QuantConfig(bits=2.4))
    assert list(result.weights) == ["body.0"]
    assert result.skipped["body.2"].startswith("too small (8 x 96)")
    assert "outside" in result.skipped["spare"]
    assert result.true_bits <= 2.4


def packed_bytes(result: QuantizedModel) -> dict[str, tuple[bytes, bytes]]:
    found = {}
    for name, weight in result.weights.items():
        assert isinstance(weight, GroupWeight)
        found[name] = (weight.codes.tobytes(), weight.scale.tobytes())
    return found


def quantize_with(monkeypatch: pytest.MonkeyPatch, factor: float | None) -> QuantizedModel:
    """`gptq` with `vlmq` whose weights are all `factor`; None: plain `gptq`."""
    if factor is None:
        return quantize_model(tiny_llava(), make_inputs(), QuantConfig(method="gptq"))

    class Constant(VlmqWeighting):
        def weigh(
            self, part: str, name: str, block: nn.Module, calls: Sequence[Call]
        ) -> Mapping[str, Sequence[Tensor]]:
            weights = super().weigh(part, name, block, calls)
            return {key: [row * 0 + factor for row in rows] for key, rows in weights.items()}

    config = QuantConfig(method="gptq", importance="vlmq")
    with monkeypatch.context() as patch:
        patch.setattr("bivlm_edge.quant.quantizer.VlmqWeighting", Constant)
        return quantize_model(tiny_llava(), make_inputs(), config)


def test_equal_factors_make_vlmq_equal_gptq_and_their_scale_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = packed_bytes(quantize_with(monkeypatch, None))
    assert packed_bytes(quantize_with(monkeypatch, 1.0)) == plain
    assert packed_bytes(quantize_with(monkeypatch, 64.0)) == plain
    real = quantize_model(
        tiny_llava(), make_inputs(), QuantConfig(method="gptq", importance="vlmq")
    )
    found = packed_bytes(real)
    changed = {name for name in plain if found[name] != plain[name]}
    assert any(name.endswith("language_model.layers.0.self_attn.q_proj") for name in changed)
    assert not any("vision" in name or "projector" in name for name in changed)


def test_text_and_image_tokens_are_accounted_for() -> None:
    result = quantize_model(
        tiny_llava(), make_inputs(), QuantConfig(method="gptq", importance="vlmq")
    )
    names = {name.rsplit(".", 1)[1] for name in result.modalities}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for weights in result.modalities.values():
        assert weights.text is not None
        assert weights.vision is not None
        assert weights.text > 0
        assert weights.vision > 0
    q = next(value for name, value in result.modalities.items() if name.endswith("q_proj"))
    assert q.text != q.vision


def test_importance_loss_weighs_the_hessian_of_a_baseline() -> None:
    plain = quantize_model(tiny_llava(), make_inputs(), QuantConfig(method="gptq"))
    config = QuantConfig(method="gptq", importance="loss")
    weighted = quantize_model(tiny_llava(), make_inputs(), config)
    assert packed_bytes(weighted) != packed_bytes(plain)
    assert not weighted.modalities


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "hessian"}, "Accepted: none, vlmq, loss"),
        ({"method": "rtn", "importance": "vlmq"}, "--method rtn does not use"),
        ({"importance": "vlmq", "without": {"importance"}}, "exclude each other"),
        ({"without": {"descnt"}}, "--without descnt .* Stages: importance, hadamard"),
        ({"method": "gptq", "without": {"refit"}}, "--without refit .* --method gptq. It has none"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        QuantConfig(**options)


def test_methods_have_their_own_importance() -> None:
    assert QuantConfig().token_weights == "loss"
    assert QuantConfig(without={"importance"}).token_weights == "none"
    assert QuantConfig(importance="vlmq").token_weights == "vlmq"
    assert QuantConfig(method="gptq").token_weights == "none"
    assert QuantConfig(method="none").token_weights == "none"


@cache
def stages_off(*without: str, bits: float = 2.3) -> tuple[QuantizedModel, TinyLlava]:
    vlm = tiny_llava()
    result = quantize_model(vlm, make_inputs(), QuantConfig(bits=bits, without=set(without)))
    numel = sum(weight.n * weight.k for weight in result.weights.values())
    assert 8 * result.nbytes <= bits * numel
    check_account(vlm, result)
    return result, vlm


def binary(result: QuantizedModel) -> list[BinaryWeight]:
    return [weight for weight in result.weights.values() if isinstance(weight, BinaryWeight)]


def test_without_hadamard_no_weight_is_rotated() -> None:
    assert any(weight.hadamard_block for weight in binary(stages_off()[0]))
    assert not any(weight.hadamard_block for weight in binary(stages_off("hadamard")[0]))


def test_without_model_budget_every_group_keeps_the_bits_by_itself() -> None:
    bits = 2.6
    result, _ = stages_off("model-budget", bits=bits)
    stacked = [set(names) for names in result.stacked]
    for name, weight in result.weights.items():
        assert any(name in names for names in stacked) or weight.true_bits <= bits
    for names in stacked:
        assert sum(result.weights[n].nbytes for n in names) * 8 <= bits * sum(
            result.weights[n].n * result.weights[n].k for n in names
        ) + 8 * sum(weight.transform_bytes for weight in binary(result))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_changes_the_result(stage: str) -> None:
    reference = {name: w.dequantize() for name, w in stages_off()[0].weights.items()}
    changed = {name: w.dequantize() for name, w in stages_off(stage)[0].weights.items()}
    assert any(not np.array_equal(reference[name], changed[name]) for name in reference)


def test_without_bias_correction_biases_stay() -> None:
    before = layers_of(tiny_llava())
    for without, stays in (((), False), (("bias-correction",), True)):
        result, vlm = stages_off(*without)
        after = layers_of(vlm)
        same = [
            torch.equal(after[name].bias, before[name].bias)
            for name in result.weights
            if before[name].bias is not None
        ]
        assert all(same) == stays


def test_stages_are_switched_off_together() -> None:
    stages_off(*STAGES)
    stages_off("hadamard", "model-budget", "descent")
    stages_off("prefix", "refit", "importance")
