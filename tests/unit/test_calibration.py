"""Block-wise calibration: statistics against plain recomputation, batches, token importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bivlm_edge.calibration import precision
from bivlm_edge.calibration.calls import Call
from bivlm_edge.calibration.capture import FixedWeights, _shared_inputs, walk
from bivlm_edge.calibration.float_stream import FloatStream
from bivlm_edge.calibration.importance import TEMPERATURE, fisher_direction, token_importance
from bivlm_edge.calibration.moments import StatisticsCollector, is_held_out
from bivlm_edge.calibration.vlmq import ModalityWeights, VlmqWeighting
from bivlm_edge.distributed import Team
from bivlm_edge.errors import UnsupportedModelError


class Part(NamedTuple):
    name: str
    blocks: Sequence[tuple[str, nn.Module]]


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured can be computed anew to float32 bounds, whatever the processor."""
    monkeypatch.setattr(precision, "compute_dtype", lambda: torch.float32)


def tiny_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=40,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        image_token_id=3,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def llava_sequences(module: Any) -> list[Part]:
    names = {id(part): name for name, part in module.named_modules()}
    tower = module.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    parts = [
        ("vision", list(layers)),
        ("projector", [module.model.multi_modal_projector]),
        ("decoder", list(module.model.language_model.layers)),
    ]
    return [Part(name, [(names[id(b)], b) for b in blocks]) for name, blocks in parts]


def llava_batches(count: int, length: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, 40, (2, length), generator=generator)
        ids[:, 1:5] = 3
        labels = ids.clone()
        labels[:, :-2] = -100
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
                "labels": labels,
            }
        )
    return batches


