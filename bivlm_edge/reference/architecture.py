"""Configuration, tokenizer and processor of a reference model, before any training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

MAX_VOCABULARY = 512
MAX_POSITIONS = 1024
WIDTH_MULTIPLE = 64  # of every linear layer, and the width of a head

PAD = "<pad>"
END = "</s>"
IMAGE = "<image>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, IMAGE, USER, ASSISTANT)

# Accepts both a plain string and the list of parts that `transformers` pipelines pass.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|user|>' if message['role'] == 'user' else '<|assistant|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '</s>' if message['role'] == 'assistant' -}}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt -}}
"""


@dataclass(frozen=True, slots=True)
class Design:
    """The sizes in which reference models differ; widths are multiples of 64.

    Attributes:
        image_size: Side of the picture in pixels.
        patch_size: Side of a patch in pixels.
        vision_width: Of the tower; its MLP is four times as wide.
        vision_layers: Layers of the tower.
        text_width: Of the decoder.
        text_mlp_width: Of the decoder's MLP.
        text_layers: Layers of the decoder.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_mlp_width: int
    text_layers: int

    @property
    def image_tokens(self) -> int:
        """Tokens that a picture becomes."""
        return (self.image_size // self.patch_size) ** 2


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; every other text encodes too, as bytes.

    Args:
        texts: Questions and answers. Merges go on until every word is one token, as long as
            MAX_VOCABULARY has room.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, design: Design) -> LlavaProcessor:
    """The processor of the checkpoint: CLIP's image steps at its size, and the chat template."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": design.image_size},
        crop_size={"height": design.image_size, "width": design.image_size},
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=design.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, design: Design) -> LlavaConfig:
    """The configuration of the model; every linear layer has widths that are multiples of 64."""
    vision = CLIPVisionConfig(
        hidden_size=design.vision_width,
        intermediate_size=4 * design.vision_width,
        num_hidden_layers=design.vision_layers,
        num_attention_heads=design.vision_width // WIDTH_MULTIPLE,
        projection_dim=design.vision_width,
        image_size=design.image_size,
        patch_size=design.patch_size,
    )
    text = LlamaConfig(
        vocab_size=_round_up(len(tokenizer), WIDTH_MULTIPLE),
        hidden_size=design.text_width,
        intermediate_size=design.text_mlp_width,
        num_hidden_layers=design.text_layers,
        num_attention_heads=design.text_width // WIDTH_MULTIPLE,
        num_key_value_heads=design.text_width // WIDTH_MULTIPLE,
        head_dim=WIDTH_MULTIPLE,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    special_tokens: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=design.image_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
        **special_tokens,
    )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def build_model(
    tokenizer: PreTrainedTokenizerFast, design: Design, seed: int
) -> LlavaForConditionalGeneration:
    """The model with weights drawn from `seed`, in float32."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(tokenizer, design))
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 16
    return model
