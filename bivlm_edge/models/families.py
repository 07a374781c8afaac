"""What differs between the supported architectures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from bivlm_edge.errors import UnsupportedModelError

DECODERS = ("llama", "mistral", "qwen2")

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

    def processor_call(self, image: Image.Image) -> dict[str, Any]:
        """Return the image processor's arguments for one picture; the last tile is what counts."""

    def check(self, config: Any) -> None:
        """Raise UnsupportedModelError for options that the exporter cannot express."""

    def decoder(self, module: Any) -> nn.Module:
        """Return the language model without its head."""

    def image_tokens(self, module: Any) -> int:
        """Return the number of features of one picture."""

    def image_features(self, module: Any, pixel_values: Tensor) -> Tensor:
        """Return ``(images, image_tokens, hidden)`` from ``(images, 3, H, W)``."""

    def picture_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return what `forward` takes for pictures, from pixel_values ``(images, 3, H, W)``."""

    def blocks(self, module: Any) -> Blocks:
        """Return the quantizable blocks that the graph uses, by part."""


@dataclass(frozen=True, slots=True)
class Llava:
    """CLIP or SigLIP tower, two-layer projector, Llama, Mistral or Qwen2 decoder."""

    name: str = "llava"
    image_spec_family: str = "clip"
    image_prompt: str = "{image}"
    pictures: str = "resized and cropped as its image processor does"

    def processor_call(self, image: Image.Image) -> dict[str, Any]:
        """Return the image processor's arguments for one picture."""
        return {"images": [image]}

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
        return _projected_features(module, pixel_values)

    def picture_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
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
    image_spec_family: str = "llava_onevision"
    image_prompt: str = "{image}"
    pictures: str = (
        "one base tile each, padded to a square, as transformers takes several pictures in a "
        "prompt; no patches of higher resolution (anyres)"
    )

    def processor_call(self, image: Image.Image) -> dict[str, Any]:
        """Return the picture twice, as one prompt's: only a single one is cut into patches."""
        return {"images": [[image, image]]}

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
        features = _projected_features(module, pixel_values)
        newline = module.model.image_newline.expand(features.shape[0], 1, -1)
        return torch.cat([features, newline], dim=1)

    def picture_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return pixel_values, marked as several pictures of one prompt (see `processor_call`)."""
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

    def processor_call(self, image: Image.Image) -> dict[str, Any]:
        """Return the image processor's arguments for one whole picture."""
        return {"images": [image], "do_image_splitting": False}

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

    def picture_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``(1, images, 3, H, W)``: all pictures belong to one prompt."""
        return {"pixel_values": pixel_values[None]}

    def blocks(self, module: Any) -> Blocks:
        """Return encoder layers, connector, decoder layers."""
        yield "vision", list(module.model.vision_model.encoder.layers)
        yield "projector", [module.model.connector]
        yield "decoder", list(module.model.text_model.layers)


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


def _projected_features(module: Any, pixel_values: Tensor) -> Tensor:
    """Return projected patch features of a LLaVA's configured layer."""
    config = module.config
    hidden = module.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = hidden[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    projected: Tensor = module.model.multi_modal_projector(features)
    return projected


def _llava_blocks(module: Any) -> Blocks:
    """Yield a LLaVA's encoder layers up to the feature layer, projector, decoder layers."""
    tower = module.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
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
}
