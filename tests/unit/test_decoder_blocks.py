"""Causal language models of many architectures, run block by block as they run by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from bivlm_edge.calibration import precision
from bivlm_edge.calibration.calls import Call, advance, capture_all
from bivlm_edge.compare.job import Job, execute
from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import UnsupportedModelError
from bivlm_edge.models.decoder_blocks import find_blocks, make_linear
from bivlm_edge.models.language_model import LanguageModel, load_language_model
from bivlm_edge.models.streaming import StreamedBlocks
from bivlm_edge.quant.quantizer import QuantizedModel, quantize_model
from bivlm_edge.quant.work_folder import pack_weight

WORDS, WIDTH, LAYERS, HEADS, LENGTH = 32, 64, 2, 2, 24
KINDS = ["sliding_attention", "full_attention"]
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


class Architecture(NamedTuple):
    """A configuration, and what it becomes: names of the blocks, and linear layers in each."""

    config: Any
    blocks: str
    layers: int


def gpt2(**options: Any) -> Any:
    return transformers.GPT2Config(
        vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=512, **options
    )


ARCHITECTURES = {
    "gpt2": Architecture(gpt2(), "transformer.h", 4),
    "gemma2": Architecture(  # two masks, blocks of its own kind of attention
        transformers.Gemma2Config(**SIZES, sliding_window=8, layer_types=KINDS), "model.layers", 7
    ),
    "gemma3": Architecture(  # positions of their own as well
        transformers.Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=KINDS),
        "model.layers",
        7,
    ),
    "qwen2": Architecture(
        transformers.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "model.layers",
        7,
    ),
    "opt": Architecture(
        transformers.OPTConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=512,
        ),
        "model.decoder.layers",
        6,
    ),
    "gpt_neox": Architecture(transformers.GPTNeoXConfig(**SIZES), "gpt_neox.layers", 4),
    "falcon": Architecture(  # its blocks return tuples
        transformers.FalconConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=512,
        ),
        "transformer.h",
        4,
    ),
}


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block run by itself computes what it does inside its model, whatever the processor."""
    monkeypatch.setattr(precision, "compute_dtype", lambda: torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with random weights."""
    found = {}
    for name, architecture in ARCHITECTURES.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        module = transformers.AutoModelForCausalLM.from_config(architecture.config)
        for parameter in module.parameters():  # biases too
            nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
        module.save_pretrained(found[name])
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
        tokenizer.save_pretrained(found[name])
    return found


def make_batches(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, WORDS, (2, LENGTH), generator=generator)}
        for _ in range(count)
    ]


def inputs_of_blocks(model: LanguageModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each block takes when the model runs by itself, and what the last one returns."""
    seen: list[Tensor] = []
    [sequence] = model.block_sequences()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def behind(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [b.register_forward_pre_hook(hook, with_kwargs=True) for _, b in sequence.blocks]
    handles.append(sequence.blocks[-1][1].register_forward_hook(behind))
    with torch.no_grad():
        model.module(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_every_model_computes_what_it_computes_by_itself(
    name: str, folders: dict[str, Path]
) -> None:
    model = load_language_model(folders[name])
    [sequence] = model.block_sequences()
    blocks = ARCHITECTURES[name].blocks
    assert [found for found, _ in sequence.blocks] == [f"{blocks}.{i}" for i in range(LAYERS)]
    batches = make_batches()
    expected = [inputs_of_blocks(model, batch) for batch in batches]
    before = dict(model.module.named_modules())
    calls = capture_all(model.module, sequence.blocks, batches)
    after = dict(model.module.named_modules())
    assert list(after) == list(before)
    assert all(after[part] is before[part] for part in before)
    for number, (_, block) in enumerate(sequence.blocks):
        assert all(
            torch.equal(call.hidden, seen[number])
            for call, seen in zip(calls, expected, strict=True)
        )
        advance(block, calls)
    assert all(torch.equal(c.hidden, e[-1]) for c, e in zip(calls, expected, strict=True))


@pytest.mark.parametrize("method", ["bivlm-edge", "gptq"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_of_the_blocks_is_quantized(
    name: str, method: str, folders: dict[str, Path]
) -> None:
    model = load_language_model(folders[name])
    batch = make_batches(1)[0]
    before = model.module(**batch).logits
    config = QuantConfig(method=method, bits=2.0)
    result = quantize_model(model, make_batches(3), config)
    assert len(result.weights) == LAYERS * ARCHITECTURES[name].layers
    assert all(layer.startswith(ARCHITECTURES[name].blocks) for layer in result.weights)
    assert set(result.skipped.values()) == {"vocabulary: exported apart"}
    after = model.module(**batch).logits
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)
    assert method == "gptq" or result.true_bits <= 2.0


@pytest.mark.parametrize("importance", ["vlmq", "loss"])
def test_token_weights_work_where_blocks_have_masks_of_their_own(
    importance: str, folders: dict[str, Path]
) -> None:
    model = load_language_model(folders["gemma3"])
    config = QuantConfig(bits=2.0, importance=importance)
    result = quantize_model(model, make_batches(3), config)
    assert len(result.weights) == LAYERS * 7


def test_conv1d_becomes_the_linear_layer_that_computes_the_same(folders: dict[str, Path]) -> None:
    own = transformers.AutoModelForCausalLM.from_pretrained(folders["gpt2"]).eval()
    batch = make_batches(1)[0]
    with torch.no_grad():
        expected = own(**batch).logits
        names = make_linear(own)
        # the same products, added up in another order
        torch.testing.assert_close(own(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(names) == LAYERS * 4
    assert {type(own.get_submodule(name)) for name in names} == {nn.Linear}
    assert own.transformer.h[0].mlp.c_fc.weight.shape == (4 * WIDTH, WIDTH)


def test_arguments_that_blocks_share_are_held_once(folders: dict[str, Path]) -> None:
    model = load_language_model(folders["gemma2"])
    [sequence] = model.block_sequences()
    [call] = capture_all(model.module, sequence.blocks, make_batches(1))
    [later] = call.later
    assert later.kwargs["position_ids"] is call.kwargs["position_ids"]
    assert later.kwargs["attention_mask"] is not call.kwargs["attention_mask"]
    with pytest.raises(UnsupportedModelError):  # they would be held for nothing
        _ = later.hidden


def contents(result: QuantizedModel) -> dict[str, Any]:
    found: dict[str, Any] = {"reports": result.reports, "skipped": result.skipped}
    for name, weight in result.weights.items():
        values, arrays = pack_weight(name, weight)
        found |= {key: array.tobytes() for key, array in arrays.items()} | {name: values}
    return found


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_streamed_model_is_quantized_to_the_same_bits(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = load_language_model(folders[name], stream=False)
    disk = load_language_model(folders[name], stream=True)
    assert disk.streamed is not None
    batches = make_batches(3)
    read: list[str] = []
    load = StreamedBlocks._load

    def spy(self: StreamedBlocks, block: str, *, weights: bool = True) -> None:
        read.append(block)
        load(self, block, weights=weights)

    with monkeypatch.context() as patched:
        patched.setattr(StreamedBlocks, "_load", spy)
        capture_all(disk.module, disk.block_sequences()[0].blocks, batches)
    assert read == [f"{ARCHITECTURES[name].blocks}.0"]
    config = QuantConfig(bits=2.0)
    expected = quantize_model(memory, batches, config)
    assert contents(quantize_model(disk, batches, config)) == contents(expected)
    with torch.no_grad():
        logits = [model.module(**batches[0]).logits for model in (memory, disk)]
    assert torch.equal(*logits)


def test_comparison_runs_from_loading_to_perplexity(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(2)
    for name in ("calibration.txt", "test.txt"):
        ids = torch.randint(0, WORDS, (4 * 512,), generator=generator).tolist()
        (tmp_path / name).write_text(" ".join(f"w{i}" for i in ids))
    job = Job(
        model=str(folders["gpt2"]),
        data=str(tmp_path / "test.txt"),
        limit=1,
        calibration=str(tmp_path / "calibration.txt"),
        config={"method": "gptq", "bits": 2.0, "calibration_samples": 4},
        threads=1,
    )
    row = execute(job, lambda *_: None)
    assert row["windows"] == [1, 512]
    assert row["is_finite"]
    assert 2.0 < row["true_bits"] < 4.0


class Between(nn.Module):
    """Blocks between which something happens to the hidden states."""

    def __init__(self, happens: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Sum(happens == "passed on") for _ in range(3)])
        self.happens = happens

    def forward(self, x: Tensor) -> Tensor:
        extra: Tensor | None = None
        for number, layer in enumerate(self.layers):
            if self.happens == "skipped" and number == 1:
                continue
            output = layer(x, extra)
            x, extra = output if isinstance(output, tuple) else (output, None)
            if self.happens == "changed":
                x = x + 1
        return x


class Sum(nn.Module):
    def __init__(self, is_shared: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.is_shared = is_shared

    def forward(self, x: Tensor, extra: Tensor | None) -> Any:
        found = self.linear(x if extra is None else x + extra)
        return (found, 2 * x) if self.is_shared else found


@pytest.mark.parametrize(
    ("happens", "message"),
    [
        ("changed", r"changes the hidden states between the block before and 'layers\.1' \(Sum\)"),
        ("passed on", r"'layers\.1' \(Sum\) takes more than hidden states from the block before"),
        ("skipped", r"does not run 'layers\.1' \(Sum\) before the blocks behind it"),
    ],
)
def test_blocks_that_are_no_chain_are_refused(happens: str, message: str) -> None:
    module = Between(happens)
    blocks = [(f"layers.{i}", block) for i, block in enumerate(module.layers)]
    with pytest.raises(UnsupportedModelError, match=message):
        capture_all(module, blocks, [{"x": torch.ones(2, 4)}])
    assert [block for _, block in blocks] == list(module.layers)


def test_going_on_behind_the_last_block_keeps_its_arguments() -> None:
    call = Call((torch.zeros(2), 7), {"flag": True})
    call.go_on(torch.ones(2))
    assert call.args[1:] == (7,)
    assert call.kwargs == {"flag": True}
    assert torch.equal(call.hidden, torch.ones(2))


def with_lists(**lists: nn.ModuleList) -> Any:
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    del module.model.layers
    for name, blocks in lists.items():
        setattr(module.model, name, blocks)
    return module


def test_decoder_without_a_list_of_its_length_is_refused() -> None:
    norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(LAYERS)])
    one = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(UnsupportedModelError, match=r"decoder of 'x' .* no list of 2 blocks"):
        find_blocks("x", with_lists(norms=norms, one=one))


def test_list_inside_a_block_is_not_taken_for_the_blocks_and_a_second_one_is_refused() -> None:
    pairs = [nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]) for _ in range(2 * LAYERS)]
    first, second = nn.ModuleList(pairs[:LAYERS]), nn.ModuleList(pairs[LAYERS:])
    assert find_blocks("x", with_lists(first=first)) == ("model.first", first)
    with pytest.raises(UnsupportedModelError, match=r"of 2 blocks .*: model\.first, model\.second"):
        find_blocks("x", with_lists(first=first, second=second))
