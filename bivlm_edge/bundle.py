"""An exported model on disk: model.onnx, model.onnx.data and model.assets/ with its manifest.

Shared by export (writes) and runtime (reads); needs neither onnx nor torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bivlm_edge.errors import BundleError

BUNDLE_VERSION = 2
PROBE_BLOCKS = 256
PROBE_BLOCK_BYTES = 4096
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
PROMPT = "prompt.json"  # text round a question, for bivlm-device: export/prompt_frame.py
REPORT = "export_report.json"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What identifies one file of the bundle.

    Attributes:
        bytes: Size.
        sha256: Of the whole file.
        probe: SHA-256 of PROBE_BLOCKS evenly spaced blocks, cheap enough for every start.
    """

    bytes: int
    sha256: str
    probe: str


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How a picture becomes pixel_values, in the order of the fields.

    Attributes:
        family: "clip" (resize, center crop), "square" (pad to a square, resize) or "idefics3"
            (resize to tiles).
        resize_mode: "shortest_edge", "exact" or "longest_edge".
        resize: (height, width); for shortest/longest edge both hold the edge.
        resample: PIL resampling filter number.
        crop: (height, width) of the center crop, or None.
        rescale: Factor on the 0..255 values, or None.
        mean: Per channel, subtracted after rescaling (empty: no normalisation).
        std: Per channel, divides after the mean (empty: no normalisation).
        background: square: colour (red, green, blue) of the padding.
        split_tiles: idefics3: cut large pictures into tiles of `crop` size.
    """

    family: str
    resize_mode: str
    resize: tuple[int, int]
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: tuple[int, int, int] | None = None
    split_tiles: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the runtime must know about an exported model.

    Attributes:
        version: BUNDLE_VERSION of the writer.
        name: Name of the source checkpoint.
        family: Model family, e.g. "llava".
        files: Records under the roles "graph" and "data", and where recorded "tokenizer",
            "chat_template" and "prompt".
        data_name: File name of the data as the graph stores it: it cannot be renamed.
        layers: Decoder layers (length of the KV cache).
        kv_heads: Key-value heads per decoder layer.
        head_dim: Width of one head.
        dtype: "fp32" or "fp16": type of pixel_values and logits. That of the KV cache
            is in the graph.
        context_length: Most positions the decoder takes.
        vocab_size: Rows of the logits.
        image_token_id: Placeholder that the prompt repeats `image_tokens` times per image.
        image_token: The placeholder's text.
        image_tokens: Tokens of one image before pruning.
        pixel_shape: (3, H, W) of one image in pixel_values.
        bos_token_id: Prepended to token ids that do not start with it; None: nothing is.
        bos_token: Text of the tokenizer's own token, for the chat template; "" if it has none.
        eos_token: Likewise.
        eos_token_ids: Tokens that end an answer.
        max_new_tokens: Default length of an answer.
        image: Preprocessing.
        image_prompt: Text that one image placeholder of the chat template expands to, with
            `{image}` for the run of placeholders (LLaVA: "{image}").
        uses_custom_ops: Whether the graph holds nodes of the domain `ai.bivlm`.
        fallback: "nbits", "dense" or "none": what the nodes inline to without the library.
        config: The export options.
        image_grid: Rows and columns of an image's tokens where positions have three axes (M-RoPE:
            position_ids is `[3, batch, sequence]`); None where they have one.
        contiguous: Whether the graph closes the gaps in the positions that dropped tokens leave
            (`positions.without_gaps`), so that the next position depends on `kept_indices`.
    """

    version: int
    name: str
    family: str
    files: dict[str, FileRecord]
    data_name: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    context_length: int
    vocab_size: int
    image_token_id: int
    image_token: str
    image_tokens: int
    pixel_shape: tuple[int, int, int]
    bos_token_id: int | None
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int
    image: ImageSpec
    image_prompt: str
    uses_custom_ops: bool
    fallback: str
    config: dict[str, Any] = field(default_factory=dict)
    image_grid: tuple[int, int] | None = None
    contiguous: bool = False


@dataclass(frozen=True, slots=True)
class BundlePaths:
    """Where the parts of a bundle lie, from the path of its graph."""

    graph: Path

    @property
    def data(self) -> Path:
        """The external data: `model.onnx.data`."""
        return self.graph.with_name(self.graph.name + ".data")

    @property
    def assets(self) -> Path:
        """The folder beside the graph: `model.assets`."""
        return self.graph.with_name(self.graph.stem + ".assets")


