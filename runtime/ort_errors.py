"""What ONNX Runtime raises, and the sentence in it."""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

# All that InferenceSession and register_custom_ops_library raise; they share no base but Exception.
# Only names that every supported ONNX Runtime has.
OrtError = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
RUN_ERRORS = (*OrtError, RuntimeError)  # run_with_iobinding wraps them all in the latter


def ort_sentence(error: Exception) -> str:
    """The first line of an ONNX Runtime message, without its error-code prefix."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text.removeprefix("Error in execution: ")
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text.strip().rstrip(".")
