"""The registry, and what every method in it must hold: a new one is tested by existing."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from bivlm_edge.config import METHODS, QuantConfig
from bivlm_edge.errors import RequestError
from bivlm_edge.quant import methods


def test_methods_are_the_files_of_the_folder() -> None:
    assert {"bivlm-edge", "bivlm-paper", "gptq", "nbits4", "rtn"} <= set(methods.names())
    assert not any(name.startswith("_") for name in methods.names())
    assert (*methods.names(), "none") == METHODS


def test_options_are_checked_without_torch() -> None:
    program = (
        "import sys\n"
        "from bivlm_edge.config import METHODS, QuantConfig\n"
        "for method in METHODS: QuantConfig(method=method)\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-P", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("name", methods.names())
def test_declarations_are_what_the_module_says(name: str) -> None:
    declared = methods.declaration(name)
    module = importlib.import_module(f"bivlm_edge.quant.methods.{name.replace('-', '_')}")
    assert declared.bits == getattr(module, "BITS", ())
    assert declared.bit_range == getattr(module, "BIT_RANGE", None)
    assert declared.exported_bits == getattr(module, "EXPORTED_BITS", declared.bits)
    assert declared.needs == set(getattr(module, "NEEDS", ()))
    assert declared.needs <= set(methods.NEEDS)
    assert set(declared.exported_bits) <= set(declared.bits)
    assert not (declared.bits and declared.bit_range)
    assert module.__doc__


@pytest.mark.parametrize("name", methods.names())
def test_bits_that_a_method_does_not_take_are_refused(name: str) -> None:
    declared = methods.declaration(name)
    if declared.bits:
        with pytest.raises(RequestError, match=rf"--bits 2\.5 does not go with --method {name}"):
            QuantConfig(method=name, bits=2.5)
    elif declared.bit_range:
        for bits in (declared.bit_range[0] - 0.1, declared.bit_range[1] + 0.1):
            with pytest.raises(RequestError, match=f"--bits {bits:g} is outside"):
                QuantConfig(method=name, bits=bits)
    else:
        assert QuantConfig(method=name, bits=2.5).bits == 2.5
