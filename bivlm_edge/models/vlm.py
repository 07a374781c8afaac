"""Open a checkpoint and name its parts: vision tower, projector, decoder, vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache

from bivlm_edge.datasets import DATA_SETS, TRAINING_DATA
from bivlm_edge.errors import CheckpointError, DataError, RequestError, UnsupportedModelError
from bivlm_edge.models import families, places, saliency
from bivlm_edge.models.streaming import StreamedBlocks, load_weights
from bivlm_edge.positions import position_rows

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class BlockSequence:
    """Modules that run one after the other, each on the output of the one before.

    Attributes:
        name: "vision", "projector" or "decoder".
        blocks: (dotted name in the whole model, module), in order of execution.
    """

    name: str
    blocks: list[tuple[str, nn.Module]]


@dataclass(slots=True)
class VisionLanguageModel:
    """A vision-language model in float32 on the CPU, with its tokenizer and image processor.

    Attributes:
        name: Name of the checkpoint.
        family: Facts about the architecture.
        module: The `transformers` model, in evaluation mode.
        tokenizer: Its tokenizer.
        image_processor: Its image processor (PIL backend).
        chat_template: Jinja text.
        streamed: Reads the blocks of a model whose float weights stay on disk, or None.
    """

    name: str
    family: families.Family
    module: Any
    tokenizer: Any
    image_processor: Any
    chat_template: str
    streamed: StreamedBlocks | None = None

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.family.decoder(self.module)

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.module.config.text_config

    @property
    def training_data(self) -> str | None:
        """Name of the data set that the configuration names, as our reference models' do."""
        name = getattr(self.module.config, TRAINING_DATA, None)
        return name if name in DATA_SETS else None

    @property
    def image_token_id(self) -> int:
        """Token that stands for one image feature in the prompt."""
        return int(self.module.config.image_token_id)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Shape (3, H, W) of one picture in pixel_values."""
        vision = self.module.config.vision_config
        side = int(self.family.side or vision.image_size)
        return (int(getattr(vision, "num_channels", 3)), side, side)

    @property
    def image_tokens(self) -> int:
        """Features that one picture becomes, before pruning."""
        return self.family.image_tokens(self.module)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Run vision tower and projector.

        Args:
            pixel_values: float ``(images, 3, H, W)``.

        Returns:
            float ``(images, image_tokens, hidden)``, what replaces the image placeholders.
        """
        return self.family.image_features(self.module, pixel_values)

    def scored_features(
        self, pixel_values: Tensor, score: str, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Run vision tower and projector, and score their tokens for pruning.

        Args:
            pixel_values: float ``(images, 3, H, W)``.
            score: One of `config.PRUNE_SCORES`.
            layer: `attention`: block of the vision tower, counted from 0, or from the end if
                below 0.

        Returns:
            As `image_features`, and float32 ``(images, image_tokens)``; None where the picture
            alone gives no score (`text`, `none`).

        Raises:
            RequestError: The vision tower has no such block.
        """
        if score == "attention":
            block = self._vision_block(layer)
            return self.family.attended_features(self.module, pixel_values, block)
        features = self.image_features(pixel_values)
        of_features = {"distance": saliency.distance, "norm": saliency.norm}.get(score)
        return features, None if of_features is None else of_features(features)

    def place_features(self) -> NDArray[np.int8]:
        """Return features of the places of a picture's tokens, ``(image_tokens, width)``."""
        return places.features(self.family.token_places(self.module))

    def check_score(self, score: str, layer: int) -> None:
        """Refuse a score that this model does not have.

        Raises:
            RequestError: See `scored_features`.
        """
        if score == "attention":
            self._vision_block(layer)

    def check_prune_layer(self, layer: int) -> None:
        """Refuse a decoder layer that this model does not have.

        Raises:
            RequestError: There are no layers on both sides of it.
        """
        layers = int(self.text_config.num_hidden_layers)
        if not 0 <= layer < layers:
            raise RequestError(
                f"--prune-layer {layer} is none of the {layers} decoder layers of '{self.name}' "
                f"({self.family.name}). Accepted: 0 (before the decoder) to {layers - 1}."
            )

    def check_vision_layer(self, layer: int, score: str, score_layer: int) -> None:
        """Refuse a tower that needs all its patches, and layers that it does not have.

        Args:
            layer: The last that runs on all patches.
            score: One of `config.PRUNE_SCORES`.
            score_layer: `attention`: one of the layers up to `layer`.

        Raises:
            UnsupportedModelError: Its patches are joined later.
            RequestError: There is no such layer.
        """
        reason = self.family.keeps_patches(self.module)
        if reason:
            raise UnsupportedModelError(
                f"--prune-vision-layer drops patches inside the vision tower, but of the model "
                f"type '{self.module.config.model_type}' {reason}. Leave it out: image tokens "
                "are then dropped before the decoder (or inside, --prune-layer)."
            )
        blocks = self._vision_blocks
        if not 0 <= layer < blocks:
            raise RequestError(
                f"--prune-vision-layer {layer} is none of the {blocks} blocks that the vision "
                f"tower of '{self.name}' ({self.family.name}) runs. Accepted: 0 to {blocks - 1}."
            )
        if score == "attention" and not -layer - 1 <= score_layer <= layer:
            raise RequestError(
                f"--score-layer {score_layer} is none of the {layer + 1} blocks up to "
                f"--prune-vision-layer {layer}. Accepted: {-layer - 1} to {layer}."
            )

    @property
    def _vision_blocks(self) -> int:
        return next(len(part) for name, part in self.family.blocks(self.module) if name == "vision")

    def _vision_block(self, layer: int) -> int:
        blocks = self._vision_blocks
        if not -blocks <= layer < blocks:
            raise RequestError(
                f"--score-layer {layer} is none of the {blocks} blocks that the vision tower of "
                f"'{self.name}' ({self.family.name}) runs. Accepted: {-blocks} to {blocks - 1}."
            )
        return layer % blocks

    def block_sequences(self) -> list[BlockSequence]:
        """Return the blocks whose linear layers are quantized, in order of execution."""
        names = {id(module): name for name, module in self.module.named_modules()}
        return [
            BlockSequence(name, [(names[id(block)], block) for block in blocks])
            for name, blocks in self.family.blocks(self.module)
        ]

    def prompt(self, question: str, *, with_image: bool = True) -> str:
        """Return the text of one user turn, the image as one placeholder token.

        Raises:
            DataError: The question holds the placeholder.
            CheckpointError: The chat template drops or repeats the image.
        """
        token = self.image_token
        if token in question:
            raise DataError(
                f"the question {question!r} holds {token!r}, which stands for a picture in this "
                "model. Remove it; the picture goes before the text by itself."
            )
        content = [{"type": "image"}] if with_image else []
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        text: str = self.tokenizer.apply_chat_template(
            [message], chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )
        if text.count(token) != with_image:
            raise CheckpointError(
                f"the chat template of '{self.name}' puts {text.count(token)} image placeholders "
                f"into a message with {int(with_image)} pictures. Correct chat_template.jinja."
            )
        return text

    @property
    def image_prompt(self) -> str:
        """What one image placeholder of the chat template expands to; see `bundle.Manifest`."""
        return self.family.image_prompt

    def encode(self, text: str) -> list[int]:
        """Return token ids of a rendered prompt, image placeholders expanded."""
        token = self.image_token
        run = self.image_prompt.replace("{image}", token * self.image_tokens)
        ids: list[int] = self.tokenizer(text.replace(token, run), add_special_tokens=False)[
            "input_ids"
        ]
        bos = self.prepended_bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    @property
    def image_token(self) -> str:
        """Text of the image placeholder."""
        return str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))

    @property
    def prepended_bos(self) -> int | None:
        """Id of the begin token if the tokenizer puts it before a text that lacks it."""
        ids = self.tokenizer("a")["input_ids"]
        bos = self.tokenizer.bos_token_id
        return None if bos is None or ids[0] != bos else int(bos)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        end = self.module.generation_config.eos_token_id
        end = end if end is not None else self.tokenizer.eos_token_id
        return tuple(end) if isinstance(end, list) else () if end is None else (int(end),)

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, unless told otherwise."""
        return int(self.module.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS)

    def pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """Return float32 ``(3, H, W)`` of a picture."""
        return self.family.pixels(self.image_processor, image.convert("RGB"))

    @property
    def image_grid(self) -> tuple[int, int] | None:
        """Rows and columns of a picture's tokens if they are positions (M-RoPE), or None."""
        return self.family.image_grid(self.module)

    def positions(self, token_ids: Sequence[int]) -> tuple[Tensor, int]:
        """Return position_ids, int64 ``(1, S)`` or ``(3, 1, S)``, and the next position."""
        ids = np.asarray(token_ids, np.int64)
        rows, following = position_rows(ids, 0, self.image_token_id, self.image_grid)
        return torch.from_numpy(rows), following

    def embed(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Return the decoder's inputs, image features in place of their placeholders.

        Args:
            input_ids: int64 ``(B, S)``.
            features: float ``(images, image_tokens, hidden)``, in the order of the placeholders.

        Returns:
            float ``(B, S, hidden)``.
        """
        embeddings: Tensor = self.module.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.image_token_id)[..., None]
        return embeddings.masked_scatter(is_image, features.reshape(-1, features.shape[-1]))

    def decode(self, embeddings: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Return the logits of tokens behind `cache`, which grows by them.

        Args:
            embeddings: float ``(B, S, hidden)``.
            positions: int64 ``(B, S)``, or ``(3, B, S)`` (M-RoPE).
            cache: Keys and values of what came before.

        Returns:
            float ``(B, S, vocab)``.
        """
        new, seen = embeddings.shape[1], cache.get_seq_length()
        mask = torch.arange(seen + new)[None] <= torch.arange(seen, seen + new)[:, None]
        output = self.decoder(
            inputs_embeds=embeddings,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=mask[None, None],
            use_cache=True,
        )
        logits: Tensor = self.module.get_output_embeddings()(output.last_hidden_state)
        return logits

    def prepare(
        self, image: Image.Image | None, question: str, answer: str | None = None
    ) -> dict[str, Tensor]:
        """Return the arguments of `module` for one picture and question (batch of 1)."""
        ids = self.encode(self.prompt(question, with_image=image is not None))
        if answer is not None:
            ids += self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids)).long(),
        }
        if image is not None:
            pixels = torch.from_numpy(self.pixels(image))[None]
            inputs |= self.family.picture_inputs(self.module, pixels, inputs["input_ids"])
        return inputs


