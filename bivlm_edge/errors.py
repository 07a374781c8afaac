"""Errors that a user can fix: each message says what is wrong, what is accepted and what to do."""


class BivlmError(Exception):
    """Base of all errors raised on purpose; commands print the message and exit with `exit_code`.

    Exit codes: 1 a check failed, 2 the request cannot be carried out, 3 an input file is bad.
    """

    exit_code = 2


class RequestError(BivlmError):
    """An option or argument is outside what is accepted."""


class UnsupportedModelError(BivlmError):
    """The checkpoint's architecture, or one of its layers, cannot be handled."""


class CheckpointError(BivlmError):
    """A model folder is missing, incomplete or unreadable."""

    exit_code = 3


class DataError(BivlmError):
    """A data set, image or calibration file is missing or malformed."""

    exit_code = 3


class BundleError(BivlmError):
    """An exported model is incomplete, altered or of a version this build does not read."""

    exit_code = 3


class OpsLibraryError(BivlmError):
    """The operator library is missing or does not fit the installed ONNX Runtime."""


class TuningError(BivlmError):
    """Fine-tuning broke down; the quantized model is as it was before."""

    exit_code = 1


class ValidationError(BivlmError):
    """The exported graph does not compute what the quantized model computes."""

    exit_code = 1


class OutputError(BivlmError):
    """The target cannot be written; nothing was changed there."""
