"""Small checkpoints with random weights, one per supported architecture, saved as on a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>"]
VOCABULARY = 384
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text is one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate([*WORDS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": WORDS[3:]})
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}:"
    )
    return fast


def _pil(kind: str, side: int) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    if kind == "clip":
        size = {"height": side, "width": side}
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def llava_clip_llama() -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION},
        text_config={"model_type": "llama", **_TEXT},
        image_token_index=3,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config), _pil("clip", 32)


def llava_siglip_qwen2() -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION},
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config), _pil("siglip", 32)


def llava_onevision() -> tuple[Any, Any]:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            **_VISION,
        },
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_index=3,
        tie_word_embeddings=True,
    )
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]]
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rotary = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {**_TEXT, "max_position_embeddings": 1024, "rope_parameters": rotary}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        text_config={**text, "tie_word_embeddings": True},
        image_token_id=3,
        video_token_id=6,
        vision_start_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=True,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), Qwen2VLImageProcessorPil()


def _idefics3(config_class: Any, model_class: Any, vision_type: str) -> tuple[Any, Any]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    config = config_class(
        vision_config={"model_type": vision_type, **_VISION},
        text_config={"model_type": "llama", **_TEXT},
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return model_class(config), processor


def idefics3() -> tuple[Any, Any]:
    return _idefics3(
        transformers.Idefics3Config,
        transformers.Idefics3ForConditionalGeneration,
        "idefics3_vision",
    )


def smolvlm() -> tuple[Any, Any]:
    return _idefics3(
        transformers.SmolVLMConfig,
        transformers.SmolVLMForConditionalGeneration,
        "smolvlm_vision",
    )


ARCHITECTURES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava, CLIP and Llama": llava_clip_llama,
    "llava, SigLIP and Qwen2": llava_siglip_qwen2,
    "llava-onevision": llava_onevision,
    "qwen2.5-vl": qwen2_5_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}


def save_checkpoint(name: str, folder: Path) -> Path:
    """Write a checkpoint of one architecture, weights drawn from a fixed seed."""
    torch.manual_seed(0)
    model, image_processor = ARCHITECTURES[name]()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder
