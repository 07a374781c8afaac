"""Joint row coefficients and LNQ refinement: known optima, descent, and packing of the result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bivlm_edge.config import STAGES
from bivlm_edge.errors import RequestError
from bivlm_edge.quant.allocation import VARIANTS, best_plan
from bivlm_edge.quant.levels import (
    GAUSSIAN_COEFFICIENTS,
    GAUSSIAN_DISTORTION,
    fit_coefficients,
    gaussian_coefficients,
    make_levels,
)
from bivlm_edge.quant.linalg import output_energy
from bivlm_edge.quant.methods.bivlm_edge import quantize, quantize_planes
from bivlm_edge.quant.options import LayerOptions
from bivlm_edge.quant.packed import BinaryWeight, PlaneClass
from bivlm_edge.quant.parallel import solve_in_parts
from bivlm_edge.quant.refine import Assignment, descend, loss, refit
from bivlm_edge.quant.transform import (
    CalibratedLayer,
    StoredProblem,
    Variant,
    transform_problems,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(k: int, seed: int = 0) -> Tensor:
    """Inputs with a falling spectrum in a random basis and a few loud channels."""
    basis = torch.linalg.qr(gaussian(k, k, seed=seed + 100))[0]
    spectrum = torch.arange(1, k + 1).float() ** -0.9
    gains = torch.exp(0.6 * gaussian(k, seed=seed + 200))
    gains[: max(k // 50, 1)] *= 5
    mixed: Tensor = (basis.T * spectrum) @ basis * gains * gains[:, None]
    return mixed


def quantize_one(weight: Tensor, metric: Tensor, bits: float, seed: int = 0) -> BinaryWeight:
    layer = CalibratedLayer("layer", weight, metric)
    [packed] = quantize(
        [layer], LayerOptions(byte_budget=int(bits * weight.numel() / 8), seed=seed)
    )
    return packed


def relative_error(weight: Tensor, packed: BinaryWeight, metric: Tensor) -> float:
    error = output_energy(torch.from_numpy(packed.dequantize()) - weight, metric)
    return error / output_energy(weight, metric)


def error_of(alpha: Tensor, weight: Tensor) -> float:
    levels = make_levels(alpha)
    rounded = levels.values.gather(0, levels.nearest(weight.T)).T
    return float(((rounded - weight) ** 2).mean() / (weight**2).mean())


KNOWN_ERRORS = (0.3634, 0.1175, 0.0369, 0.0114)  # 1 to 4 planes on a unit Gaussian


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("factors", [(1.4, 1.4), (0.75, 0.75), (1.4, 0.7)])
def test_joint_fit_of_a_gaussian_leaves_the_known_error(
    planes: int, factors: tuple[float, ...]
) -> None:
    weight = gaussian(1, 400_000)
    expected = KNOWN_ERRORS[planes - 1]
    start = gaussian_coefficients(weight, planes) * torch.tensor([factors[:planes]])
    assert error_of(start, weight) > 1.1 * expected  # or a fit that does nothing would pass
    assert error_of(fit_coefficients(weight, start), weight) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_joint_fit_keeps_or_lowers_what_gaussian_coefficients_leave(planes: int) -> None:
    weight = gaussian(1, 400_000)
    expected = KNOWN_ERRORS[planes - 1]
    assert GAUSSIAN_DISTORTION[planes] == pytest.approx(expected, rel=0.01)
    start = gaussian_coefficients(weight, planes)
    before = error_of(start, weight)
    after = error_of(fit_coefficients(weight, start), weight)
    assert before == pytest.approx(expected, rel=0.02)  # four planes: 1.8 % above the optimum
    assert after == pytest.approx(expected, rel=0.01)
    assert after <= before
    far = error_of(start * 1.3, weight)
    back = error_of(fit_coefficients(weight, start * 1.3), weight)
    assert back - expected < 0.3 * (far - expected)


def test_two_planes_reach_the_lloyd_max_levels() -> None:
    alpha = fit_coefficients(gaussian(1, 400_000), torch.tensor([[1.4, 0.4]]))
    torch.testing.assert_close(
        alpha, torch.tensor([GAUSSIAN_COEFFICIENTS[1]]), rtol=0.01, atol=0
    )  # sampling error of 400,000 draws


def test_rows_of_zeros_and_constants_are_fitted() -> None:
    weight = torch.stack([torch.zeros(64), torch.full((64,), -0.25)])
    alpha = fit_coefficients(weight, gaussian_coefficients(weight, 2))
    assert torch.isfinite(alpha).all()
    levels = make_levels(alpha)
    rounded = levels.values.gather(0, levels.nearest(weight.T)).T
    torch.testing.assert_close(rounded, weight, rtol=0, atol=1e-6)  # the ridge of solve_rows


def test_nearest_is_the_level_of_least_distance() -> None:
    levels = make_levels(gaussian(7, 3))
    targets = gaussian(50, 7, seed=1)
    distance = (targets[:, None, :] - levels.values).abs()
    chosen = levels.values.gather(0, levels.nearest(targets))
    torch.testing.assert_close((targets - chosen).abs(), distance.amin(dim=1), rtol=0, atol=0)


def random_assignment(k: int, n: int, seed: int = 0) -> Assignment:
    classes = [PlaneClass(3, 0, 64, 0), PlaneClass(1, 64, k, 3)]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 8, (k, n), generator=generator).to(torch.uint8)
    codes[64:] &= 1
    return Assignment(classes, codes, gaussian(n, 4, seed=seed).abs())


def test_refit_and_descent_never_raise_the_hessian_loss() -> None:
    k, n = 150, 40
    weight_t, metric = gaussian(k, n), hessian(k)
    assignment = random_assignment(k, n)
    losses = [loss(assignment.values(), weight_t, metric)]
    for _ in range(3):
        assignment.alpha = refit(assignment, weight_t, metric)
        losses.append(loss(assignment.values(), weight_t, metric))
        for _ in range(2):
            descend(assignment, weight_t, metric, 1)
            losses.append(loss(assignment.values(), weight_t, metric))
    assert losses[-1] < 0.5 * losses[0]
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-5)  # float32 sums over k columns


def test_descent_ends_where_no_single_change_helps() -> None:
    k, n = 70, 5
    weight_t, metric = gaussian(k, n), hessian(k).double()
    assignment = random_assignment(k, n)
    assignment.alpha = assignment.alpha.double()
    descend(assignment, weight_t.double(), metric, 100)
    best = loss(assignment.values(), weight_t, metric)
    for j in range(k):
        for code in range(8 if j < 64 else 2):
            before = assignment.codes[j].clone()
            assignment.codes[j] = code
            changed = assignment.values() - weight_t
            per_row = ((metric @ changed) * changed).sum(dim=0)
            assignment.codes[j] = before
            kept = assignment.values() - weight_t
            assert (per_row >= ((metric @ kept) * kept).sum(dim=0) - 1e-9 * best).all()


def test_refit_solves_the_normal_equations() -> None:
    k, n = 100, 6
    weight_t, metric = gaussian(k, n), hessian(k)
    assignment = random_assignment(k, n)
    assignment.alpha = refit(assignment, weight_t, metric)
    least = loss(assignment.values(), weight_t, metric)
    for slot in range(4):
        for change in (-1e-3, 1e-3):
            moved = assignment.alpha.clone()
            moved[:, slot] += change
            other = Assignment(assignment.classes, assignment.codes, moved)
            assert loss(other.values(), weight_t, metric) > least


def problem_and_weight(n: int, k: int, variant: Variant) -> tuple[StoredProblem, Tensor, Tensor]:
    weight, metric = gaussian(n, k, seed=3) * 0.05, hessian(k, seed=4)
    [problem] = transform_problems([CalibratedLayer("layer", weight, metric)], variant, seed=9)
    return problem, weight, metric


def decoded(packed: BinaryWeight, problem: StoredProblem) -> Tensor:
    """The packed weight in the columns of `problem`, (columns, n)."""
    stored = torch.from_numpy(packed.decode().T.copy())
    if len(set(packed.plane_columns)) == 1:
        stored = stored[torch.from_numpy(problem.permutation)]
    return stored[: len(problem.weight_t)]


@pytest.mark.parametrize(
    ("n", "k", "variant", "bits"),
    [
        (17, 64, Variant(64, "chunks"), 3.0),
        (32, 100, Variant(64, "chunks"), 2.9),
        (32, 256, Variant(128, "chunks"), 2.0),
        (33, 192, Variant(0, "columns"), 2.9),
        (48, 130, Variant(0, "columns"), 3.2),
        (48, 130, Variant(0, "columns"), 1.9),
        (48, 200, Variant(0, "chunks"), 2.2),
    ],
)
def test_packed_weight_is_what_the_transformed_problem_was_rounded_to(
    n: int, k: int, variant: Variant, bits: float
) -> None:
    problem, weight, metric = problem_and_weight(n, k, variant)
    plan = best_plan([problem], int(bits * n * k / 8))
    assert plan is not None
    packed = quantize_planes(problem, plan)
    assert packed.nbytes == plan.nbytes
    assert packed.nbytes * 8 <= bits * n * k
    error = relative_error(weight, packed, metric)
    assert error < 0.2  # one plane leaves at most 0.3634 of a Gaussian, before compensation
    # the same error, computed in the stored coordinates
    stored = decoded(packed, problem)
    undamped = problem.hessian - 0.01 * torch.eye(len(problem.hessian))
    in_stored = loss(stored, problem.weight_t, undamped) / loss(
        torch.zeros_like(stored), problem.weight_t, undamped
    )
    assert error == pytest.approx(in_stored, rel=1e-3)  # float32 Hessian of the problem


def test_rows_solved_by_several_threads_are_those_of_one() -> None:
    problem, _, _ = problem_and_weight(150, 192, Variant(64, "chunks"))
    plan = best_plan([problem], int(2.2 * 150 * 192 / 8))
    assert plan is not None
    solved: list[tuple[int, int]] = []

    def solve(part: StoredProblem) -> BinaryWeight:
        solved.append((part.n, torch.get_num_threads()))
        return quantize_planes(part, plan)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = solve_in_parts(problem, solve)
        assert sorted(solved) == [(70, 1), (80, 1)]  # 5 panels of 16 rows each, the last one short
        with ThreadPoolExecutor(1) as later:  # new threads take torch's number, not this one's
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
    expected = quantize_planes(problem, plan)
    assert found.n == expected.n == 150
    assert found.codes.tobytes() == expected.codes.tobytes()
    assert found.coefficients.tobytes() == expected.coefficients.tobytes()


def test_budget_is_kept_and_a_budget_below_one_plane_is_refused() -> None:
    weight, metric = gaussian(64, 256), hessian(256)
    for bits in (1.1, 1.7, 2.0, 3.3):
        packed = quantize_one(weight, metric, bits=bits)
        assert packed.true_bits <= bits
    with pytest.raises(RequestError, match=r"'layer' \(64 x 256\) .* one plane needs 2176"):
        quantize_one(weight, metric, bits=1.0)


def siblings(rows: tuple[int, ...], k: int = 256) -> list[CalibratedLayer]:
    """Layers on one input whose tokens they weigh differently."""
    return [
        CalibratedLayer(
            f"layer {i}",
            gaussian(n, k, seed=i) * 3**i,
            hessian(k) + 0.1 * hessian(k, seed=i),
        )
        for i, n in enumerate(rows)
    ]


@pytest.mark.parametrize(("rows", "shares_bytes"), [((64, 32, 24), True), ((24, 64), False)])
@pytest.mark.parametrize("bits", [1.6, 2.3])
def test_layers_of_one_input_share_all_but_rows_and_keep_one_budget(
    rows: tuple[int, ...], shares_bytes: bool, bits: float
) -> None:
    budget = int(bits * sum(rows) * 256 / 8)
    packed = quantize(siblings(rows), LayerOptions(byte_budget=budget, seed=4))
    first = packed[0]
    assert [weight.n for weight in packed] == list(rows)
    for weight in packed:
        assert weight.plane_columns == first.plane_columns
        assert weight.hadamard_block == first.hadamard_block
        for mine, other in ((weight.signs, first.signs), (weight.order, first.order)):
            assert (mine is None) == (other is None)
            assert mine is None or other is None or mine.tobytes() == other.tobytes()
    spent = sum(weight.nbytes for weight in packed)
    if shares_bytes:  # 24 rows at the end fill up the last panel of the stack
        spent -= sum(weight.transform_bytes for weight in packed[1:])
    assert 0.9 * budget < spent <= budget


def test_a_shared_plan_costs_little_where_inputs_weigh_alike() -> None:
    layers = siblings((64, 32, 32))
    options = LayerOptions(byte_budget=int(2.0 * 128 * 256 / 8), seed=4)
    together = quantize(layers, options)
    for layer, weight in zip(layers, together, strict=True):
        alone = quantize_one(layer.weight, layer.hessian, bits=2.0, seed=4)
        shared = relative_error(layer.weight, weight, layer.hessian)
        assert shared < 1.15 * relative_error(layer.weight, alone, layer.hessian)


def test_the_louder_layer_decides_the_order_of_the_columns() -> None:
    first, second = gaussian(32, 128), gaussian(32, 128, seed=1)
    first[:, :64] *= 10  # salient in the first layer, the other half in the second
    second[:, 64:] *= 10
    for loud, expected in ((first, first), (second, second)):
        layers = [
            CalibratedLayer("layer", weight, torch.eye(128) * (100.0 if weight is loud else 1.0))
            for weight in (first, second)
        ]
        problems = transform_problems(layers, Variant(0, "columns"), seed=0)
        half = 0 if expected is first else 64
        for problem in problems:
            assert problem.order is not None
            assert sorted(problem.order[:64].tolist()) == list(range(half, half + 64))


def test_the_variant_of_least_error_on_held_out_inputs_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Judged by the negative of what it was fitted to, the worst after one round wins."""
    monkeypatch.setattr("bivlm_edge.quant.methods.bivlm_edge._WORTH_TRYING", float("inf"))
    layers = [replace(layer, held_out=-layer.hessian) for layer in siblings((64, 48), k=128)]
    budget = int(2.2 * 112 * 128 / 8)
    chosen = quantize(layers, LayerOptions(byte_budget=budget))

    def error(weights: list[BinaryWeight]) -> float:
        return sum(
            output_energy(torch.from_numpy(weight.dequantize()) - layer.weight, layer.hessian)
            for layer, weight in zip(layers, weights, strict=True)
        )

    errors = []
    for variant in VARIANTS:
        problems = transform_problems(layers, variant, seed=0)
        plan = best_plan(problems, budget)
        assert plan is not None
        tried, final = (
            error([quantize_planes(problem, plan, rounds=rounds) for problem in problems])
            for rounds in (1, 4)
        )
        errors.append((tried, final))
    assert error(chosen) == pytest.approx(max(errors)[1], rel=1e-12)
    assert max(errors)[0] > 1.01 * min(errors)[0]


