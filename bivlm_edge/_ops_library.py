"""Where the compiled operator libraries of this installation lie."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from bivlm_edge.errors import OpsLibraryError

LIBRARY_VARIABLE = "BIVLM_OPS_LIBRARY"
CUDA_LIBRARY_VARIABLE = "BIVLM_CUDA_OPS_LIBRARY"
_STEM = "bivlm_custom_ops"
_CUDA_STEM = "bivlm_custom_ops_cuda"


def custom_ops_library() -> str:
    """Return the path for `SessionOptions.register_custom_ops_library`.

    The environment variable BIVLM_OPS_LIBRARY, if set, names the file to use; otherwise it is
    the library that `pip install` of this package compiled.

    Raises:
        OpsLibraryError: There is none, or BIVLM_OPS_LIBRARY names no file.
    """
    library = _library(LIBRARY_VARIABLE, _STEM)
    if library is None:
        raise OpsLibraryError(
            f"this installation of bivlm-edge holds no operator library (lib{_STEM}). It was "
            "installed with BIVLM_BUILD_OPS=0 or from a pure-Python wheel: run 'pip install .' in "
            "the source tree with a C++ compiler and CMake, or run the model without it "
            "(--no-custom-ops)."
        )
    return library


def cuda_ops_library() -> str:
    """Return the path of the library for CUDA, which takes the place of the other one.

    It is registered alone: ONNX Runtime takes one library per domain ("Domain already set in
    registry"). BIVLM_CUDA_OPS_LIBRARY, if set, names the file to use.

    Raises:
        OpsLibraryError: There is none, or BIVLM_CUDA_OPS_LIBRARY names no file.
    """
    library = _library(CUDA_LIBRARY_VARIABLE, _CUDA_STEM)
    if library is None:
        raise OpsLibraryError(
            f"this installation of bivlm-edge holds no CUDA operator library (lib{_CUDA_STEM}): it "
            "was installed without nvcc or with BIVLM_CUDA=OFF. Install the CUDA toolkit, put its "
            "nvcc on PATH or name it by CUDACXX, and run 'pip install .' in the source tree again, "
            "with BIVLM_CUDA=ON so that it fails where nvcc does not work "
            "(--config-settings=cmake.define.BIVLM_CUDA=ON); or name a build of the library with "
            f"{CUDA_LIBRARY_VARIABLE}, or use --provider cpu."
        )
    return library


def _library(variable: str, stem: str) -> str | None:
    """The file that the variable names, else the installed one, if there is any."""
    if override := os.environ.get(variable):
        if not Path(override).is_file():
            raise OpsLibraryError(
                f"{variable}='{override}' is not a file. Point it at lib{stem}.so of a CMake "
                "build, or unset it."
            )
        return str(Path(override).resolve())
    for file in _installed_files():
        if file.stem.removeprefix("lib") == stem:
            path = Path(str(file.locate()))
            if path.is_file():
                return str(path)
    return None


def _installed_files() -> list[metadata.PackagePath]:
    try:
        return metadata.files("bivlm-edge") or []
    except metadata.PackageNotFoundError:  # run from the source tree
        return []
