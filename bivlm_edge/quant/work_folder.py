"""A folder that keeps what a quantization has finished, so that a killed run can go on.

One file per finished step, written under another name and renamed, with a checksum over all that
it holds. `run.json` says which checkpoint, calibration data and options the steps belong to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor

from bivlm_edge.calibration.moments import ALONE
from bivlm_edge.config import QuantConfig
from bivlm_edge.distributed import Team
from bivlm_edge.errors import OutputError, RequestError
from bivlm_edge.provenance import code_version, library_versions
from bivlm_edge.quant.packed import FORMAT, BinaryWeight
from bivlm_edge.quant.weights import DenseWeight, GroupWeight, QuantizedWeight

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
LAYOUT = 1  # of the files in the folder
_VALUES, _CHECKSUM = "__values__", "__checksum__"
_CHECKSUM_LENGTH = 64  # a hexadecimal checksum tells a reader nothing
_SUFFIX = ".safetensors"
# Fields of QuantConfig that say what is done behind the layers.
_LATER_FIELDS = frozenset(
    {"tune", "tune_signs", "tune_epochs", "tune_steps", "tune_samples", "tune_rate"}
    | {"vocabulary_bits"}
)
_KINDS: dict[str, type[QuantizedWeight]] = {
    kind.__name__: kind for kind in (BinaryWeight, GroupWeight, DenseWeight)
}

Array = NDArray[Any]


class ModelConfig(Protocol):
    """What is read of a `transformers` configuration."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""


class Step(NamedTuple):
    """One finished step: plain values and arrays."""

    values: Any
    arrays: dict[str, Array]


class WorkFolder:
    """Finished steps by name; without a path nothing is kept.

    Args:
        path: The folder; made if it is missing.
        run: What the steps depend on, plain values by name (`describe_run`); ignored without a
            path.
        team: The processes that quantize together; the first alone reads and writes the folder.

    Raises:
        RequestError: The folder belongs to another run; the message says what differs.
        OutputError: The folder cannot be written, or holds something else.
    """

    def __init__(
        self, path: Path | None, run: Mapping[str, Any] | None = None, team: Team = ALONE
    ) -> None:
        self._path, self._team = path, team
        if path is None or team.rank:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the work folder '{path}' cannot be made: {error.strerror}. Choose another one."
            ) from error
        file = path / RUN_FILE
        wanted = json.loads(json.dumps(dict(run or {})))
        if file.exists():
            _check_same_run(path, _read_run(file), wanted)
        elif any(not _is_half_written(found) for found in path.iterdir()):
            raise OutputError(
                f"'{path}' holds files but no {RUN_FILE}, so it is no work folder. Give an empty "
                "or a new folder."
            )
        else:
            _write(file, json.dumps(wanted, indent=2).encode())

    def load(self, name: str) -> Step | None:
        """Return a finished step, or None if it is missing or damaged (a log line says which)."""
        if self._path is None:
            return None
        file = self._path / (name + _SUFFIX)
        data = self._team.bytes_of_first(self._read(file))
        if data is None:
            return None
        try:
            arrays = load_arrays(data)
            stored = bytes(arrays.pop(_VALUES))
            checksum = bytes(arrays.pop(_CHECKSUM))
        except (SafetensorError, KeyError, ValueError) as error:
            logger.warning("'%s' is damaged (%s); this step is done again", file, error)
            return None
        if checksum != _digest(stored, arrays):
            logger.warning("'%s' is damaged (wrong checksum); this step is done again", file)
            return None
        return Step(json.loads(stored), arrays)

    def save(self, name: str, values: Any, arrays: Mapping[str, Array]) -> None:
        """Keep a finished step; it is complete on the disk when this returns.

        Args:
            name: Name of the step, fit for a file name.
            values: What `json` can write; floats come back bit by bit.
            arrays: Arrays by name.

        Raises:
            OutputError: The disk is full or the folder not writable.
        """
        if self._path is None or self._team.rank:
            return
        stored = json.dumps(values).encode()
        extra = {
            _VALUES: np.frombuffer(stored, np.uint8),
            _CHECKSUM: np.frombuffer(_digest(stored, arrays), np.uint8),
        }
        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        _write(self._path / (name + _SUFFIX), save_arrays(contiguous | extra))

    def _read(self, file: Path) -> bytes | None:
        if self._team.rank:
            return None
        try:
            return file.read_bytes()
        except FileNotFoundError:
            return None


