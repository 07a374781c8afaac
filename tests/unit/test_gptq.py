"""Affine baselines: round to nearest, GPTQ, and the factors they share with the planes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from bivlm_edge.quant import methods
from bivlm_edge.quant.linalg import (
    IndefiniteError,
    compensate,
    damped,
    inverse_factor,
    output_energy,
)
from bivlm_edge.quant.methods import gptq, rtn
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.transform import CalibratedLayer
from bivlm_edge.quant.weights import DenseWeight, GroupWeight


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantize(
    method: methods.Method, weight: Tensor, hessian: Tensor, options: LayerOptions
) -> GroupWeight:
    [packed] = method.quantize([CalibratedLayer("layer", weight, hessian)], options)
    assert isinstance(packed, GroupWeight)
    return packed


def correlated(k: int, seed: int = 0) -> Tensor:
    mixed = gaussian(4 * k, k, seed=seed) @ gaussian(k, k, seed=seed + 1)
    return mixed.T @ mixed / len(mixed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [64, 192, 256, 100])
def test_gptq_with_identity_hessian_is_rounding_to_nearest(bits: int, k: int) -> None:
    weight = gaussian(9, k)
    options = LayerOptions(bits=bits)
    plain = quantize(rtn, weight, torch.eye(k), options)
    compensated = quantize(gptq, weight, torch.eye(k), options)
    np.testing.assert_array_equal(plain.codes, compensated.codes)
    np.testing.assert_array_equal(plain.scale, compensated.scale)
    np.testing.assert_array_equal(plain.zero, compensated.zero)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_on_correlated_inputs(bits: int) -> None:
    weight, hessian = gaussian(40, 300), correlated(300)
    errors = [
        output_energy(torch.from_numpy(packed.dequantize()) - weight, hessian)
        for method in (rtn, gptq)
        for packed in [quantize(method, weight, hessian, LayerOptions(bits=bits))]
    ]
    assert errors[1] < 0.7 * errors[0]


def test_gptq_is_the_sequential_definition() -> None:
    """Against optimal brain surgery step by step: explicit inverses, no Cholesky, no blocks."""
    weight, hessian = gaussian(3, 32, seed=5), correlated(32, seed=6)
    options = LayerOptions(bits=2, group=32)
    scale, zero = rtn.affine_grid(weight, 2, 32)
    regular = damped(hessian)
    rest = weight.double()
    expected = torch.empty(3, 32)
    left = sorted(range(32), key=lambda j: -float(hessian[j, j]))
    while left:
        j = left[0]
        inverse = torch.linalg.inv(regular[left][:, left])
        code = (rest[:, j] / scale[:, 0] + zero[:, 0]).round().clamp(0, 3)
        expected[:, j] = code.float()
        error = rest[:, j] - scale[:, 0] * (code - zero[:, 0])
        rest[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
        left = left[1:]
    found = quantize(gptq, weight, hessian, options)
    np.testing.assert_array_equal(found.codes[:, :32], expected.numpy())


def test_rtn_rounds_by_the_formula_and_keeps_zero_exact() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.4, 2.0] + [0.0] * 28])
    packed = quantize(rtn, weight, torch.eye(32), LayerOptions(bits=2, group=32))
    # span 3 over 3 steps: scale 1, zero round(1 / 1) = 1
    assert packed.scale.tolist() == [[1.0]]
    assert packed.zero.tolist() == [[1]]
    assert packed.codes[0, :4].tolist() == [0, 1, 1, 3]
    assert packed.dequantize()[0, :4].tolist() == [-1.0, 0.0, 0.0, 2.0]


def test_true_bits_count_scales_and_packed_zeros() -> None:
    packed = quantize(rtn, gaussian(8, 256), torch.eye(256), LayerOptions(bits=2))
    assert packed.group == 128
    # 2 groups: two float16 scales, two 2-bit zeros in one byte
    assert packed.true_bits == 8 * (64 + 4 + 1) / 256
    assert packed.nbytes == 8 * 69


@pytest.mark.parametrize(("k", "group"), [(256, 128), (192, 64), (96, 32), (100, 32)])
def test_group_is_the_largest_that_divides_the_width(k: int, group: int) -> None:
    packed = quantize(rtn, gaussian(2, k), torch.eye(k), LayerOptions(bits=4))
    assert packed.group == group
    assert packed.codes.shape == (2, -(-k // group) * group)
    assert packed.dequantize().shape == (2, k)


def test_group_weight_refuses_parts_that_disagree() -> None:
    good = quantize(rtn, gaussian(2, 64), torch.eye(64), LayerOptions(bits=2))
    for changes, words in (
        ({"bits": 5}, "bits 5"),
        ({"group": 48}, "group 48"),
        ({"codes": good.codes[:, :32]}, "codes is uint8"),
        ({"zero": good.zero + np.uint8(4)}, "exceeds 3"),
        ({"scale": np.full_like(good.scale, np.nan)}, "NaN"),
    ):
        parts = {name: getattr(good, name) for name in GroupWeight.__slots__} | changes
        with pytest.raises(ValueError, match=words):
            GroupWeight(**parts)


def test_dense_weight_counts_its_formula() -> None:
    dense = DenseWeight(np.zeros((4, 10), np.float32), claimed_bits=1.1, true_bits=3.3)
    assert (dense.n, dense.k, dense.nbytes) == (4, 10, 17)  # 132 bits


def test_factor_squares_to_the_damped_inverse() -> None:
    hessian = correlated(50)
    upper = inverse_factor(hessian)
    product = upper.T @ upper @ damped(hessian)
    torch.testing.assert_close(product, torch.eye(50).double(), rtol=0, atol=1e-8)
    assert torch.equal(upper, upper.triu())


def test_damping_grows_with_a_log_line_until_the_factorization_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    matrix = torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = 1.05  # eigenvalue -0.05
    with caplog.at_level(logging.WARNING):
        upper = inverse_factor(matrix)
    assert "a Hessian: Cholesky failed with damping 0.01, trying 0.1" in caplog.text
    expected = torch.linalg.inv(damped(matrix, 0.1))
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-9, atol=1e-9)


def test_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(IndefiniteError, match="not positive definite"):
        inverse_factor(torch.full((2, 2), torch.nan))


def test_dead_inputs_round_to_zero() -> None:
    hessian = correlated(64)
    hessian[5] = hessian[:, 5] = 0
    packed = quantize(gptq, gaussian(4, 64), hessian, LayerOptions(bits=2))
    assert (packed.dequantize()[:, 5] == 0).all()


def test_dead_inputs_widen_no_grid() -> None:
    weight, hessian = gaussian(4, 64), correlated(64)
    hessian[5] = hessian[:, 5] = 0
    without = weight.clone()
    without[:, 5] = 0
    weight[:, 5] = 100
    options = LayerOptions(bits=2)
    found, expected = (quantize(gptq, w, hessian, options) for w in (weight, without))
    np.testing.assert_array_equal(found.dequantize(), expected.dequantize())


def test_three_bits_count_packed_codes_scales_and_zeros() -> None:
    packed = quantize(rtn, gaussian(8, 256), torch.eye(256), LayerOptions(bits=3))
    # per row 256 codes of 3 bits, two float16 scales, two 3-bit zeros in one byte
    assert packed.nbytes == 8 * (96 + 4 + 1)
    assert packed.codes.max() == 7


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.3634), (2, 0.1175), (3, 0.03454)])
def test_lloyd_levels_of_a_gaussian_leave_the_known_error(bits: int, expected: float) -> None:
    weight = gaussian(8, 20000)
    levels = gptq.lloyd_levels(weight, torch.ones(20000), 2**bits)
    nearest = (weight[:, :, None] - levels[:, None]).abs().amin(dim=2)
    assert float(nearest.square().mean()) == pytest.approx(expected, rel=0.01)


def test_lloyd_levels_are_weighted_means_of_what_is_nearest_to_them() -> None:
    weight, costs = gaussian(3, 200), gaussian(200, seed=1).exp()
    levels = gptq.lloyd_levels(weight, costs, 4)
    nearest = (weight[:, :, None] - levels[:, None]).abs().argmin(dim=2)
    for row in range(3):
        for index in range(4):
            members = nearest[row] == index
            mean = (weight[row] * costs)[members].sum() / costs[members].sum()
            assert float(levels[row, index]) == pytest.approx(float(mean), rel=1e-4)


def on_lloyd(weight: Tensor, hessian: Tensor, bits: int) -> DenseWeight:
    layer = CalibratedLayer("layer", weight, hessian)
    [packed] = gptq.quantize([layer], LayerOptions(bits=bits, grid="lloyd"))
    assert isinstance(packed, DenseWeight)
    return packed


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lloyd_grid_with_identity_hessian_takes_the_nearest_level(bits: int) -> None:
    weight = gaussian(5, 300)
    packed = on_lloyd(weight, torch.eye(300), bits)
    levels = gptq.lloyd_levels(weight, torch.ones(300), 2**bits).half().float()
    places = (weight[:, :, None] - levels[:, None]).abs().argmin(dim=2)
    np.testing.assert_array_equal(packed.dequantize(), levels.gather(1, places).numpy())
    assert packed.true_bits == bits + 16 * 2**bits / 300
    assert packed.claimed_bits == bits


def test_lloyd_grid_beats_the_affine_one_with_fewer_bits() -> None:
    weight, hessian = gaussian(40, 512), correlated(512)
    affine = quantize(gptq, weight, hessian, LayerOptions(bits=2))
    lloyd = on_lloyd(weight, hessian, 2)
    errors = [
        output_energy(torch.from_numpy(packed.dequantize()) - weight, hessian)
        for packed in (affine, lloyd)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert lloyd.true_bits < affine.true_bits


def test_compensation_across_blocks_is_that_of_one_block() -> None:
    weight_t, hessian = gaussian(200, 3), correlated(200)
    factor = inverse_factor(hessian)
    found = compensate(weight_t, factor, lambda _, column: column.round())
    rest, expected = weight_t.double(), torch.empty(200, 3)
    for j in range(200):
        expected[j] = rest[j].round()
        rest[j:] -= torch.outer(factor[j, j:] / factor[j, j], rest[j] - rest[j].round())
    # a value within float32 noise of a tie may round the other way
    assert (found == expected).float().mean() > 0.99