def test_more_bits_leave_less_error() -> None:
    weight, metric = gaussian(64, 256), hessian(256)
    errors = [
        relative_error(weight, quantize_one(weight, metric, bits), metric)
        for bits in (1.2, 2.0, 2.6, 4.0)
    ]
    assert errors == sorted(errors, reverse=True)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    weight, metric = gaussian(32, 192), hessian(192)
    first, again, other = (quantize_one(weight, metric, bits=2.2, seed=seed) for seed in (1, 1, 2))
    assert first.codes.tobytes() == again.codes.tobytes()
    assert first.coefficients.tobytes() == again.coefficients.tobytes()
    if first.hadamard_block:
        assert first.codes.tobytes() != other.codes.tobytes()


def test_scaling_the_hessian_changes_nothing() -> None:
    weight, metric = gaussian(32, 192), hessian(192)
    first = quantize_one(weight, metric, bits=2.2)
    scaled = quantize_one(weight, metric * 1024, bits=2.2)
    assert first.codes.tobytes() == scaled.codes.tobytes()
    assert first.coefficients.tobytes() == scaled.coefficients.tobytes()


def test_inputs_that_are_always_zero_are_survived() -> None:
    weight = gaussian(32, 128)
    packed = quantize_one(weight, torch.zeros(128, 128), bits=2.5)
    assert torch.isfinite(torch.from_numpy(packed.dequantize())).all()