def file_record(path: Path) -> FileRecord:
    """Return the record of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return FileRecord(path.stat().st_size, digest.hexdigest(), probe(path))


def probe(path: Path) -> str:
    """Return the SHA-256 of up to PROBE_BLOCKS blocks spread over the file, the last included."""
    size = path.stat().st_size
    last = max(0, size - PROBE_BLOCK_BYTES)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for index in range(PROBE_BLOCKS):
            stream.seek(last * index // (PROBE_BLOCKS - 1))
            digest.update(stream.read(PROBE_BLOCK_BYTES))
    return digest.hexdigest()


def write_manifest(manifest: Manifest, assets: Path) -> None:
    """Write the manifest into the assets folder."""
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    (assets / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(paths: BundlePaths) -> Manifest:
    """Read and check the manifest.

    Raises:
        BundleError: A part is missing, the manifest is malformed or of another version.
    """
    if not paths.graph.is_file():
        raise BundleError(
            f"'{paths.graph}' is not there. Give the path of an exported .onnx file; "
            "bivlm-export writes one."
        )
    path = paths.assets / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"'{path}' is missing: it belongs to '{paths.graph.name}' and was written beside it. "
            f"Copy the folder '{paths.assets.name}' next to the .onnx file, or export again."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["version"]
        if version != BUNDLE_VERSION:
            raise BundleError(
                f"'{path}' has bundle version {version}; this build reads {BUNDLE_VERSION}. "
                "Export the model again with this version of bivlm-edge."
            )
        return _manifest_from_json(values)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"'{path}' is not a manifest of bivlm-export ({error!r}). Export the model again."
        ) from error


def _manifest_from_json(values: dict[str, Any]) -> Manifest:
    image = dict(values["image"])
    for key in ("resize", "mean", "std"):
        image[key] = tuple(image[key])
    for key in ("crop", "background"):
        image[key] = tuple(image[key]) if image.get(key) is not None else None
    grid = values.get("image_grid")
    return Manifest(
        **{
            **values,
            "image_grid": None if grid is None else tuple(grid),
            "files": {role: FileRecord(**record) for role, record in values["files"].items()},
            "pixel_shape": tuple(values["pixel_shape"]),
            "eos_token_ids": tuple(values["eos_token_ids"]),
            "image": ImageSpec(**image),
        }
    )


def check_files(paths: BundlePaths, manifest: Manifest, *, whole: bool) -> None:
    """Check that the files are the ones the manifest was written for.

    Args:
        paths: The bundle.
        manifest: Its manifest.
        whole: Compare the SHA-256 of all bytes of graph and data; else only size and probe, which
            touch about 1 MiB of a large file and leave its pages alone. Tokenizer, chat
            template and prompt are small and always compared whole.

    Raises:
        BundleError: A file is missing, renamed, truncated or from another export.
    """
    if "data" in manifest.files and paths.data.name != manifest.data_name:
        raise BundleError(
            f"'{paths.graph}' was exported as '{manifest.data_name.removesuffix('.data')}'; the "
            f"graph looks for its weights under the name '{manifest.data_name}': rename the parts "
            "back, or export again under the new name."
        )
    weights = f"'{paths.graph.name}' keeps its weights there. Copy it next to the .onnx file"
    text = f"it belongs to '{paths.graph.name}'. Copy the whole folder '{paths.assets.name}'"
    for role, path, purpose in (
        ("graph", paths.graph, weights),
        ("data", paths.data, weights),
        ("tokenizer", paths.assets / TOKENIZER, text),
        ("chat_template", paths.assets / CHAT_TEMPLATE, text),
        ("prompt", paths.assets / PROMPT, text),
    ):
        if role not in manifest.files:
            continue
        if not path.is_file():
            raise BundleError(f"'{path}' is missing: {purpose} again, or export again.")
        is_small = path.parent == paths.assets
        _check_file(path, manifest.files[role], whole=whole or is_small)


def _check_file(path: Path, expected: FileRecord, *, whole: bool) -> None:
    size = path.stat().st_size
    if size != expected.bytes:
        raise BundleError(
            f"'{path}' has {size:,} bytes, the manifest says {expected.bytes:,}: it is "
            "truncated or belongs to another export. Copy the file again, or export again."
        )
    is_same = file_record(path) == expected if whole else probe(path) == expected.probe
    if not is_same:
        raise BundleError(
            f"'{path}' does not have the checksum in the manifest: it was changed or belongs "
            "to another export. Copy all three parts of one export together, or export again."
        )
