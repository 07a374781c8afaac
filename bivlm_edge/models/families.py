"""What differs between the supported architectures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    def image_processor_options(self) -> dict[str, Any]:
        """Arguments for the image processor's call."""

    def check(self, config: Any) -> None:
        """Raise UnsupportedModelError for options that the exporter cannot express."""

    def decoder(self, module: Any) -> nn.Module:
        """Return the language model without its head."""

    def image_tokens(self, module: Any) -> int:
        """Return the number of features of one picture."""

    def image_features(self, module: Any, pixel_values: Tensor) -> Tensor:
        """Return ``(images, image_tokens, hidden)`` from ``(images, 3, H, W)``."""

    def batch_pixels(self, pixel_values: Tensor) -> Tensor:
        """Return pixel_values ``(images, 3, H, W)`` in the shape that `forward` takes."""

    def blocks(self, module: Any) -> Blocks:
        """Return the quantizable blocks that the graph uses, by part."""


@dataclass(frozen=True, slots=True)
class Llava:
    """CLIP or SigLIP tower, two-layer projector, Llama, Mistral or Qwen2 decoder."""

    name: str = "llava"
    image_spec_family: str = "clip"
    image_prompt: str = "{image}"
    image_processor_options: dict[str, Any] = field(default_factory=dict)

    def check(self, config: Any) -> None:
        """Refuse towers other than CLIP and SigLIP and lists of feature layers."""
        _check_decoder(config.text_config)
        tower = config.vision_config.model_type
        if tower not in ("clip_vision_model", "siglip_vision_model"):
            raise UnsupportedModelError(
                f"the vision tower '{tower}' of this LLaVA model is not supported. "
                "Supported: clip_vision_model, siglip_vision_model."
            )
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer {config.vision_feature_layer!r} joins several layers. "
                "Only one layer (a number) is supported."
            )

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
        config = module.config
        tower = module.model.vision_tower
        hidden = tower(pixel_values, output_hidden_states=True).hidden_states
        features = hidden[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        projected: Tensor = module.model.multi_modal_projector(features)
        return projected

    def batch_pixels(self, pixel_values: Tensor) -> Tensor:
        """Return pixel_values unchanged."""
        return pixel_values

    def blocks(self, module: Any) -> Blocks:
        """Return encoder layers up to the feature layer, projector, decoder layers."""
        tower = module.model.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        index = module.config.vision_feature_layer
        used = index if index >= 0 else len(layers) + 1 + index
        yield "vision", list(layers[:used])
        yield "projector", [module.model.multi_modal_projector]
        yield "decoder", list(module.model.language_model.layers)


@dataclass(frozen=True, slots=True)
class Idefics3:
    """SigLIP tower, pixel shuffle and linear connector, Llama decoder (SmolVLM, Idefics3)."""

    name: str = "idefics3"
    image_spec_family: str = "idefics3"
    image_prompt: str = "<fake_token_around_image><global-img>{image}<fake_token_around_image>"
    image_processor_options: dict[str, Any] = field(
        default_factory=lambda: {"do_image_splitting": False}
    )

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

    def batch_pixels(self, pixel_values: Tensor) -> Tensor:
        """Return ``(1, images, 3, H, W)``: all pictures belong to one prompt."""
        return pixel_values[None]

    def blocks(self, module: Any) -> Blocks:
        """Return encoder layers, connector, decoder layers."""
        yield "vision", list(module.model.vision_model.encoder.layers)
        yield "projector", [module.model.connector]
        yield "decoder", list(module.model.text_model.layers)


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
    "idefics3": Idefics3(),
    "smolvlm": Idefics3(name="smolvlm"),
}