@pytest.mark.parametrize("others", [(), ("hadamard",)])
def test_without_prefix_columns_stay_and_differ_by_one_plane_at_most(
    others: tuple[str, ...],
) -> None:
    layers = siblings((64, 48), k=512)
    for bits in (1.4, 1.8, 2.3):
        budget = int(bits * 112 * 512 / 8)
        [ordered, _] = quantize(layers, LayerOptions(byte_budget=budget, without=others))
        assert ordered.order is not None
        without = ("prefix", *others)
        packed = quantize(layers, LayerOptions(byte_budget=budget, without=without))
        for weight in packed:
            assert weight.order is None
            assert sum(width < 512 for width in weight.plane_columns) <= 1
            assert not (others and weight.hadamard_block)
        assert sum(weight.nbytes for weight in packed) <= budget


def test_without_refit_or_descent_the_hessian_loss_is_larger() -> None:
    layers = siblings((64, 48), k=256)
    budget = int(2.0 * 112 * 256 / 8)

    def error(*without: str) -> float:
        options = LayerOptions(byte_budget=budget, without=("hadamard", *without))
        weights = quantize(layers, options)
        return sum(
            output_energy(torch.from_numpy(weight.dequantize()) - layer.weight, layer.hessian)
            for layer, weight in zip(layers, weights, strict=True)
        )

    complete = error()
    for stage in ("joint-fit", "compensation", "refit", "descent", "act-order"):
        assert error(stage) > complete, stage


