"""Models larger than the memory: the float weights of blocks stay on disk until they are used.

A streamed model has everything outside its blocks in memory. A block is read when it runs, or for
as long as somebody holds it, and dropped afterwards; quantized layers are decoded instead of read.
Names and conversions of checkpoints are those of transformers, which keeps an index for
`device_map` (through accelerate).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from bivlm_edge.errors import RequestError, UnsupportedModelError
from bivlm_edge.models.decoder_blocks import without_cache

logger = logging.getLogger(__name__)

_LARGE = 0.5  # of the available memory


class Decodable(Protocol):
    """A quantized weight."""

    def dequantize(self) -> Any:
        """The weight as a numpy array, float32 (n, k)."""


class _Transposed(Mapping[str, Tensor]):
    """Tensors by name, some of them transposed."""

    def __init__(self, tensors: Mapping[str, Tensor], transposed: Collection[str]) -> None:
        self._tensors, self._names = tensors, frozenset(transposed)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.T.contiguous() if name in self._names else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class StreamedBlocks:
    """Reads and drops the weights of a model's blocks.

    While it exists the model can be called as a whole, at the price of reading every block.

    Args:
        module: The model; parameters inside the blocks are on the meta device.
        names: Dotted names of the blocks.
        tensors: Dotted name -> float32 tensor of every parameter and buffer in the blocks, read
            anew at each access.

    Raises:
        UnsupportedModelError: A block needs a tensor that the checkpoint does not hold.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._blocks = {name: module.get_submodule(name) for name in names}
        self._tensors = tensors
        self._held: set[str] = set()
        self._quantized: dict[str, Decodable] = {}
        self._kept: dict[str, Tensor] = {}
        for name, block in self._blocks.items():
            for local, tensor in _named_tensors(block):
                if tensor.is_meta and f"{name}.{local}" not in tensors:
                    raise UnsupportedModelError(
                        f"'{name}.{local}' is not in the checkpoint, so the model cannot be read "
                        "block by block. Quantize it on a machine that holds the whole model."
                    )
        self._hooks: list[RemovableHandle] = []
        self._watch()

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Inside, a block's weights are in memory and may be changed; then they are dropped.

        Changes are lost unless `keep` was told of them.
        """
        self._load(name)
        self._held.add(name)
        try:
            yield
        finally:
            self._held.discard(name)
            self._drop(name)

    def keep(self, name: str, weight: Decodable, bias: Tensor | None) -> None:
        """Decode a layer from now on instead of reading it.

        Args:
            name: Dotted name of the layer in the whole model.
            weight: Its weight.
            bias: Its bias, or None.
        """
        self._quantized[f"{name}.weight"] = weight
        if bias is not None:
            self._kept[f"{name}.bias"] = bias.detach().clone()

    def settle(self, layers: Collection[str] = ()) -> None:
        """Keep in memory what is small or has no packed form, as export needs it.

        That is everything but the quantized weights (norms, biases, layers left float), and the
        weights of `layers`.
        """
        for name, block in self._blocks.items():
            for local, tensor in _named_tensors(block):
                full = f"{name}.{local}"
                if not tensor.is_meta or full in self._kept:
                    continue
                if full not in self._quantized:
                    self._kept[full] = self._tensors[full]
                elif full.removesuffix(".weight") in layers:
                    self._kept[full] = torch.from_numpy(self._quantized[full].dequantize())
            self._load(name, weights=False)

    def read(self, name: str) -> Tensor:
        """The tensor of a block as the checkpoint has it, float32."""
        return self._tensors[name]

    def transpose(self, layers: Collection[str]) -> None:
        """Read the weights of layers transposed from now on.

        Args:
            layers: Dotted names of layers in the whole model; those outside the blocks are left.
        """
        names = {f"{name}.weight" for name in layers} & self._tensors.keys()
        self._tensors = _Transposed(self._tensors, names)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is read: the model is traced, quantized layers have other modules."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            yield
        finally:
            self._watch()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, backward passes run every block once more instead of keeping its weights."""
        forwards = {name: block.forward for name, block in self._blocks.items()}

        def run(name: str, *args: Any, **kwargs: Any) -> Any:
            def load_and_run(*inner: Any, **named: Any) -> Any:
                self._load(name)
                try:
                    return forwards[name](*inner, **named)
                finally:
                    if name not in self._held:
                        self._drop(name)

            args, kwargs = without_cache(args, kwargs)
            return checkpoint(load_and_run, *args, use_reentrant=False, **kwargs)

        try:
            for name, block in self._blocks.items():
                block.forward = partial(run, name)
            yield
        finally:
            for block in self._blocks.values():
                del block.forward  # the class's own method again

    def _watch(self) -> None:
        for name, block in self._blocks.items():
            before, behind = partial(self._before, name), partial(self._behind, name)
            self._hooks.append(block.register_forward_pre_hook(before, prepend=True))
            self._hooks.append(block.register_forward_hook(behind, always_call=True))

    def _before(self, name: str, block: nn.Module, args: tuple[Any, ...]) -> None:
        del block, args
        self._load(name)

    def _behind(self, name: str, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del block, args, output
        if name not in self._held:
            self._drop(name)

    def _load(self, name: str, *, weights: bool = True) -> None:
        for local, tensor in list(_named_tensors(self._blocks[name])):
            full = f"{name}.{local}"
            if not tensor.is_meta:
                continue
            if full in self._kept:
                value = self._kept[full]
            elif full in self._quantized:
                if not weights:
                    continue
                value = torch.from_numpy(self._quantized[full].dequantize())
            else:
                value = self._tensors[full]
            _put(self._blocks[name], local, value)

    def _drop(self, name: str) -> None:
        for local, tensor in list(_named_tensors(self._blocks[name])):
            full = f"{name}.{local}"
            is_ours = full in self._tensors or full in self._quantized
            if is_ours and not tensor.is_meta and full not in self._kept:
                _put(self._blocks[name], local, tensor.to("meta"))


def _named_tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _put(block: nn.Module, local: str, value: Tensor) -> None:
    path, _, name = local.rpartition(".")
    owner = block.get_submodule(path)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[name] = value


def load_weights(
    load: Callable[[Mapping[str, Any]], tuple[Any, Mapping[str, Any]]],
    make_skeleton: Callable[[], Any],
    blocks: Callable[[Any], Iterable[nn.Module] | None],
    stream: bool | None,
) -> tuple[Any, Mapping[str, Any], StreamedBlocks | None]:
    """Load a checkpoint, its blocks streamed if that is wanted.

    Args:
        load: Calls `from_pretrained` with additional options; returns module and loading_info.
        make_skeleton: Makes the model without loading weights; called on the meta device.
        blocks: Returns the blocks of a model that may stay on disk.
        stream: Whether to stream; None: if the float weights exceed half of the available memory
            (a log line says so).

    Returns:
        Module, loading_info, and what reads the blocks of a streamed model.

    Raises:
        RequestError: `stream` is true, but accelerate is not installed.
        UnsupportedModelError: The weights of a block cannot be read one by one.
    """
    if stream is False:
        return *load({}), None
    with torch.device("meta"):
        skeleton = make_skeleton()
    if stream is None and not _is_large(skeleton):
        return *load({}), None
    _require_accelerate()
    found = {id(module): name for name, module in skeleton.named_modules()}
    names = [found[id(block)] for block in blocks(skeleton) or ()]
    if not names:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} has no list of blocks that could be read one by one."
        )
    device_map = dict.fromkeys(_outside(skeleton, "", frozenset(names)), "cpu")
    device_map |= dict.fromkeys(names, "disk")
    converted = tempfile.mkdtemp(prefix="bivlm-stream-")
    cleanup = partial(shutil.rmtree, converted, ignore_errors=True)
    try:
        with _quiet_accelerate():
            module, loading = load({"device_map": device_map, "offload_folder": converted})
        streamed = _take_over(module, names)
    except BaseException:
        cleanup()
        raise
    weakref.finalize(streamed, cleanup)
    return module, loading, streamed


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Keep its note about parameters on the meta device off the terminal: they are to be there."""
    notes = logging.getLogger("accelerate.big_modeling")
    level = notes.level
    notes.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notes.setLevel(level)


def _is_large(skeleton: nn.Module) -> bool:
    needed = 4 * sum(parameter.numel() for parameter in skeleton.parameters())
    available = available_memory()
    if needed <= available * _LARGE:
        return False
    sizes = f"the float weights take {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB of memory"
    if importlib.util.find_spec("accelerate") is None:
        logger.warning("%s; with accelerate installed their blocks could stay on disk", sizes)
        return False
    logger.warning("%s: their blocks are read from disk one at a time (--stream)", sizes)
    return True


def _require_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise RequestError(
            "reading a model block by block (--stream) needs accelerate. "
            "Run: pip install accelerate"
        )


def _take_over(module: nn.Module, names: Sequence[str]) -> StreamedBlocks:
    """Put `StreamedBlocks` in the place of accelerate's hooks, which read layer by layer."""
    from accelerate.hooks import remove_hook_from_module

    loader = next(_weight_maps(module.get_submodule(names[0])), None)
    if loader is None:
        raise UnsupportedModelError(
            f"transformers keeps no index of the weights of '{names[0]}', so the model cannot be "
            "read block by block. Give a checkpoint in safetensors files."
        )
    remove_hook_from_module(module, recurse=True)
    return StreamedBlocks(module, names, loader)


def _outside(module: nn.Module, prefix: str, blocks: frozenset[str]) -> Iterator[str]:
    """Names of the largest modules, and of parameters, that hold no block and are in none."""
    for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield f"{prefix}{name}"
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if full in blocks:
            continue
        if any(block.startswith(f"{full}.") for block in blocks):
            yield from _outside(child, f"{full}.", blocks)
        else:
            yield full


def _weight_maps(block: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """The index that accelerate's hooks read from, by names in the whole model."""
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            found = getattr(part, "weights_map", None)
            if found is not None:
                yield found.dataset


def available_memory() -> int:
    """Bytes of memory that are free or can be freed."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