def load_checkpoint(source: str | Path, stream: bool | None = None) -> VisionLanguageModel:
    """Open a checkpoint of a supported family.

    Args:
        source: A local folder, or the hub id of a model that `transformers` can fetch.
        stream: Whether the float weights of blocks stay on disk; None: if the float weights exceed
            half of the available memory.

    Raises:
        CheckpointError: Nothing loadable is there.
        UnsupportedModelError: The architecture is not one of `families.FAMILIES`.
    """
    source = str(source)
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(
            f"'{source}' holds no config.json. Give a folder that save_pretrained() wrote, "
            "or a hub id such as 'HuggingFaceTB/SmolVLM-256M-Instruct'."
        )
    config = load_part(source, "configuration", transformers.AutoConfig.from_pretrained)
    family = families.FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"'{source}' has the model type '{config.model_type}', which bivlm-edge cannot export. "
            f"Supported: {', '.join(sorted(families.FAMILIES))}."
        )
    family.check(config)
    options = {
        "dtype": torch.float32,
        "attn_implementation": "sdpa",
        "use_safetensors": True,
        "output_loading_info": True,
    }
    loader = transformers.AutoModelForImageTextToText
    module, loading, streamed = load_weights(
        lambda more: load_part(source, "weights", loader.from_pretrained, {**options, **more}),
        lambda: loader.from_config(config),
        lambda skeleton: (block for _, part in family.blocks(skeleton) for block in part),
        stream,
    )
    require_all_weights(source, loading)
    tokenizer = load_part(source, "tokenizer", transformers.AutoTokenizer.from_pretrained)
    image_processor = load_part(
        source,
        "image processor",
        transformers.AutoImageProcessor.from_pretrained,
        {"backend": "pil"},
    )
    module.eval().requires_grad_(False)
    return VisionLanguageModel(
        name=Path(source).name,
        family=family,
        module=module,
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=_chat_template(
            source, tokenizer, tokenizer.convert_ids_to_tokens(config.image_token_id)
        ),
        streamed=streamed,
    )


