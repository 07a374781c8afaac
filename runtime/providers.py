"""Where a graph runs: on the CPU, or on a GPU with all that it takes to be there.

ONNX Runtime itself goes on without a GPU that it cannot use; nothing here does.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from bivlm_edge._ops_library import CUDA_LIBRARY_VARIABLE
from bivlm_edge.errors import OpsLibraryError, RequestError
from bivlm_edge.runtime.ort_errors import RUN_ERRORS, ort_sentence

CPU = "cpu"
CUDA = "cuda"
PROVIDERS = (CPU, CUDA)
CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"  # ONNX Runtime 1.24
_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_INSTEAD = "or use --provider cpu"
_PROBE = bytes.fromhex(  # a model of one node: y[1] = Abs(x[1])
    "080812003a320a0b0a017812017922034162731201675a0f0a0178120a0a0808"
    "0112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)


def check_provider(provider: str) -> None:
    """Refuse a provider that is not known, and CUDA where this machine cannot run it.

    Raises:
        RequestError: The name is neither "cpu" nor "cuda"; or driver, GPU or the CUDA provider of
            ONNX Runtime is missing, and the message says which.
    """
    if provider not in PROVIDERS:
        raise RequestError(
            f"--provider {provider!r} is not known. Accepted: {', '.join(PROVIDERS)}."
        )
    if provider == CPU:
        return
    _check_gpu()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise RequestError(
            f"--provider cuda: this onnxruntime {ort.__version__} was built without "
            f"{CUDA_PROVIDER}. Replace it by one for this CUDA: 'pip uninstall onnxruntime' and "
            f"'pip install onnxruntime-gpu' (for a Jetson see docs/JETSON.md), {_INSTEAD}."
        )
    _check_started()


def _check_gpu() -> None:
    """Ask the driver for a GPU, as ONNX Runtime would."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise RequestError(
            f"--provider cuda: no NVIDIA driver is installed here ({error}). Install the driver of "
            f"the GPU, run the container with the GPU (docker run --gpus all), {_INSTEAD}."
        ) from error
    code = driver.cuInit(0)
    count = ctypes.c_int(0)
    if code == 0:
        code = driver.cuDeviceGetCount(ctypes.byref(count))
    if code == _NO_DEVICE or (code == 0 and count.value == 0):
        raise RequestError(
            "--provider cuda: the NVIDIA driver finds no GPU. See what 'nvidia-smi' shows and "
            f"whether CUDA_VISIBLE_DEVICES hides it, {_INSTEAD}."
        )
    if code != 0:
        raise RequestError(
            f"--provider cuda: the NVIDIA driver does not start (CUDA error {code}). See what "
            f"'nvidia-smi' says; a driver that was just updated needs a restart; {_INSTEAD}."
        )


def _check_started() -> None:
    """Let ONNX Runtime start the provider for the smallest of models, and run it.

    With a real one the reason would be lost: without the provider our operators have no kernel, and
    ONNX Runtime complains of their types; one that was built for other GPUs starts all the same.
    """
    missing = _preload()
    session = _new_session(_PROBE, ort.SessionOptions())
    version = getattr(ort, "cuda_version", "")
    build = f"onnxruntime {ort.__version__}{f' (built for CUDA {version})' if version else ''}"
    if CUDA_PROVIDER not in session.get_providers():
        raise RequestError(
            f"--provider cuda: the {CUDA_PROVIDER} of {build} does not start"
            f"{f': {missing} cannot be loaded' if missing else ''}. Install the CUDA libraries and "
            "cuDNN of that version ('pip install \"onnxruntime-gpu[cuda,cudnn]\"', or the CUDA "
            f"toolkit and its folder in LD_LIBRARY_PATH), {_INSTEAD}."
        )
    try:
        session.run(None, {"x": np.ones(1, np.float32)})
    except RUN_ERRORS as error:
        raise RequestError(
            f"--provider cuda: the {CUDA_PROVIDER} of {build} starts, but runs nothing on this GPU "
            f"({ort_sentence(error)}). Where that says 'no kernel image' it was built for other "
            "GPUs: install a build for this one (for a Jetson see docs/JETSON.md), "
            f"{_INSTEAD}."
        ) from error


def _preload() -> str:
    """Load the CUDA libraries that pip installed, where there are any; name those that failed."""
    preload = getattr(ort, "preload_dlls", None)  # ONNX Runtime 1.21
    if preload is None:
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        preload()
    found = re.findall(r"^Failed to load ([^:\s]+)", output.getvalue(), re.MULTILINE)
    return ", ".join(found)


def _new_session(source: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    wanted = [CUDA_PROVIDER, CPU_PROVIDER]
    # ONNX Runtime's own fallback would go on without the GPU when a run fails
    return ort.InferenceSession(source, sess_options=options, providers=wanted, enable_fallback=0)


def cuda_session(
    source: str | bytes, options: ort.SessionOptions, operators: Sequence[str]
) -> ort.InferenceSession:
    """Create a session on the GPU, for which `check_provider` has found all that it takes.

    Args:
        source: Path of the graph, or the graph serialized.
        options: Of the session; recording where nodes run is switched on.
        operators: Names of the operators that must run on the GPU.

    Raises:
        OpsLibraryError: One of the operators is not on the GPU.
    """
    options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    session = _new_session(source, options)
    _check_assignment(session, operators)
    return session


def _check_assignment(session: ort.InferenceSession, operators: Sequence[str]) -> None:
    """Refuse a session that runs one of these operators on the CPU.

    Versions of ONNX Runtime before 1.24 do not tell where nodes run; nothing is checked then.
    """
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return
    elsewhere = sorted(
        {
            node.op_type
            for part in tell()
            if part.ep_name != CUDA_PROVIDER
            for node in part.get_nodes()
            if node.op_type in operators
        }
    )
    if elsewhere:
        raise OpsLibraryError(
            f"--provider cuda: onnxruntime {ort.__version__} runs {', '.join(elsewhere)} of this "
            "model on the CPU. Build the CUDA operator library of this version of bivlm-edge "
            f"('pip install .' with nvcc, or {CUDA_LIBRARY_VARIABLE}), {_INSTEAD}."
        )
