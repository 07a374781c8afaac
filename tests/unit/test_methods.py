"""The registry, and what every method in it must hold: a new one is tested by existing."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from bivlm_edge.config import METHODS, ExportConfig, QuantConfig
from bivlm_edge.errors import CheckpointError, DataError, RequestError
from bivlm_edge.quant import methods
from bivlm_edge.quant.linalg import output_energy
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer

BASELINES = {"rtn", "gptq", "nbits4", "pb-llm", "billm", "arb-rc", "bivlm-paper"}


def test_methods_are_the_files_of_the_folder() -> None:
    assert BASELINES | {"bivlm-edge"} <= set(methods.names())
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
    assert declared.options == set(getattr(module, "OPTIONS", ()))
    assert declared.options <= {field.name for field in fields(QuantConfig)}
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


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int, rows: int) -> Tensor:
    """E[x x^T] of `rows` inputs with a few loud channels; singular if rows < k."""
    mixed = gaussian(rows, k, seed=1) @ gaussian(k, k, seed=2)
    mixed[:, :3] *= 6
    return (mixed.T @ mixed / rows).double()


def quantize(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
    """The dequantized weight of a layer by any method."""
    bits = methods.declaration(name).bits
    options = LayerOptions(
        bits=bits[0] if bits else 2.5, byte_budget=int(2.5 * weight.numel() / 8), seed=3
    )
    layer = CalibratedLayer("model.layers.7.mlp", weight.clone(), hessian.clone())
    [packed] = methods.load(name).quantize([layer], options)
    assert (packed.n, packed.k) == weight.shape
    assert 0 < getattr(packed, "claimed_bits", packed.true_bits) <= packed.true_bits
    return torch.from_numpy(packed.dequantize())


@pytest.mark.parametrize("name", methods.names())
def test_scaling_the_hessian_changes_nothing(name: str) -> None:
    weight, hessian = gaussian(32, 192), correlated(192, 800)
    expected = quantize(name, weight, hessian)
    for scale in (2.0**-40, 2.0**30):  # powers of two: nothing rounds otherwise
        torch.testing.assert_close(
            quantize(name, weight, hessian * scale), expected, rtol=0, atol=0
        )


@pytest.mark.parametrize("name", methods.names())
def test_layers_with_the_same_input_come_back_in_order(name: str) -> None:
    hessian = correlated(128, 600)
    layers = [CalibratedLayer(f"layer {n}", gaussian(n, 128, seed=n), hessian) for n in (48, 32)]
    bits = methods.declaration(name).bits
    options = LayerOptions(bits=bits[0] if bits else 2.5, byte_budget=int(2.5 * 80 * 128 / 8))
    packed = methods.load(name).quantize(layers, options)
    assert [weight.n for weight in packed] == [48, 32]
    for layer, weight in zip(layers, packed, strict=True):
        error = torch.from_numpy(weight.dequantize()) - layer.weight
        assert output_energy(error, hessian) < 0.5 * output_energy(layer.weight, hessian)


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize(
    ("rows", "k"), [(20, 192), (1, 64), (300, 100)], ids=["few inputs", "one input", "odd width"]
)
def test_singular_hessians_and_odd_widths_are_handled(name: str, rows: int, k: int) -> None:
    weight, hessian = gaussian(32, k), correlated(k, rows)
    rounded = quantize(name, weight, hessian)
    assert torch.isfinite(rounded).all()
    assert output_energy(rounded - weight, hessian) < output_energy(weight, hessian)


@pytest.mark.parametrize("name", methods.names())
def test_zero_rows_and_dead_channels_are_handled(name: str) -> None:
    weight, hessian = gaussian(32, 192), correlated(192, 800)
    weight[5] = 0
    hessian[17] = hessian[:, 17] = 0
    rounded = quantize(name, weight, hessian)
    assert torch.isfinite(rounded).all()
    # Bi-VLM has one scale per group for the layer, and none is 0: 0.126 is the least of five
    assert float(rounded[5].abs().max()) < (0.15 if name == "bivlm-paper" else 1e-6)
    assert output_energy(rounded - weight, hessian) < 0.3 * output_energy(weight, hessian)


@pytest.mark.parametrize("name", methods.names())
def test_a_zero_matrix_and_a_zero_hessian_are_handled(name: str) -> None:
    zeros = torch.zeros(32, 128)
    assert float(quantize(name, zeros, correlated(128, 400)).abs().max()) < 1e-6
    weight = gaussian(32, 128)
    rounded = quantize(name, weight, torch.zeros(128, 128).double())
    assert torch.isfinite(rounded).all()


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_with_the_layer(name: str, value: float) -> None:
    weight, hessian = gaussian(32, 64), correlated(64, 200)
    broken = weight.clone()
    broken[3, 4] = value
    with pytest.raises(CheckpointError, match=r"weight of 'model\.layers\.7\.mlp' holds NaN"):
        quantize(name, broken, hessian)
    hessian[1, 1] = value
    with pytest.raises(DataError, match=r"inputs of 'model\.layers\.7\.mlp' holds NaN"):
        quantize(name, weight, hessian)


@pytest.mark.parametrize("name", methods.names())
def test_more_than_one_run_gives_the_same_weights(name: str) -> None:
    weight, hessian = gaussian(48, 256), correlated(256, 1000)
    assert torch.equal(quantize(name, weight, hessian), quantize(name, weight, hessian))


@pytest.mark.parametrize(
    ("option", "value", "owner"),
    [("grid", "lloyd", "gptq"), ("n_uns", 3, "bivlm-paper"), ("paper_exact", True, "bivlm-paper")],
)
def test_options_that_a_method_does_not_read_are_refused(
    option: str, value: Any, owner: str
) -> None:
    assert getattr(QuantConfig(method=owner, **{option: value}), option) == value
    expected = f"--{option.replace('_', '-')} does not go with --method rtn.*--method {owner}"
    with pytest.raises(RequestError, match=expected):
        QuantConfig(method="rtn", **{option: value})


def test_values_of_options_are_checked() -> None:
    with pytest.raises(RequestError, match=r"--grid 'fine' is not known\. Accepted: minmax, lloyd"):
        QuantConfig(method="gptq", grid="fine")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="--n-uns 7 is outside 1 to 6"):
        QuantConfig(method="bivlm-paper", n_uns=7)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_three_bits_are_compared_but_not_exported(method: str) -> None:
    quant = QuantConfig(method=method, bits=3)
    with pytest.raises(RequestError, match=r"cannot be exported.* Choose 2, 4 or 8"):
        ExportConfig(quant)