def _chat_template(source: str, tokenizer: Any, image_token: str) -> str:
    """Return the checkpoint's template, or one that puts picture and text in a row."""
    file = Path(source) / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if tokenizer.chat_template is not None:
        return str(tokenizer.chat_template)
    legacy = Path(source) / "chat_template.json"
    if legacy.is_file():
        return str(json.loads(legacy.read_text(encoding="utf-8"))["chat_template"])
    return (
        "{%- for message in messages -%}{%- for part in message['content'] -%}"
        f"{{{{- '{image_token}' if part['type'] == 'image' else part['text'] -}}}}"
        "{%- endfor -%}{%- endfor -%}"
    )


def require_all_weights(source: str, loading: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights; `loading` is the loading_info of transformers."""
    absent = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if absent:
        raise CheckpointError(
            f"'{source}' lacks {len(absent)} weights or has them in another shape, the first is "
            f"{absent[0]}. transformers would draw them at random; give the complete checkpoint."
        )


def load_part(
    source: str,
    what: str,
    loader: Callable[..., Any],
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Call a `from_pretrained`, turning its many errors into one sentence."""
    try:
        return loader(source, **(options or {}))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise CheckpointError(
            f"cannot load the {what} of '{source}': {reason} "
            "Give a complete local checkpoint folder (config.json, *.safetensors, tokenizer and "
            "processor files), or a hub id that this machine can fetch."
        ) from error