def inputs_of(module: nn.Module, layer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What `layer` sees when the whole model runs."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module(**{name: value for name, value in batch.items() if name != "labels"})
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def test_every_layer_gets_the_statistics_of_the_layers_quantized_before_it() -> None:
    module = tiny_llava()
    batches = llava_batches(3)
    layers = dict(module.named_modules())
    groups = []
    for group in walk(module, llava_sequences(module), batches):
        names = list(group.layers)
        groups.append([name.rsplit(".", 1)[-1] for name in names])
        for name in names:
            assert layers[name] is group.layers[name]
        rows = [inputs_of(module, group.layers[names[0]], batch) for batch in batches]
        fit = torch.cat([rows[0], rows[1]])  # the last of three batches is held out
        expected = fit.T @ fit / len(fit)
        scale = float(expected.abs().max())
        # float32 activations and products: relative 2^-24 each, a few hundred terms
        torch.testing.assert_close(group.inputs.fit.hessian, expected, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(
            group.inputs.fit.mean, fit.mean(dim=0), rtol=1e-4, atol=1e-5 * scale**0.5
        )
        assert group.inputs.held_out is not None
        held = rows[2].T @ rows[2] / len(rows[2])
        torch.testing.assert_close(
            group.inputs.held_out.hessian, held, rtol=1e-4, atol=1e-5 * scale
        )
        for layer in group.layers.values():  # as a quantizer would
            layer.weight.data = (layer.weight.data * 8).round() / 8 * 1.5
    encoder = [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]
    decoder = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for group_names in groups:
        group_names.sort()
    flat = [sorted(names) for names in encoder * 2 + [["linear_1"], ["linear_2"]] + decoder * 2]
    assert groups == flat


def test_products_in_bfloat16_leave_statistics_and_the_type_of_hidden_states_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = tiny_llava()
    exact = list(walk(module, llava_sequences(module)[2:], llava_batches(3)))
    monkeypatch.setattr(precision, "compute_dtype", lambda: torch.bfloat16)
    fast = list(walk(module, llava_sequences(module)[2:], llava_batches(3)))
    changed = 0
    for one, other in zip(exact, fast, strict=True):
        wanted, found = one.inputs.fit.hessian, other.inputs.fit.hessian
        changed += not torch.equal(wanted, found)
        # 8 bits of mantissa, a few roundings in a row, and squares: a few times 2^-8
        assert float((found - wanted).norm() / wanted.norm()) < 2.0**-6
    assert changed == len(exact) - 1  # the first layers see what no product has made


def test_token_weights_weigh_the_rows_of_their_layer_only() -> None:
    module = tiny_llava()
    batches = llava_batches(2)
    sequences = llava_sequences(module)[2:]
    name = f"{sequences[0].blocks[0][0]}.self_attn.k_proj"
    generator = torch.Generator().manual_seed(0)
    weights = {name: [torch.rand(18, generator=generator) for _ in batches]}
    group = next(iter(walk(module, sequences, batches, FixedWeights(weights))))
    assert list(group.weighted) == [name]
    rows = inputs_of(module, group.layers[name], batches[0])
    weight = weights[name][0].double()
    expected = (rows.T * weight) @ rows / weight.sum()
    moments = group.weighted[name].fit
    torch.testing.assert_close(moments.hessian, expected, rtol=1e-4, atol=1e-6)
    assert moments.weight == pytest.approx(float(weight.sum()))
    assert group.inputs.fit.weight == 18


def test_weighting_sees_each_block_before_it_changes_on_quantized_inputs() -> None:
    module = tiny_llava()
    batches = llava_batches(2)
    sequences = llava_sequences(module)
    float_weights = {name: layer.clone() for name, layer in module.state_dict().items()}
    blocks = [name for sequence in sequences for name, _ in sequence.blocks]
    seen: list[str] = []

    class Recorder:
        def weigh(
            self, part: str, name: str, block: nn.Module, calls: Sequence[Call]
        ) -> dict[str, list[Tensor]]:
            assert part == next(s.name for s in sequences if (name, block) in s.blocks)
            for local, value in block.state_dict().items():
                assert torch.equal(value, float_weights[f"{name}.{local}"])
            expected = inputs_of(module, block, batches[1])
            hidden = calls[1].hidden
            torch.testing.assert_close(hidden.reshape(expected.shape).double(), expected)
            seen.append(name)
            first = next(n for n, m in block.named_modules() if isinstance(m, nn.Linear))
            rows = [call.hidden[..., 0].numel() for call in calls]
            return {f"{name}.{first}": [torch.full((count,), 2.0) for count in rows]}

    for group in walk(module, sequences, batches, Recorder()):
        for name, moments in group.weighted.items():
            assert name in group.layers
            assert moments.fit.weight == 2 * group.inputs.fit.rows
        for layer in group.layers.values():
            layer.weight.data = layer.weight.data * 1.5
    assert seen == blocks


def test_frozen_walk_measures_the_same_in_one_run_of_each_block() -> None:
    module = tiny_llava()
    sequences, batches = llava_sequences(module), llava_batches(3)
    weights = FixedWeights(token_importance(module, sequences, batches, 0))
    runs: list[nn.Module] = []
    handles = [
        block.register_forward_hook(lambda block, _, __: runs.append(block))
        for _, block in sequences[2].blocks
    ]
    frozen = list(walk(module, sequences[2:], batches, weights, frozen=True))
    for handle in handles:
        handle.remove()
    # one shows the form of its output, one finds the groups
    assert runs.count(sequences[2].blocks[0][1]) == 2 + len(batches)
    for group, one in zip(frozen, walk(module, sequences[2:], batches, weights), strict=True):
        assert list(group.layers) == list(one.layers)
        assert group.plain is None
        for name in group.layers:
            assert torch.equal(group.statistics(name).fit.hessian, one.statistics(name).fit.hessian)
        with pytest.raises(ValueError, match="frozen"):
            _ = group.inputs
    plain = next(iter(walk(module, sequences[2:], batches, frozen=True)))
    assert plain.inputs.held_out is not None


def test_the_walk_leaves_no_hooks_and_no_gradients() -> None:
    module = tiny_llava()
    list(walk(module, llava_sequences(module), llava_batches(2)))
    assert all(not part._forward_pre_hooks for part in module.modules())
    assert all(not parameter.requires_grad for parameter in module.parameters())
    assert torch.is_grad_enabled()


class Toy(nn.Module):
    """Two blocks that return tuples, one layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ToyBlock()
        self.second = ToyBlock()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor
        (hidden,) = self.first(hidden_states=x)
        (hidden,) = self.second(hidden_states=hidden)
        return hidden


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.unused = nn.Linear(64, 64)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (self.a(hidden_states).relu(),)


def test_hidden_states_may_be_a_keyword_and_outputs_tuples() -> None:
    torch.manual_seed(0)
    module = Toy()
    batches = [{"x": torch.randn(5, 64)}]
    blocks = [("first", module.first), ("second", module.second)]
    groups = list(walk(module, [Part("decoder", blocks)], batches))
    assert [list(group.layers) for group in groups] == [["first.a"], ["second.a"]]
    with torch.no_grad():
        rows = module.first.a(batches[0]["x"]).relu().double()
    torch.testing.assert_close(
        groups[1].inputs.fit.hessian, rows.T @ rows / 5, rtol=1e-5, atol=1e-6
    )
    assert groups[1].inputs.held_out is None


def test_block_that_no_input_reaches_is_named() -> None:
    module = tiny_llava()
    batch = llava_batches(1)[0]
    text_only = {"input_ids": batch["input_ids"].clamp_min(4)}
    with pytest.raises(UnsupportedModelError, match="never reach a CLIPEncoderLayer"):
        list(walk(module, llava_sequences(module), [text_only]))


def test_importance_is_the_root_mean_square_gradient_and_finds_the_answers_tokens() -> None:
    module = tiny_llava()
    batches = llava_batches(2)
    sequences = llava_sequences(module)
    weights = token_importance(module, sequences, batches, seed=0)
    last = next(name for name in weights if name.endswith("layers.1.mlp.down_proj"))
    assert set(weights) == {
        f"{name}.{local}"
        for sequence in sequences
        for name, block in sequence.blocks
        for local, part in block.named_modules()
        if isinstance(part, nn.Linear)
    }
    # behind the last block only the positions before the two answer tokens matter: 6 and 7 of 9
    rows = weights[last][0].reshape(2, 9)
    mean = torch.cat(weights[last]).mean()
    others = [position for position in range(9) if position not in (6, 7)]
    assert (rows[:, others] < mean).all()
    assert (rows[:, [6, 7]].sum(dim=1) > rows[:, others].sum(dim=1)).all()
    again = token_importance(module, sequences, batches, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(weights[last], again[last], strict=True))


class Chain(nn.Module):
    """Logits behind two layers; the second passes everything on, thrice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64, bias=False)
        self.second.weight.data = 3 * torch.eye(64)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.second(self.first(x)))


