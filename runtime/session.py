"""A bundle on disk becomes an ONNX Runtime session; what goes wrong becomes a sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_types

from bivlm_edge._ops_library import (
    CUDA_LIBRARY_VARIABLE,
    LIBRARY_VARIABLE,
    cuda_ops_library,
    custom_ops_library,
)
from bivlm_edge.bundle import BundlePaths, Manifest, check_files, read_manifest
from bivlm_edge.errors import BivlmError, BundleError, OpsLibraryError, RequestError
from bivlm_edge.pruning import KEEP_TOKENS, check_fraction, tokens_to_keep
from bivlm_edge.runtime.ort_errors import RUN_ERRORS, OrtError, ort_sentence
from bivlm_edge.runtime.providers import (
    CPU,
    CPU_PROVIDER,
    CUDA,
    check_provider,
    cuda_session,
)

OPS_DOMAIN = "ai.bivlm"
KERNEL_VARIABLE = "BIVLM_FORCE_KERNEL"
HUGE_PAGES_VARIABLE = "BIVLM_HUGE_PAGES"
_FIRST_WITH_OVERLOADS = (1, 27)  # of ONNX Runtime
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_LOG_FATAL = 4  # errors come as exceptions too; once is enough
_ON_CUDA = ("BinaryMatMul", "GatedSiLU", "TokenPrune")  # of the CUDA library


@dataclass(frozen=True, slots=True)
class VlmSession:
    """A loaded model: the graph in ONNX Runtime and what its manifest says.

    Attributes:
        paths: Where its files lie.
        manifest: The contract between exporter and runtime.
        ort: The ONNX Runtime session.
        library: The operator library it runs with; None without one.
        threads: Threads of one operator; None leaves the number to ONNX Runtime.
        cache_dtype: Element type of the KV cache.
        past_names: Inputs of the KV cache, key and value of layer 0, 1, ...
        output_names: logits, kept_indices, then the outputs of the KV cache in the same order.
        prunes: Whether the graph drops image tokens and takes their number, `keep_tokens`.
        keep_tokens: Tokens that a run keeps of each image; None: as many as the export says.
        provider: Where it runs: "cpu" or "cuda".
    """

    paths: BundlePaths
    manifest: Manifest
    ort: ort.InferenceSession
    library: str | None
    threads: int | None
    cache_dtype: type[np.floating[Any]]
    past_names: tuple[str, ...]
    output_names: tuple[str, ...]
    prunes: bool = False
    keep_tokens: int | None = None
    provider: str = CPU

    @property
    def cache_device(self) -> str:
        """Where attention reads the KV cache; ONNX Runtime's for CUDA knows no float32."""
        return CUDA if self.provider == CUDA and self.cache_dtype is np.float16 else CPU

    @property
    def dtype(self) -> type[np.floating[Any]]:
        """Element type of pixel_values and logits."""
        return np.float16 if self.manifest.dtype == "fp16" else np.float32

    def keeping(self, tokens: int | None) -> VlmSession:
        """Return this session with another number of tokens kept of each image; weights are shared.

        Args:
            tokens: 0 drops the image, `manifest.image_tokens` or more keep all of it; None: as the
                export says.

        Raises:
            RequestError: `tokens` is below 0, or the graph does not prune.
        """
        if tokens is not None and tokens < 0:
            raise RequestError(f"{tokens} image tokens cannot be kept. Give 0 or more.")
        if tokens is not None and not self.prunes:
            raise RequestError(
                f"'{self.paths.graph}' was exported without pruning, so that the number of image "
                "tokens cannot be chosen. Export it with --keep-tokens 0.5 (any fraction below 1; "
                "it is only the default)."
            )
        return replace(self, keep_tokens=tokens)

    def keeping_fraction(self, fraction: float | None) -> VlmSession:
        """Return this session with another fraction, in (0, 1], of each image's tokens kept.

        Raises:
            RequestError: `fraction` is outside (0, 1], or the graph does not prune.
        """
        if fraction is None:
            return self
        check_fraction(fraction)
        return self.keeping(tokens_to_keep(fraction, self.manifest.image_tokens))


