"""Write a model with its weights in one aligned external file that ONNX Runtime maps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

INLINE_BYTES = 256
PAGE = 4096
LINE = 64
PAGE_ALIGNED_FROM = 1 << 16


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    length: int


def save(model: ir.Model, path: Path, data_name: str) -> None:
    """Write `path` and, beside it, `data_name` with every tensor of INLINE_BYTES or more.

    Tensors of 64 KiB or more start at multiples of 4096, so that the mapping hands them to a
    kernel page-aligned; the rest at multiples of 64. Tensors with the same bytes are stored once
    (tied embeddings). The model's initializers refer to the file afterwards.

    Args:
        model: Gets external tensors in place of its own.
        path: The graph.
        data_name: File name of the data, in the folder of `path`.

    Raises:
        OSError: The disk is full or the folder is not writable.
    """
    places: dict[bytes, _Place] = {}
    with (path.parent / data_name).open("wb") as stream:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE_BYTES:
                continue
            content = tensor.tobytes()
            key = hashlib.sha256(content).digest()
            place = places.get(key)
            if place is None:
                alignment = PAGE if len(content) >= PAGE_ALIGNED_FROM else LINE
                stream.write(b"\0" * (-stream.tell() % alignment))
                place = places[key] = _Place(stream.tell(), len(content))
                stream.write(content)
            value.const_value = ir.ExternalTensor(
                data_name,
                place.offset,
                place.length,
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=str(value.name),
                base_dir=path.parent,
            )
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