def test_errors_of_different_layers_add_up_to_one_divergence() -> None:
    torch.manual_seed(0)
    module = Chain()
    batches = [{"x": torch.randn(2, 5, 64), "labels": torch.zeros(2, 5, dtype=torch.long)}]
    weights = token_importance(module, [Part("decoder", [("", module)])], batches, seed=0)
    # an error before the second layer is thrice as large behind it: nine times the divergence
    torch.testing.assert_close(weights["first"][0], 9 * weights["second"][0])


def test_fisher_directions_have_the_softmax_covariance() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]]).repeat(200_000, 1)
    drawn = fisher_direction(logits, torch.Generator().manual_seed(0))
    p = (logits[0] / TEMPERATURE).softmax(dim=0)
    expected = p.diag() - torch.outer(p, p)
    found = drawn.T @ drawn / len(drawn)
    # standard error of 200,000 products of unit scale: 0.25 / sqrt(2e5) = 6e-4, five of them
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)


def test_every_tenth_batch_and_the_last_are_held_out() -> None:
    assert [b for b in range(25) if is_held_out(b, 25)] == [4, 14, 24]
    assert [b for b in range(2) if is_held_out(b, 2)] == [1]
    assert not is_held_out(0, 1)


def test_moments_around_a_center_are_those_of_shifted_rows() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1))
    collector = StatisticsCollector(6, 1)
    collector.add(rows[:20], 0, weights[:20])
    collector.add(rows[20:], 0, weights[20:])
    moments = collector.finish().fit
    center = torch.arange(6).double()
    shifted, w = rows.double() - center, weights.double()
    expected = (shifted.T * w) @ shifted / w.sum()
    torch.testing.assert_close(moments.around(center), expected, rtol=1e-5, atol=1e-5)
    assert moments.rows == 50


