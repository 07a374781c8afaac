"""The blocks of a causal language model, whatever their list is called, and their arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from bivlm_edge.errors import UnsupportedModelError

_CACHES = ("past_key_values", "past_key_value", "layer_past")


def find_blocks(source: str, module: Any) -> tuple[str, nn.ModuleList]:
    """Return the dotted name in the whole model, and the list, of the decoder's blocks.

    It is the one list in the decoder that has as many entries as the configuration says, each with
    linear layers in it.

    Args:
        source: Name of the model for messages.
        module: A causal language model of transformers; its tensors may be on the meta device.

    Raises:
        UnsupportedModelError: There is none, or there are several.
    """
    decoder = module.get_decoder()
    prefix = next(name for name, part in module.named_modules() if part is decoder)
    count = getattr(module.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = dict(_lists(decoder, prefix, count))
    if len(found) == 1:
        return found.popitem()
    what = f"the decoder of '{source}' ({type(module).__name__})"
    wanted = f"{count} blocks with linear layers (num_hidden_layers of its configuration)"
    if found:
        raise UnsupportedModelError(
            f"{what} has several lists of {wanted}: {', '.join(found)}. Supported are models with "
            "one, whose blocks run one after the other."
        )
    raise UnsupportedModelError(
        f"{what} has no list of {wanted}. Supported are models whose blocks stand in one list "
        "(nn.ModuleList) and run one after the other."
    )


def _lists(module: nn.Module, prefix: str, count: int | None) -> Iterator[tuple[str, Any]]:
    """Lists of `count` blocks that are in no other such list."""
    for local, child in module.named_children():
        name = f"{prefix}.{local}" if prefix else local
        if isinstance(child, nn.ModuleList) and len(child) == count and all(map(_is_block, child)):
            yield name, child
        else:
            yield from _lists(child, name, count)


def _is_block(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear | Conv1D) for part in module.modules())


def make_linear(module: nn.Module) -> list[str]:
    """Put an nn.Linear in the place of every Conv1D of transformers, which stores W transposed.

    Returns:
        The layers' dotted names.
    """
    layers = {name: part for name, part in module.named_modules() if isinstance(part, Conv1D)}
    for name, layer in layers.items():
        # of the meta device: its own weights would only be thrown away
        linear = nn.Linear(layer.nx, layer.nf, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
        linear.bias = layer.bias
        module.set_submodule(name, linear)
    return list(layers)


def check_blocks(source: str, name: str, blocks: nn.ModuleList) -> None:
    """Refuse weights in blocks that are not of nn.Linear.

    Args:
        source: Name of the model for messages.
        name: Dotted name of the list in the whole model.
        blocks: The list.

    Raises:
        UnsupportedModelError: There are such weights.
    """
    for local, part in blocks.named_modules(prefix=name):
        if isinstance(part, nn.Linear):
            continue
        for parameter, value in part.named_parameters(recurse=False):
            if value.ndim > 1:
                raise UnsupportedModelError(
                    f"{local}.{parameter} of '{source}' is a weight of shape "
                    f"{tuple(value.shape)} outside nn.Linear, which would stay float unnoticed. "
                    "Supported are models whose blocks multiply by nn.Linear (or the Conv1D of "
                    "GPT-2) alone; fused experts are not."
                )


def without_cache(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments without its cache, which would grow with every rerun."""
    named = {key: None if key in _CACHES else value for key, value in kwargs.items()}
    if "use_cache" in named:
        named["use_cache"] = False
    return (
        tuple(None if isinstance(value, Cache) else value for value in args),
        {key: None if isinstance(value, Cache) else value for key, value in named.items()},
    )
