"""Where a graph runs: on the CPU, or on a GPU with all that it takes to be there.

ONNX Runtime itself goes on without a GPU that it cannot use; nothing here does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import onnxruntime as ort

from bivlm_edge._ops_library import CUDA_LIBRARY_VARIABLE
from bivlm_edge.errors import OpsLibraryError, RequestError

CPU = "cpu"
CUDA = "cuda"
PROVIDERS = (CPU, CUDA)
CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"  # ONNX Runtime 1.24
_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_INSTEAD = "or use --provider cpu"


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


def cuda_session(
    source: str | bytes, options: ort.SessionOptions, operators: Sequence[str]
) -> ort.InferenceSession:
    """Create a session on the GPU, or refuse: ONNX Runtime's own fallback would do without it.

    Args:
        source: Path of the graph, or the graph serialized.
        options: Of the session; recording where nodes run is switched on.
        operators: Names of the operators that must run on the GPU.

    Raises:
        RequestError: ONNX Runtime has not started its CUDA provider.
        OpsLibraryError: One of the operators is not on the GPU.
    """
    options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    session = ort.InferenceSession(
        source,
        sess_options=options,
        providers=[CUDA_PROVIDER, CPU_PROVIDER],
        enable_fallback=0,
    )
    if CUDA_PROVIDER not in session.get_providers():
        raise RequestError(
            f"--provider cuda: the {CUDA_PROVIDER} of onnxruntime {ort.__version__} does not "
            "start; most often libcublas, libcudart or libcudnn of the version that it was built "
            "for is missing. 'python -c \"import onnxruntime; onnxruntime.preload_dlls(); "
            f"onnxruntime.print_debug_info()\"' shows what it finds. Install what is missing, "
            f"{_INSTEAD}."
        )
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