def test_model_without_logits_has_no_importance() -> None:
    module = Toy()
    blocks = [("first", module.first), ("second", module.second)]
    batches = [{"x": torch.randn(5, 64)}]
    assert token_importance(module, [Part("decoder", blocks)], batches, seed=0) == {}


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def disturb(module: Any) -> None:
    """Change the first decoder block, as a quantizer would."""
    generator = torch.Generator().manual_seed(3)
    for layer in module.model.language_model.layers[0].modules():
        if isinstance(layer, nn.Linear):
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data += 0.1 * layer.weight.std() * noise


class Spy:
    """Remembers what a weighting gives for each block."""

    def __init__(self, weighting: VlmqWeighting) -> None:
        self.weighting = weighting
        self.given: dict[str, Sequence[Tensor]] = {}

    def weigh(
        self, part: str, name: str, block: nn.Module, calls: Sequence[Call]
    ) -> Mapping[str, Sequence[Tensor]]:
        weights = self.weighting.weigh(part, name, block, calls)
        self.given.update(weights)
        return weights


def vlmq_weights(
    module: Any, batches: Sequence[Mapping[str, Tensor]], *, disturbed: bool
) -> dict[str, Sequence[Tensor]]:
    sequences = llava_sequences(module)
    spy = Spy(VlmqWeighting(module, sequences, batches, None, {}))
    for group in walk(module, sequences, batches, spy):
        first = "language_model.layers.0.self_attn.q_proj"
        if disturbed and any(name.endswith(first) for name in group.layers):
            disturb(module)
    return spy.given


