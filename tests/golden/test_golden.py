"""Format 1 must not change by a byte: stored weights against what is packed and decoded now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bivlm_edge.quant.packed import FORMAT, BinaryWeight

FOLDER = Path(__file__).parent


def _load_regenerate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regenerate", FOLDER / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


regenerate = _load_regenerate()
NAMES = sorted(regenerate.CASES)


def test_every_stored_file_has_its_case() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.npz")) == [
        f"format{FORMAT}_{name}.npz" for name in NAMES
    ]


@pytest.mark.parametrize("name", NAMES)
def test_packing_gives_the_stored_bytes(name: str) -> None:
    stored = np.load(FOLDER / f"format{FORMAT}_{name}.npz")
    weight = regenerate.build(name)
    for part in regenerate.PARTS:
        array = getattr(weight, part)
        assert (array is None) == (part not in stored)
        if array is not None:
            assert array.dtype == stored[part].dtype
            assert array.tobytes() == stored[part].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes_decode_to_the_stored_weight(name: str) -> None:
    stored = np.load(FOLDER / f"format{FORMAT}_{name}.npz")
    n, k = stored["shape"].tolist()
    weight = BinaryWeight(
        n=n,
        k=k,
        plane_columns=tuple(stored["plane_columns"].tolist()),
        codes=stored["codes"],
        coefficients=stored["coefficients"],
        hadamard_block=int(stored["hadamard_block"]),
        signs=stored.get("signs"),
        order=stored.get("order"),
    )
    # float64 transforms of at most 128 terms below 4, rounded to float32 once
    np.testing.assert_allclose(weight.dequantize(), stored["dequantized"], rtol=2e-7, atol=1e-9)