def _is_half_written(file: Path) -> bool:
    """Whether a process that was killed left this in a folder that had no RUN_FILE yet."""
    return file.name.startswith(f".{RUN_FILE}.")


def has_steps(path: Path) -> bool:
    """Whether a work folder keeps anything that an earlier run has finished."""
    return any(path.glob(f"*{_SUFFIX}"))


def _digest(values: bytes, arrays: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256(values)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.digest()


def _write(file: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write '{file}': {error.strerror or error}. What was finished before is kept; "
            "free some space and start again with the same work folder."
        ) from error


def _read_run(file: Path) -> dict[str, Any]:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OutputError(
            f"'{file}' cannot be read ({error}), so nothing says what the work folder belongs to. "
            "Delete the folder, or give another one."
        ) from error
    return run if isinstance(run, dict) else {}


def _check_same_run(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = []
    for name in dict.fromkeys([*wanted, *found]):
        was, now = found.get(name), wanted.get(name)
        if was != now:
            is_checksum = isinstance(now, str) and len(now) == _CHECKSUM_LENGTH
            different.append(name if is_checksum else f"{name} (was {was}, is {now})")
    if different:
        raise RequestError(
            f"the work folder '{path}' belongs to another run; what differs: "
            f"{', '.join(different)}. Repeat the options of that run, or give another folder."
        )


def describe_run(
    tensors: Iterable[tuple[str, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    config: QuantConfig,
    team: Team = ALONE,
    model_config: ModelConfig | None = None,
) -> dict[str, Any]:
    """What a quantization depends on, by the names that `WorkFolder` uses in its message.

    Args:
        tensors: Parameters and buffers of the float model, by name.
        batches: Calibration batches.
        config: Options.
        team: The processes that share the work.
        model_config: Of the model, where it has one.
    """
    options = {
        f"option {name}": value
        for name, value in dataclasses.asdict(config).items()
        if name not in _LATER_FIELDS
    }
    options["option importance"] = config.token_weights
    return {
        "layout of the folder": LAYOUT,
        "format of packed weights": FORMAT,
        "version of bivlm-edge": code_version(),
        **{f"version of {name}": found for name, found in library_versions().items()},
        "threads of torch": torch.get_num_threads(),
        "processes": team.size,
        "configuration of the model": _hash_config(model_config),
        "weights of the checkpoint": _hash_tensors(tensors),
        "calibration data": _hash_tensors(
            (f"{number}.{name}", tensor)
            for number, batch in enumerate(batches)
            for name, tensor in sorted(batch.items())
        ),
        **options,
    }


def _hash_config(config: ModelConfig | None) -> str | None:
    """Checksum of all values but the folder that the model came from."""
    if config is None:
        return None
    text = json.dumps(_without_path(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_path(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_path(part) for key, part in value.items() if key != "_name_or_path"}


def _hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_weight(prefix: str, weight: QuantizedWeight) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return a weight's plain values, and its arrays under names that begin with `prefix`."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    arrays = {
        f"{prefix}/{name}": value for name, value in fields.items() if isinstance(value, np.ndarray)
    }
    values = {name: value for name, value in fields.items() if not isinstance(value, np.ndarray)}
    return {"kind": type(weight).__name__, **values}, arrays


def unpack_weight(
    prefix: str, values: Mapping[str, Any], arrays: Mapping[str, Array]
) -> QuantizedWeight:
    """Return the weight that `pack_weight` took apart."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name != "kind"
    }
    start = f"{prefix}/"
    fields |= {
        name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)
    }
    return _KINDS[values["kind"]](**fields)
