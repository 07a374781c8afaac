"""Causal language models as the quantizer sees them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bivlm_edge.config import QuantConfig
from bivlm_edge.errors import CheckpointError, RequestError, UnsupportedModelError
from bivlm_edge.models.language_model import (
    SMOLLM2,
    LanguageModel,
    load_language_model,
    load_model,
)
from bivlm_edge.quant.quantizer import quantize_model

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def save(folder: Path, module: Any) -> Path:
    torch.manual_seed(0)
    module.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_folder_becomes_a_model_whose_blocks_can_be_quantized(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES, tie_word_embeddings=True)
    folder = save(tmp_path, getattr(transformers, f"{family}ForCausalLM")(config))
    model = load_model(folder)
    assert isinstance(model, LanguageModel)
    assert model.context_length == 64
    [sequence] = model.block_sequences()
    assert [name for name, _ in sequence.blocks] == ["model.layers.0", "model.layers.1"]
    ids = torch.arange(32)[None]
    before = model.module(input_ids=ids).logits
    result = quantize_model(model, [{"input_ids": ids}], QuantConfig(method="rtn", bits=8))
    assert set(result.skipped) == {"lm_head"}
    assert len(result.weights) == 14
    after = model.module(input_ids=ids).logits
    assert 0 < float((after - before).abs().max()) < 0.1


def test_conversation_without_chat_format_is_written_line_by_line(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES)
    model = load_language_model(save(tmp_path, transformers.LlamaForCausalLM(config)))
    assert model.render(["hello?", "hi"]) == "hello?\nhi\n"


def test_conversation_alternates_roles(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES)
    model = load_language_model(save(tmp_path, transformers.LlamaForCausalLM(config)))
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    assert model.render(["a", "b", "c"]) == "<user>a<assistant>b<user>c"


def test_experts_outside_linear_layers_are_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    folder = save(tmp_path, transformers.MixtralForCausalLM(config))
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.layers\.0\.mlp\.\S+ of .* outside nn\.Linear, which would stay float",
    ):
        load_model(folder)


def test_encoder_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="model type 'vit', which is neither"):
        load_model(tmp_path)


def test_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load the configuration"):
        load_model(tmp_path)


def test_smollm2_without_gguf_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "gguf" else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(RequestError, match=r"needs gguf .*pip install 'bivlm-edge\[llm\]'"):
        load_model(SMOLLM2)
