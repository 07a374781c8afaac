"""The keys and values of the tokens so far, in buffers that the graph writes into."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from bivlm_edge.errors import RequestError
from bivlm_edge.pruning import KEEP_TOKENS
from bivlm_edge.runtime.providers import CPU
from bivlm_edge.runtime.session import VlmSession

GROWTH = 256  # positions that a full cache gains
CACHE_LINE = 64  # bytes
_ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"


class KvCache:
    """Keys and values of one conversation; a run appends the tokens that it is given.

    Past and present of a run are the same memory, so that no step copies the cache. To continue
    twice, `rewind` after the first time, or continue a `copy`.

    Attributes:
        session: The model that it belongs to.
        tensors: Per layer key then value, each `[1, kv_heads, capacity, head_dim]`; the first
            `tokens` positions are filled.
        tokens: Tokens in the cache: those that pruning kept.
        position: Position of the next token. Unless the manifest says `contiguous`, kept tokens
            keep their original positions, so that it counts the dropped ones too. A picture on a
            grid takes fewer positions than tokens.
        single: The bound run of the next single token, while the buffers stay where they are.
    """

    def __init__(self, session: VlmSession, capacity: int = 0) -> None:
        """Allocate an empty cache; memory is touched when tokens are written.

        Args:
            session: The model.
            capacity: Tokens that fit before the buffers have to grow.

        Raises:
            RequestError: The model takes fewer tokens than `capacity`.
        """
        self.session = session
        self.tensors: tuple[ort.OrtValue, ...] = ()
        self._capacity = 0
        self.tokens = 0
        self.position = 0
        self.single: BoundRun | None = None
        self._buffers: list[NDArray[Any]] = []  # the memory of `tensors`, unless that is a GPU's
        self._require(capacity)
        self._allocate(capacity)

    @property
    def capacity(self) -> int:
        """Tokens that the buffers hold."""
        return self._capacity

    @property
    def used_bytes(self) -> int:
        """Bytes of the filled positions."""
        return self.tokens * self.bytes_per_token(self.session)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffers; pages that were never written take no memory yet."""
        return self.capacity * self.bytes_per_token(self.session)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all; the contents are copied if the buffers have to grow.

        Raises:
            RequestError: That is more than the model takes.
        """
        self._require(tokens)
        if tokens > self.capacity:
            context = self.session.manifest.context_length
            self._allocate(min(context, max(tokens, self.capacity + GROWTH)), self)

    def copy(self) -> KvCache:
        """Return a cache of its own with the same contents."""
        other = KvCache(self.session)
        other._allocate(self.capacity, self)
        other.tokens, other.position = self.tokens, self.position
        return other

    def rewind(self, tokens: int, position: int) -> None:
        """Forget what came behind the first `tokens`; the next one has `position`.

        Cheaper than a `copy` where the first continuation is done with.

        Raises:
            ValueError: The cache never got as far.
        """
        if not (0 <= tokens <= self.tokens and 0 <= position <= self.position):
            raise ValueError(
                f"cannot rewind {self.tokens} tokens, position {self.position}, to {tokens} "
                f"tokens, position {position}"
            )
        self.tokens, self.position = tokens, position

    def advance(self, kept: int, position: int) -> None:
        """Count the `kept` tokens that a run has written, and move on to `position`."""
        self.tokens += kept
        self.position = position

    def _require(self, tokens: int) -> None:
        context = self.session.manifest.context_length
        if tokens > context:
            raise RequestError(
                f"{tokens:,} tokens do not fit into the context: the model takes {context:,} in "
                "all. Shorten the prompt or the answer."
            )

    def _allocate(self, capacity: int, source: KvCache | None = None) -> None:
        """Get new buffers with the tokens of `source`, where the session reads them."""
        manifest, device = self.session.manifest, self.session.cache_device
        shape = (1, manifest.kv_heads, capacity, manifest.head_dim)
        new = [_aligned_zeros(shape, self.session.cache_dtype) for _ in self.session.past_names]
        if source is not None and source.tokens:
            for buffer, old in zip(new, source._contents(), strict=True):
                buffer[:, :, : source.tokens] = old[:, :, : source.tokens]
        self.tensors = tuple(ort.OrtValue.ortvalue_from_numpy(buffer, device) for buffer in new)
        self._buffers = new if device == CPU else []
        self._capacity = capacity
        self.single = None

    def _contents(self) -> list[NDArray[Any]]:
        """The buffers; of a GPU copies of them."""
        return self._buffers or [tensor.numpy() for tensor in self.tensors]

    @staticmethod
    def bytes_per_token(session: VlmSession) -> int:
        """Return what one token adds, over all layers."""
        manifest = session.manifest
        values = 2 * manifest.layers * manifest.kv_heads * manifest.head_dim
        return values * np.dtype(session.cache_dtype).itemsize


def _aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return zeros that start a cache line: large arrays of numpy start 16 bytes behind one.

    Every vector of the attention would straddle two lines; its decode step took a tenth longer.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # zeros, not empty: the system hands out zeroed pages when they are written
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


class BoundRun:
    """One run of the graph with all memory bound: the cache in place, ids, positions, logits.

    Attributes:
        token_ids: int64 `[1, tokens]`, to be written before a run.
        logits: `[1, 1, vocabulary]`, overwritten by each run.
    """

    def __init__(self, cache: KvCache, count: int, pixels: NDArray[Any], *, kept: bool) -> None:
        """Bind.

        Args:
            cache: Its buffers must have room for `count` more tokens, and must not move.
            count: Tokens per run.
            pixels: `pixel_values` in the model's type.
            kept: Fetch `kept_indices`.
        """
        session = cache.session
        self._session = session.ort  # not the cache: a cycle would outlive the conversation
        self.token_ids = np.zeros((1, count), np.int64)
        self.logits = np.zeros((1, 1, session.manifest.vocab_size), session.dtype)
        axes = () if session.manifest.image_grid is None else (3,)
        self._positions = np.zeros((*axes, 1, count), np.int64)
        self._past_length = np.zeros((), np.int64)
        arrays = {
            "input_ids": self.token_ids,
            "position_ids": self._positions,
            "past_length": self._past_length,
            "pixel_values": np.ascontiguousarray(pixels),
            "logits": self.logits,
        }
        if session.keep_tokens is not None:
            arrays[KEEP_TOKENS] = np.array(session.keep_tokens, np.int64)
        # the OrtValues are views of the arrays and must live as long as the binding
        self._values = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()
        }
        self._binding = session.ort.io_binding()
        self._bind_inputs()
        self._rebinds = session.provider != CPU
        self._options = ort.RunOptions()
        if count > 1 and session.provider == CPU:
            # what the activations of a prompt took is not kept while its answer is written
            self._options.add_run_config_entry(_ARENA_SHRINKAGE, "cpu:0")
        self._binding.bind_ortvalue_output("logits", self._values["logits"])
        if kept:
            self._binding.bind_output("kept_indices")
        present_names = session.output_names[2:]
        for past, present, tensor in zip(
            session.past_names, present_names, cache.tensors, strict=True
        ):
            self._binding.bind_ortvalue_input(past, tensor)
            self._binding.bind_ortvalue_output(present, tensor)

    def _bind_inputs(self) -> None:
        for name, value in self._values.items():
            if name != "logits":
                self._binding.bind_ortvalue_input(name, value)

    def run(self, positions: NDArray[np.int64], past_length: int) -> None:
        """Run on `token_ids` at `positions`, behind `past_length` cached tokens.

        Args:
            positions: `[1, tokens]`, or `[3, 1, tokens]` where the model's positions have axes.
            past_length: Filled positions of the cache.
        """
        self._positions[...] = positions
        self._past_length[...] = past_length
        if self._rebinds:  # what a GPU reads is copied there when it is bound
            self._bind_inputs()
        self._session.run_with_iobinding(self._binding, self._options)

    def kept_indices(self) -> NDArray[np.int64]:
        """Return int64 `[kept tokens]` of the last run."""
        # outputs come in the order in which they were bound
        kept: NDArray[np.int64] = self._binding.get_outputs()[1].numpy()[0]
        return kept
