"""Published architectures by the numbers of their config.json, with tokenizers of made-up words.

The numbers of parameters that follow from them are the published ones (256, 507, 894, 3,755 and
7,063 M).
Special tokens have their real ids. Everything else in a vocabulary is the 256 bytes and words that
no text holds, so that a text is one token per byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@dataclass(frozen=True, slots=True)
class Architecture:
    """What it takes to make a model that was never trained.

    Attributes:
        module: Makes the `transformers` model from its configuration.
        image_processor: Makes its image processor.
        vocabulary: Tokens.
        special_tokens: Text -> id.
        bos: Text of the begin token; None if there is none.
        eos: Text of the token that ends an answer.
        pad: Text of the padding token.
        chat_template: Jinja text.
    """

    module: Callable[[], Any]
    image_processor: Callable[[], Any]
    vocabulary: int
    special_tokens: dict[str, int]
    bos: str | None
    eos: str
    pad: str
    chat_template: str

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """Return a byte-level tokenizer of the full size without merges."""
        taken = set(self.special_tokens.values())
        free = (number for number in range(self.vocabulary) if number not in taken)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = {symbol: next(free) for symbol in alphabet}
        words |= {f"\u0120w{number}": number for number in free}
        tokenizer = Tokenizer(models.BPE(words | self.special_tokens, [], unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=self.bos,
            eos_token=self.eos,
            pad_token=self.pad,
        )
        fast.add_special_tokens({"additional_special_tokens": list(self.special_tokens)})
        return fast


_SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _smolvlm(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> Architecture:
    """SmolVLM-Instruct: SmolLM2 with SigLIP base/16 at 512 pixels, 64 tokens per tile, untied head.

    Pictures are one tile, as bivlm-edge runs all Idefics3 models.
    """

    def module() -> Any:
        config = transformers.Idefics3Config(
            vision_config={
                "model_type": "idefics3_vision",
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            text_config={
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": ffn,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": 64,
                "vocab_size": 49280,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
                "bos_token_id": 1,
                "eos_token_id": 49279,
                "pad_token_id": 2,
            },
            image_token_id=49190,
            scale_factor=4,
            pad_token_id=2,
            tie_word_embeddings=False,
        )
        return transformers.Idefics3ForConditionalGeneration(config)

    def image_processor() -> Any:
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            Idefics3ImageProcessorPil,
        )

        return Idefics3ImageProcessorPil(
            size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
        )

    return Architecture(
        module=module,
        image_processor=image_processor,
        vocabulary=49280,
        special_tokens={
            "<|endoftext|>": 0,
            "<|im_start|>": 1,
            "<|im_end|>": 2,
            "<global-img>": 49152,
            "<fake_token_around_image>": 49189,
            "<image>": 49190,
            "<end_of_utterance>": 49279,
        },
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        chat_template=_SMOLVLM_TEMPLATE,
    )


def _llava() -> Architecture:
    """LLaVA 1.5 7B: Vicuna 7B with CLIP large/14 at 336 pixels, 576 tokens per picture."""

    def module() -> Any:
        config = transformers.LlavaConfig(
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "projection_dim": 768,
                "image_size": 336,
                "patch_size": 14,
            },
            text_config={
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32064,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 32001,
            },
            image_token_index=32000,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
        return transformers.LlavaForConditionalGeneration(config)

    def image_processor() -> Any:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )

    return Architecture(
        module=module,
        image_processor=image_processor,
        vocabulary=32064,
        special_tokens={"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001},
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        chat_template=(
            "<s>{% for message in messages %}{{ message['role'] | upper }}: "
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
    )


def _llava_onevision() -> Architecture:
    """LLaVA-OneVision 0.5B: Qwen2 0.5B with tied head, SigLIP so400m/14 at 384 pixels.

    The tower has 26 of SigLIP's 27 layers, as in the published config.json.
    """

    def module() -> Any:
        config = transformers.LlavaOnevisionConfig(
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
                "vision_use_head": False,
            },
            text_config={
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 152000,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
                "tie_word_embeddings": True,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
            },
            image_token_index=151646,
            video_token_index=151647,
            tie_word_embeddings=True,
        )
        return transformers.LlavaOnevisionForConditionalGeneration(config)

    def image_processor() -> Any:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        return LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)

    return Architecture(
        module=module,
        image_processor=image_processor,
        vocabulary=152000,
        special_tokens={
            "<|endoftext|>": 151643,
            "<|im_start|>": 151644,
            "<|im_end|>": 151645,
            "<image>": 151646,
            "<video>": 151647,
        },
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=_qwen_template("<image>\n"),
    )


def _qwen_template(image: str) -> str:
    """Return Qwen's chat template with the text that stands for a picture."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _qwen2_5_vl() -> Architecture:
    """Qwen2.5-VL 3B: Qwen2.5 3B with tied head, 32 vision blocks of which 4 attend to all.

    Pictures have 448 x 448 pixels and 256 tokens, as bivlm-edge runs this family.
    """

    def module() -> Any:
        config = transformers.Qwen2_5_VLConfig(
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            text_config={
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "max_position_embeddings": 128000,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [16, 24, 24],
                },
                "tie_word_embeddings": True,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
            },
            image_token_id=151655,
            video_token_id=151656,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
            tie_word_embeddings=True,
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)

    def image_processor() -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil()

    return Architecture(
        module=module,
        image_processor=image_processor,
        vocabulary=151936,
        special_tokens={
            "<|endoftext|>": 151643,
            "<|im_start|>": 151644,
            "<|im_end|>": 151645,
            "<|vision_start|>": 151652,
            "<|vision_end|>": 151653,
            "<|image_pad|>": 151655,
            "<|video_pad|>": 151656,
        },
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=_qwen_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "smolvlm-256m": _smolvlm(576, 1536, 30, 9, 3),
    "smolvlm-500m": _smolvlm(960, 2560, 32, 15, 5),
    "llava-ov-0.5b": _llava_onevision(),
    "qwen2.5-vl-3b": _qwen2_5_vl(),
    "llava-1.5-7b": _llava(),
}
