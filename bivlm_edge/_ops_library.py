"""Where the compiled operator library of this installation lies."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from bivlm_edge.errors import OpsLibraryError

LIBRARY_VARIABLE = "BIVLM_OPS_LIBRARY"
_STEM = "bivlm_custom_ops"


def custom_ops_library() -> str:
    """Return the path for `SessionOptions.register_custom_ops_library`.

    The environment variable BIVLM_OPS_LIBRARY, if set, names the file to use; otherwise it is
    the library that `pip install` of this package compiled.

    Raises:
        OpsLibraryError: There is none, or BIVLM_OPS_LIBRARY names no file.
    """
    if override := os.environ.get(LIBRARY_VARIABLE):
        if not Path(override).is_file():
            raise OpsLibraryError(
                f"{LIBRARY_VARIABLE}='{override}' is not a file. Point it at "
                f"lib{_STEM}.so of a CMake build, or unset it."
            )
        return str(Path(override).resolve())
    for file in _installed_files():
        if file.stem.removeprefix("lib") == _STEM:
            path = Path(str(file.locate()))
            if path.is_file():
                return str(path)
    raise OpsLibraryError(
        f"this installation of bivlm-edge holds no operator library (lib{_STEM}). It was installed "
        "with BIVLM_BUILD_OPS=0 or from a pure-Python wheel: run 'pip install .' in the source "
        "tree with a C++ compiler and CMake, or run the model without it (--no-custom-ops)."
    )


def _installed_files() -> list[metadata.PackagePath]:
    try:
        return metadata.files("bivlm-edge") or []
    except metadata.PackageNotFoundError:  # run from the source tree
        return []