def attended(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Hidden states behind the attention of the second decoder block, gradients kept."""
    found: list[Tensor] = []
    block = module.model.language_model.layers[1]
    handle = block.post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    module(**{name: value for name, value in batch.items() if name != "labels"})
    handle.remove()
    return found[0]


def test_weights_are_squared_mean_gradients_of_the_attention_blocks_error() -> None:
    batches = llava_batches(2)
    module = tiny_llava()
    weights = vlmq_weights(module, batches, disturbed=True)
    names = [name.rsplit(".", 1)[1] for name in weights]
    assert names == [*ATTENTION] * 2
    assert all("language_model" in name for name in weights)
    with torch.no_grad():
        wanted = [attended(tiny_llava(), batch) for batch in batches]
    block = module.model.language_model.layers[1]
    for name in ATTENTION:
        layer = getattr(block.self_attn, name)
        for number, batch in enumerate(batches):
            outputs: list[Tensor] = []

            def hook(_: nn.Module, __: Any, output: Tensor, kept: list[Tensor] = outputs) -> Tensor:
                kept.append(output.detach().requires_grad_())
                return kept[0]

            handle = layer.register_forward_hook(hook)
            loss = ((wanted[number] - attended(module, batch)) ** 2).sum()
            handle.remove()
            [gradient] = torch.autograd.grad(loss, outputs)
            factors = gradient.abs().mean(dim=2)  # samples, tokens
            relative = (factors / factors.mean(dim=1, keepdim=True)).clamp_min(0.05)
            full = next(n for n in weights if n.endswith(f"layers.1.self_attn.{name}"))
            found = weights[full][number]
            # the same gradient by another order of float32 sums
            torch.testing.assert_close(found, (relative**2).reshape(-1), rtol=1e-3, atol=1e-4)
            assert float(found.std()) > 0.1


def test_rows_weigh_alike_where_nothing_was_quantized_before() -> None:
    weights = vlmq_weights(tiny_llava(), llava_batches(2), disturbed=False)
    assert len(weights) == 8
    for rows in weights.values():
        assert all(torch.equal(row, torch.ones_like(row)) for row in rows)


def test_weighing_leaves_no_hooks_and_no_gradients() -> None:
    module = tiny_llava()

    def hooks() -> int:
        return sum(len(part._forward_hooks) for part in module.modules())

    module(**{name: value for name, value in llava_batches(1)[0].items() if name != "labels"})
    before = hooks()  # transformers' own, put there at the first call
    vlmq_weights(module, llava_batches(2), disturbed=True)
    assert hooks() == before
    assert all(parameter.grad is None for parameter in module.parameters())


def test_block_without_attention_is_refused_by_name() -> None:
    module = Toy()
    sequences = [Part("decoder", [("first", module.first)])]
    batches = [{"x": torch.randn(5, 64)}]
    weighting = VlmqWeighting(module, sequences, batches, None, {})
    with pytest.raises(UnsupportedModelError, match=r"'first' \(ToyBlock\) .* has a, unused\)"):
        list(walk(module, sequences, batches, weighting))


def test_mean_weights_of_text_and_image_tokens_are_told() -> None:
    module = tiny_llava()
    batches = llava_batches(1)
    vision = [(batches[0]["input_ids"] == 3).reshape(-1)]
    told: dict[str, ModalityWeights] = {}
    spy = Spy(VlmqWeighting(module, llava_sequences(module), batches, vision, told))
    for group in walk(module, llava_sequences(module), batches, spy):
        if any(name.endswith("language_model.layers.0.self_attn.q_proj") for name in group.layers):
            disturb(module)
    assert set(told) == set(spy.given)
    for name, [rows] in spy.given.items():
        text, image = float(rows[~vision[0]].mean()), float(rows[vision[0]].mean())
        assert told[name] == pytest.approx((text, image))
        assert (text != image) == ("layers.1" in name)


def test_reference_rows_are_those_of_the_float_model() -> None:
    module, original = tiny_llava(), tiny_llava()
    originals = dict(original.named_modules())
    batches = llava_batches(2)
    sequences = llava_sequences(module)
    stream = FloatStream(module, sequences, batches)
    for group in walk(module, sequences, batches, reference=stream):
        name, layer = next(iter(group.layers.items()))
        f = inputs_of(original, originals[name], batches[0])
        x = inputs_of(module, layer, batches[0])
        moments = group.inputs.fit
        scale = float(x.norm() * f.norm()) / len(x)
        # float32 products of float32 activations, as in the test of the plain statistics
        torch.testing.assert_close(moments.cross, f.T @ x / len(x), rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(
            moments.reference_mean, f.mean(dim=0), rtol=1e-4, atol=1e-5 * scale**0.5
        )
        for changed in group.layers.values():
            changed.weight.data = changed.weight.data * 1.1


def test_processes_agree_on_layers_that_only_one_of_them_reaches() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden_states: Tensor) -> Any:
            hidden = self.a(hidden_states)
            if len(hidden) > 1:
                hidden = self.b(hidden)
            return self.c(hidden)

    class Pair(Team):
        def concatenate(self, rows: Tensor) -> Tensor:
            other = b'["a"]\n["b"]\n["c"]\n'
            return torch.cat([rows, torch.tensor(list(other), dtype=torch.uint8)])

    block, one, two = Block(), Call((torch.zeros(1, 8),), {}), Call((torch.zeros(2, 8),), {})
    names = [
        [list(group) for group in _shared_inputs(block, [one], team)]
        for team in (Team(), Pair(0, 2))
    ]
    assert names == [[["a"], ["c"]], [["a"], ["b"], ["c"]]]
    assert [list(group) for group in _shared_inputs(block, [one, two], Team())] == names[1]
