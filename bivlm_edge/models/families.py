"""What differs between the supported architectures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bivlm_edge.errors import UnsupportedModelError
from bivlm_edge.models import places, qwen_vision, saliency
from bivlm_edge.pictures import squared

DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")

Blocks = Iterable[tuple[str, Sequence[nn.Module]]]


class Family(Protocol):
    """Names the parts of one architecture; stateless."""

    @property
    def name(self) -> str:
        """Name in the manifest."""

    @property
    def image_spec_family(self) -> str:
        """Kind of preprocessing, see `bundle.ImageSpec`."""

    @property
    def image_prompt(self) -> str:
        """Expansion of one image placeholder, see `bundle.Manifest`."""

    @property
    def pictures(self) -> str:
        """What becomes of a picture, in words for the export report."""

    @property
    def side(self) -> int | None:
        """Height and width of pictures where the exporter chooses them; None: the tower does."""

    def pixels(self, processor: Any, image: Image.Image) -> NDArray[np.float32]:
        """Return ``(3, H, W)`` of a picture in RGB, made by the checkpoint's image processor."""

    def keeps_patches(self, module: Any) -> str:
        """Return why the tower needs all patches to its end; empty if it does not."""

    def check(self, config: Any) -> None:
        """Raise UnsupportedModelError for options that the exporter cannot express."""

    def decoder(self, module: Any) -> nn.Module:
        """Return the language model without its head."""

    def image_tokens(self, module: Any) -> int:
        """Return the number of features of one picture."""

    def image_features(self, module: Any, pixel_values: Tensor) -> Tensor:
        """Return ``(images, image_tokens, hidden)`` from ``(images, 3, H, W)``."""

    def attended_features(
        self, module: Any, pixel_values: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return what `image_features` does and the attention that each token's patches receive.

        Args:
            module: The model.
            pixel_values: ``(images, 3, H, W)``.
            layer: Which of the vision tower's blocks, from 0; one of `blocks`.

        Returns:
            The features, and float32 ``(images, image_tokens)``: what the class token looks at
            where the tower has one, else the mean over all patches' attention.
        """

    def image_grid(self, module: Any) -> tuple[int, int] | None:
        """Return rows and columns of a picture's tokens if they are positions (M-RoPE), or None."""

    def token_places(self, module: Any) -> places.Places:
        """Return row and column of each of a picture's tokens in it; see places.py."""

    def picture_inputs(
        self, module: Any, pixel_values: Tensor, input_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return what `forward` takes for pictures.

        Args:
            module: The model.
            pixel_values: ``(images, 3, H, W)``.
            input_ids: ``(1, S)``, with the placeholders of all pictures.
        """

    def blocks(self, module: Any) -> Blocks:
        """Return the quantizable blocks that the graph uses, by part."""


@dataclass(frozen=True, slots=True)
class Llava:
    """CLIP or SigLIP tower, two-layer projector, Llama, Mistral or Qwen2 decoder."""

    name: str = "llava"
    image_spec_family: str = "clip"
    image_prompt: str = "{image}"
    pictures: str = "resized and cropped as its image processor does"

    side: int | None = None

    def pixels(self, processor: Any, image: Image.Image) -> NDArray[np.float32]:
        """Return ``(3, H, W)`` of a picture."""
        return _last_tile(processor, images=[image])

    def image_grid(self, module: Any) -> tuple[int, int] | None:  # noqa: ARG002 - see Family
        """Return None: positions have one axis."""
        return None

    def keeps_patches(self, module: Any) -> str:
        """Return the reason if the class token is an image token too."""
        has_class = module.config.vision_config.model_type == "clip_vision_model"
        is_kept = module.config.vision_feature_select_strategy != "default"
        return "its class token is one of the image tokens" if has_class and is_kept else ""

    def check(self, config: Any) -> None:
        """Refuse towers other than CLIP and SigLIP and lists of feature layers."""
        _check_decoder(config.text_config)
        _check_tower(config, ("clip_vision_model", "siglip_vision_model"))

    def decoder(self, module: Any) -> nn.Module:
        """Return the language model without its head."""
        decoder: nn.Module = module.model.language_model
        return decoder

    def image_tokens(self, module: Any) -> int:
        """Return patches per picture and the class token, less the first if it is dropped."""
        vision = module.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        has_class = vision.model_type == "clip_vision_model"
        drops_first = module.config.vision_feature_select_strategy == "default"
        return int(patches + has_class - drops_first)

    def image_features(self, module: Any, pixel_values: Tensor) -> Tensor:
        """Return projected patch features of the configured layer."""
        return _projected_features(module, pixel_values)[0]

    def attended_features(
        self, module: Any, pixel_values: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return the features and the attention of their patches."""
        features, states = _projected_features(module, pixel_values)
        return features, _selected(module, _received(module, states, layer))

    def token_places(self, module: Any) -> places.Places:
        """Return the places of the patches; the class token has none."""
        return _patch_places(module)

    def picture_inputs(
        self,
        module: Any,  # noqa: ARG002 - see Family
        pixel_values: Tensor,
        input_ids: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return pixel_values unchanged."""
        return {"pixel_values": pixel_values}

    def blocks(self, module: Any) -> Blocks:
        """Return encoder layers up to the feature layer, projector, decoder layers."""
        return _llava_blocks(module)


@dataclass(frozen=True, slots=True)
class LlavaOnevision:
    """SigLIP tower, two-layer projector, Qwen2 decoder; a newline token ends each picture.

    A picture is one base tile, as transformers itself takes the pictures of a prompt with several:
    padded to a square in the mean colour, without the patches of higher resolution ("anyres") of
    a prompt with one.
    """

    name: str = "llava_onevision"
    image_spec_family: str = "square"
    image_prompt: str = "{image}"
    pictures: str = (
        "one base tile each, padded to a square, as transformers takes several pictures in a "
        "prompt; no patches of higher resolution (anyres)"
    )

    side: int | None = None

    def pixels(self, processor: Any, image: Image.Image) -> NDArray[np.float32]:
        """Return ``(3, H, W)`` of a picture as one of two: only a single one is cut up."""
        return _last_tile(processor, images=[[image, image]])

    def image_grid(self, module: Any) -> tuple[int, int] | None:  # noqa: ARG002 - see Family
        """Return None: positions have one axis."""
        return None

    def keeps_patches(self, module: Any) -> str:  # noqa: ARG002 - see Family
        """Return the reason."""
        return "a newline token, which is no patch, ends each of its pictures"

    def check(self, config: Any) -> None:
        """Refuse towers other than SigLIP and lists of feature layers."""
        _check_decoder(config.text_config)
        _check_tower(config, ("siglip_vision_model",))

    def decoder(self, module: Any) -> nn.Module:
        """Return the language model without its head."""
        decoder: nn.Module = module.model.language_model
        return decoder

    def image_tokens(self, module: Any) -> int:
        """Return patches per picture and the newline."""
        vision = module.config.vision_config
        drops_first = module.config.vision_feature_select_strategy == "default"
        return int((vision.image_size // vision.patch_size) ** 2 - drops_first + 1)

    def image_features(self, module: Any, pixel_values: Tensor) -> Tensor:
        """Return projected patch features of the configured layer, then the newline."""
        return _with_newline(module, _projected_features(module, pixel_values)[0])

    def attended_features(
        self, module: Any, pixel_values: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return the features and the attention of their patches; the newline gets the mean."""
        features, states = _projected_features(module, pixel_values)
        received = _selected(module, _received(module, states, layer))
        received = torch.cat([received, received.mean(dim=1, keepdim=True)], dim=1)
        return _with_newline(module, features), received

    def token_places(self, module: Any) -> places.Places:
        """Return the places of the patches; the newline has none."""
        return np.concatenate([_patch_places(module), places.NOWHERE])

    def picture_inputs(
        self,
        module: Any,  # noqa: ARG002 - see Family
        pixel_values: Tensor,
        input_ids: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return pixel_values, marked as several pictures of one prompt (see `pixels`)."""
        images = pixel_values.shape[0]
        return {
            "pixel_values": pixel_values,
            "image_sizes": torch.tensor([pixel_values.shape[-2:]] * images),
            # Any number but 1 keeps forward from expecting patches.
            "batch_num_images": torch.tensor([images + 1]),
        }

    def blocks(self, module: Any) -> Blocks:
        """Return encoder layers up to the feature layer, projector, decoder layers."""
        return _llava_blocks(module)


@dataclass(frozen=True, slots=True)
class Idefics3:
    """SigLIP tower, pixel shuffle and linear connector, Llama decoder (SmolVLM, Idefics3)."""

    name: str = "idefics3"
    image_spec_family: str = "idefics3"
    image_prompt: str = "<fake_token_around_image><global-img>{image}<fake_token_around_image>"
    pictures: str = "one tile each, not split"

    side: int | None = None

    def pixels(self, processor: Any, image: Image.Image) -> NDArray[np.float32]:
        """Return ``(3, H, W)`` of a whole picture."""
        return _last_tile(processor, images=[image], do_image_splitting=False)

    def image_grid(self, module: Any) -> tuple[int, int] | None:  # noqa: ARG002 - see Family
        """Return None: positions have one axis."""
        return None

    def keeps_patches(self, module: Any) -> str:  # noqa: ARG002 - see Family
        """Return the reason."""
        return "its pixel shuffle joins neighbouring patches behind the tower"

    def check(self, config: Any) -> None:
        """Refuse tower sizes that the pixel shuffle does not divide."""
        _check_decoder(config.text_config)
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        if side % config.scale_factor:
            raise UnsupportedModelError(
                f"a side of {side} patches is not a multiple of scale_factor "
                f"{config.scale_factor}. Choose a checkpoint whose image_size / patch_size is one."
            )

    def decoder(self, module: Any) -> nn.Module:
        """Return the language model without its head."""
        decoder: nn.Module = module.model.text_model
        return decoder

    def image_tokens(self, module: Any) -> int:
        """Return features per picture after the pixel shuffle."""
        return int(module.model.image_seq_len)

    def image_features(self, module: Any, pixel_values: Tensor) -> Tensor:
        """Return connector features; every picture fills its frame."""
        hidden = module.model.vision_model(pixel_values).last_hidden_state
        features: Tensor = module.model.connector(hidden)
        return features

    def attended_features(
        self, module: Any, pixel_values: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return the features and the mean attention of the patches that the shuffle joins."""
        model = module.model
        output = model.vision_model(pixel_values, output_hidden_states=True)
        block = model.vision_model.encoder.layers[layer]
        received = block_attention(block, output.hidden_states[layer], class_token=False)
        shuffled = model.connector.pixel_shuffle(received[..., None], module.config.scale_factor)
        return model.connector(output.last_hidden_state), shuffled.mean(dim=-1)

    def token_places(self, module: Any) -> places.Places:
        """Return the places of the shuffled blocks."""
        vision = module.config.vision_config
        side = vision.image_size // vision.patch_size // module.config.scale_factor
        return places.grid(side, side)

    def picture_inputs(
        self,
        module: Any,  # noqa: ARG002 - see Family
        pixel_values: Tensor,
        input_ids: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return ``(1, images, 3, H, W)``: all pictures belong to one prompt."""
        return {"pixel_values": pixel_values[None]}

    def blocks(self, module: Any) -> Blocks:
        """Return encoder layers, connector, decoder layers."""
        yield "vision", list(module.model.vision_model.encoder.layers)
        yield "projector", [module.model.connector]
        yield "decoder", list(module.model.text_model.layers)


@dataclass(frozen=True, slots=True)
class Qwen25Vl:
    """Qwen2.5-VL: tower with windowed attention, Qwen2 decoder with positions on three axes.

    The model takes pictures of any size; the graph takes one, so that windows and positions are
    constants: pictures are padded to a square in the mean colour and resized to `side`.
    """

    name: str = "qwen2_5_vl"
    image_spec_family: str = "square"
    image_prompt: str = "{image}"
    side: int | None = 448
    pictures: str = "padded to a square and resized to 448 x 448 pixels, 256 tokens each"

    def pixels(self, processor: Any, image: Image.Image) -> NDArray[np.float32]:
        """Return ``(3, H, W)`` of a picture: the first frame of the processor's patches."""
        area = self._side**2
        # the processor itself rounds some sizes up to the next block
        square = squared(image, mean_color(processor)).resize(
            (self._side, self._side), resample=Image.Resampling(int(processor.resample))
        )
        batch = processor(
            images=[square],
            size={"shortest_edge": area, "longest_edge": area},
            return_tensors="np",
        )
        merge, patch, frames = (
            processor.merge_size,
            processor.patch_size,
            processor.temporal_patch_size,
        )
        blocks = self._side // (merge * patch)
        shape = (blocks, blocks, merge, merge, 3, frames, patch, patch)
        frame = np.asarray(batch["pixel_values"], np.float32).reshape(shape)[..., 0, :, :]
        pixels = frame.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, self._side, self._side)
        return np.ascontiguousarray(pixels)

    def image_grid(self, module: Any) -> tuple[int, int] | None:
        """Return rows and columns of a picture's merged tokens."""
        blocks = self._side // qwen_vision.block_size(module.config.vision_config)
        return blocks, blocks

    def keeps_patches(self, module: Any) -> str:  # noqa: ARG002 - see Family
        """Return the reason."""
        return "its windows and its merger of neighbouring patches need whole pictures"

    def check(self, config: Any) -> None:
        """Refuse towers whose windows do not divide the picture."""
        _check_decoder(config.text_config)
        vision = config.vision_config
        window = qwen_vision.window_blocks(vision) * qwen_vision.block_size(vision)
        if self._side % window:
            raise UnsupportedModelError(
                f"pictures of {self._side} pixels are not whole windows of {window}, as the "
                "exported vision tower needs them. Supported: patch_size, spatial_merge_size and "
                "window_size as Qwen2.5-VL has them."
            )

    def decoder(self, module: Any) -> nn.Module:
        """Return the language model without its head."""
        decoder: nn.Module = module.model.language_model
        return decoder

    def image_tokens(self, module: Any) -> int:
        """Return merged patches per picture."""
        return int((self._side // qwen_vision.block_size(module.config.vision_config)) ** 2)

    def image_features(self, module: Any, pixel_values: Tensor) -> Tensor:
        """Return the tower's merged features."""
        return qwen_vision.features(module.model.visual, pixel_values)

    def attended_features(
        self, module: Any, pixel_values: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return the features and the mean attention of the patches that the merger joins."""
        return qwen_vision.attended_features(module.model.visual, pixel_values, layer)

    def token_places(self, module: Any) -> places.Places:
        """Return the places of the merged patches."""
        blocks = self._side // qwen_vision.block_size(module.config.vision_config)
        return places.grid(blocks, blocks)

    def picture_inputs(
        self, module: Any, pixel_values: Tensor, input_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return patches, their grid, and which tokens are pictures, for the positions."""
        patches, grid = qwen_vision.to_patches(pixel_values, module.config.vision_config)
        return {
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (input_ids == module.config.image_token_id).int(),
        }

    def blocks(self, module: Any) -> Blocks:
        """Return encoder layers, merger, decoder layers."""
        yield "vision", list(module.model.visual.blocks)
        yield "projector", [module.model.visual.merger]
        yield "decoder", list(module.model.language_model.layers)

    @property
    def _side(self) -> int:
        return int(self.side or 0)


def mean_color(processor: Any) -> tuple[int, int, int]:
    """Return the colour that normalisation takes to about 0: red, green, blue."""
    red, green, blue = (int(value * 255) for value in processor.image_mean)
    return red, green, blue


def _last_tile(processor: Any, **arguments: Any) -> NDArray[np.float32]:
    """Return ``(3, H, W)``, the last that an image processor makes of its images."""
    batch = processor(**arguments, return_tensors="np")
    array: NDArray[np.float32] = np.asarray(batch["pixel_values"], np.float32)
    tile: NDArray[np.float32] = array.reshape(-1, *array.shape[-3:])[-1]
    return tile


def _check_tower(config: Any, towers: Sequence[str]) -> None:
    """Refuse other vision towers, and features that join several layers."""
    tower = config.vision_config.model_type
    if tower not in towers:
        raise UnsupportedModelError(
            f"the vision tower '{tower}' of this LLaVA model is not supported. "
            f"Supported: {', '.join(towers)}."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer {config.vision_feature_layer!r} joins several layers. "
            "Only one layer (a number) is supported."
        )


def _projected_features(module: Any, pixel_values: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """Return projected patch features of a LLaVA's configured layer, and the tower's states."""
    states = module.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = _selected(module, states[module.config.vision_feature_layer])
    projected: Tensor = module.model.multi_modal_projector(features)
    return projected, states


def _selected(module: Any, patches: Tensor) -> Tensor:
    """Return what becomes tokens of the patches on axis 1 of a LLaVA's tower."""
    return patches[:, 1:] if module.config.vision_feature_select_strategy == "default" else patches


def _patch_places(module: Any) -> places.Places:
    vision = module.config.vision_config
    side = vision.image_size // vision.patch_size
    found = places.grid(side, side)
    if vision.model_type == "clip_vision_model":
        found = np.concatenate([places.NOWHERE, found])
    drops_first = module.config.vision_feature_select_strategy == "default"
    return found[drops_first:]


def _with_newline(module: Any, features: Tensor) -> Tensor:
    newline = module.model.image_newline.expand(features.shape[0], 1, -1)
    return torch.cat([features, newline], dim=1)


def _received(module: Any, states: Sequence[Tensor], layer: int) -> Tensor:
    """Return the attention that the patches of a LLaVA's tower receive in a layer."""
    has_class = module.config.vision_config.model_type == "clip_vision_model"
    block = _tower_layers(module)[layer]
    return block_attention(block, states[layer], class_token=has_class)


def block_attention(block: Any, hidden: Tensor, *, class_token: bool) -> Tensor:
    """Return the attention that patches receive in a CLIP or SigLIP block.

    Args:
        block: The block.
        hidden: Its input ``(images, patches, width)``.
        class_token: As in `saliency.attention_received`.
    """
    attention, normed = block.self_attn, block.layer_norm1(hidden)
    query, key = (
        project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    return saliency.attention_received(query, key, attention.scale, class_token=class_token)


def tower(module: Any) -> Any:
    """Return the CLIP or SigLIP tower of a LLaVA."""
    found = module.model.vision_tower
    return getattr(found, "vision_model", found)


def _tower_layers(module: Any) -> Sequence[Any]:
    layers: Sequence[Any] = tower(module).encoder.layers
    return layers


def _llava_blocks(module: Any) -> Blocks:
    """Yield a LLaVA's encoder layers up to the feature layer, projector, decoder layers."""
    layers = _tower_layers(module)
    index = module.config.vision_feature_layer
    used = index if index >= 0 else len(layers) + 1 + index
    yield "vision", list(layers[:used])
    yield "projector", [module.model.multi_modal_projector]
    yield "decoder", list(module.model.language_model.layers)


def _check_decoder(config: Any) -> None:
    """Refuse decoders that compute more than Llama does: the traced form would leave it out."""
    if config.model_type not in DECODERS:
        raise UnsupportedModelError(
            f"the decoder '{config.model_type}' is not supported. Supported: {', '.join(DECODERS)}."
        )
    window = getattr(config, "sliding_window", None)
    uses_window = getattr(config, "use_sliding_window", True)
    if window is not None and uses_window and window < config.max_position_embeddings:
        raise UnsupportedModelError(
            f"the decoder attends to a sliding window of {window} tokens, which the exported "
            f"graph does not. Set max_position_embeddings to {window} or less in config.json to "
            "export it for contexts up to the window."
        )


FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "llava_onevision": LlavaOnevision(),
    "idefics3": Idefics3(),
    "smolvlm": Idefics3(name="smolvlm"),
    "qwen2_5_vl": Qwen25Vl(),
}