def load(
    path: Path | str,
    *,
    provider: str = CPU,
    custom_ops: bool = True,
    threads: int | None = None,
    profile_prefix: Path | None = None,
    graph: bytes | None = None,
) -> VlmSession:
    """Open an exported model.

    On the CPU the weights stay in the page cache of `model.onnx.data`, shared between processes;
    only what ONNX Runtime prepacks is copied, and with BIVLM_HUGE_PAGES=1 the codes of
    BinaryMatMul.

    Args:
        path: The `model.onnx`.
        provider: "cpu", or "cuda" for an NVIDIA GPU. What has no kernel there runs on the CPU.
        custom_ops: Run the operators of the library; False runs their fallback, which stock
            ONNX Runtime has too.
        threads: Threads of one operator; None: as many as physical cores.
        profile_prefix: Record the time of every node; `ort.end_profiling()` then writes them to
            a file whose name starts so, and returns the name.
        graph: A changed copy of the model's graph to run in its place, serialized; its external
            data are looked up, and mapped, beside the `model.onnx`.

    Raises:
        BundleError: A file is missing, damaged, of another export, or the graph does not load.
        OpsLibraryError: The library is missing or does not load, the graph needs it, or this ONNX
            Runtime is too old to do without it.
        RequestError: The provider is not known, or not to be had here; threads < 1; or
            BIVLM_FORCE_KERNEL names no kernel of this machine, or BIVLM_HUGE_PAGES asks for what
            this system does not give.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"--threads {threads} is not a number of threads. Give 1 or more.")
    paths = BundlePaths(Path(path))
    manifest = read_manifest(paths)
    check_files(paths, manifest, whole=False)
    check_provider(provider)
    if not custom_ops and manifest.uses_custom_ops and manifest.fallback == "none":
        raise OpsLibraryError(
            f"'{paths.graph}' was exported with --fallback none: its operators exist only in the "
            "library. Run it without --no-custom-ops, or export it with --fallback nbits."
        )
    if provider == CUDA and manifest.uses_custom_ops and manifest.fallback == "none":
        raise OpsLibraryError(
            f"'{paths.graph}' was exported with --fallback none: on CUDA its attention and head "
            "run by the fallback in ONNX Runtime's operators. Export it with --fallback nbits, or "
            "use --provider cpu."
        )
    if not custom_ops and manifest.uses_custom_ops:
        _require_overloads(paths.graph)
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    # Its plan keeps the buffers of one layer for the same ones of the next, all layers long; the
    # arena finds them again as fast (docs/PERFORMANCE.md, Memory).
    options.enable_mem_reuse = False
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    if threads is not None:
        options.intra_op_num_threads = threads
    library = None
    if custom_ops and manifest.uses_custom_ops:
        library = cuda_ops_library() if provider == CUDA else custom_ops_library()
        register_library(options, library)
    if graph is not None:
        options.add_session_config_entry(_DATA_FOLDER, str(paths.graph.absolute().parent))
    session = _create(paths, options, library, graph, provider)
    past_names = tuple(
        f"past_key_values.{layer}.{part}"
        for layer in range(manifest.layers)
        for part in ("key", "value")
    )
    present_names = tuple(name.replace("past_key_values", "present", 1) for name in past_names)
    output_names = ("logits", "kept_indices", *present_names)
    _check_signature(paths, session, past_names, output_names)
    kinds = {value.name: value.type for value in session.get_inputs()}
    cache_dtype = np.float16 if kinds[past_names[0]] == "tensor(float16)" else np.float32
    return VlmSession(
        paths,
        manifest,
        session,
        library,
        threads,
        cache_dtype,
        past_names,
        output_names,
        prunes=KEEP_TOKENS in {node.name for node in session.get_overridable_initializers()},
        provider=provider,
    )


def _require_overloads(graph: Path) -> None:
    """Older versions load the graph, inline one body for all nodes and answer nonsense or fail."""
    version = re.match(r"(\d+)\.(\d+)", ort.__version__)
    if version is not None and tuple(map(int, version.groups())) < _FIRST_WITH_OVERLOADS:
        first = ".".join(map(str, _FIRST_WITH_OVERLOADS))
        raise OpsLibraryError(
            f"ONNX Runtime {ort.__version__} picks the wrong function bodies for the operators of "
            f"'{graph}' (they are told apart by overload, which it ignores), so that it cannot run "
            f"without the library: upgrade to {first} or newer (pip install --upgrade "
            "onnxruntime), or run with the library, without --no-custom-ops."
        )


def register_library(options: ort.SessionOptions, library: str) -> None:
    """Make the operator library known to a session.

    Raises:
        OpsLibraryError: This ONNX Runtime does not take it.
    """
    try:
        options.register_custom_ops_library(library)
    except OrtError as error:
        raise OpsLibraryError(
            f"the operator library '{library}' does not load into ONNX Runtime {ort.__version__}: "
            f"{ort_sentence(error)}. Install it again for this machine and this ONNX Runtime "
            f"('pip install --force-reinstall .' in the source tree, or {LIBRARY_VARIABLE}; for "
            f"--provider cuda {CUDA_LIBRARY_VARIABLE}), or run the model without it "
            "(--no-custom-ops)."
        ) from error


def _create(
    paths: BundlePaths,
    options: ort.SessionOptions,
    library: str | None,
    graph: bytes | None,
    provider: str,
) -> ort.InferenceSession:
    source = str(paths.graph) if graph is None else graph
    if provider == CUDA:
        try:
            return cuda_session(source, options, _ON_CUDA if library is not None else ())
        except RUN_ERRORS as error:
            raise _load_error(paths.graph, error, library) from error
    try:
        return ort.InferenceSession(source, sess_options=options, providers=[CPU_PROVIDER])
    except OrtError as error:
        raise _load_error(paths.graph, error, library) from error


def _load_error(graph: Path, error: Exception, library: str | None) -> BivlmError:
    """Tell the reasons apart that ONNX Runtime gives only as text."""
    text = str(error)
    if KERNEL_VARIABLE in text:
        return RequestError(f"{ort_sentence(error)}. Set {KERNEL_VARIABLE} to one of those.")
    if HUGE_PAGES_VARIABLE in text:
        return RequestError(f"{ort_sentence(error)}.")
    if OPS_DOMAIN in text and library is None:
        return OpsLibraryError(
            f"'{graph}' holds operators of the domain {OPS_DOMAIN} without a fallback in standard "
            f"operators ({ort_sentence(error)}). Run it without --no-custom-ops, or export it "
            "again with --fallback nbits."
        )
    if isinstance(error, ort_types.NotImplemented) or "opset" in text.lower():
        return BundleError(
            f"ONNX Runtime {ort.__version__} lacks an operator of '{graph}': "
            f"{ort_sentence(error)}. Install a newer one: pip install --upgrade onnxruntime."
        )
    if isinstance(error, ort_types.InvalidProtobuf):
        return BundleError(
            f"'{graph}' is not a readable ONNX file ({ort_sentence(error)}). "
            "Copy it again, or export again."
        )
    return BundleError(
        f"ONNX Runtime {ort.__version__} does not load '{graph}': {ort_sentence(error)}. "
        "Export the model again with this version of bivlm-edge."
    )


def _check_signature(
    paths: BundlePaths,
    session: ort.InferenceSession,
    past_names: tuple[str, ...],
    output_names: tuple[str, ...],
) -> None:
    """The names are the contract; shapes are the graph's own business."""
    if "past_length" not in {node.name for node in session.get_overridable_initializers()}:
        raise BundleError(
            f"'{paths.graph}' has no optional input past_length: it is no graph of bivlm-edge, or "
            "was exported before the KV cache was written in place. Export the model again with "
            "this version of bivlm-edge."
        )
    wanted_inputs = {"input_ids", "pixel_values", "position_ids", *past_names}
    missing = wanted_inputs ^ {node.name for node in session.get_inputs()}
    missing |= set(output_names) - {node.name for node in session.get_outputs()}
    if missing:
        raise BundleError(
            f"'{paths.graph}' has other inputs and outputs than its manifest says; they differ in "
            f"{', '.join(sorted(missing))}. Copy all parts of one export together."
        )


def pixel_batch(session: VlmSession, pixels: NDArray[np.float32] | None) -> NDArray[Any]:
    """Return pixel_values for a run: `pixels` [images, 3, H, W] in the model's type, or none."""
    if pixels is None:
        return np.zeros((0, *session.manifest.pixel_shape), dtype=session.dtype)
    return pixels.astype(session.dtype, copy=False)