def test_without_joint_fit_and_compensation_rounding_is_to_the_levels_of_a_gaussian() -> None:
    [problem] = transform_problems(siblings((48,)), Variant(0, "none"), seed=0)
    plan = best_plan([problem], int(2.2 * 48 * 256 / 8))
    assert plan is not None
    assert plan.plane_columns == (256, 256)

    def rounded(*without: str) -> Tensor:
        packed = quantize_planes(problem, plan, without=("refit", "descent", *without))
        return decoded(packed, problem)

    weights = torch.empty(256)
    weights[problem.visit] = (1 / problem.factor.diagonal()).float()
    start = gaussian_coefficients(problem.weight_t.T, 2, weights)
    stored = make_levels(start.half().float()).values
    nearest = stored.gather(0, make_levels(start).nearest(problem.weight_t))
    assert torch.equal(rounded("joint-fit", "compensation"), nearest)
    compensated = rounded("joint-fit")
    assert not torch.equal(compensated, nearest)
    assert torch.equal(compensated.amax(dim=0), stored[-1])
    assert not torch.equal(rounded("compensation").amax(dim=0), stored[-1])


def test_budget_is_never_exceeded_whatever_the_shape() -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(12):
        n, k = (int(x) for x in torch.randint(1, 300, (2,), generator=generator))
        bits = 1.0 + 3.0 * float(torch.rand(1, generator=generator))
        off = tuple(s for s in STAGES if float(torch.rand(1, generator=generator)) < 0.3)
        budget = int(bits * n * k / 8)
        layer = CalibratedLayer("layer", gaussian(n, k), hessian(k))
        try:
            [packed] = quantize([layer], LayerOptions(byte_budget=budget, without=off))
        except RequestError as refusal:
            least = int(str(refusal).split("one plane needs ")[1].split(".")[0])
            assert least > budget
        else:
            assert packed.nbytes <= budget
            assert packed.dequantize().shape == (n, k)


def test_dead_channels_zero_rows_and_singular_hessians_are_survived() -> None:
    weight, metric = gaussian(40, 192), hessian(192)
    weight[3] = 0
    metric[:, 70:100] = 0
    metric[70:100] = 0
    rank_one = torch.outer(torch.ones(192), torch.ones(192))
    for singular in (metric, rank_one):
        packed = quantize_one(weight, singular, bits=2.3)
        rounded = torch.from_numpy(packed.dequantize())
        assert torch.isfinite(rounded).all()
        assert relative_error(weight, packed, singular) < 0.2
        assert output_energy(rounded[3:4], singular) < 1e-3 * output_energy(weight, singular) / 40
