"""What a layer is to approximate when the layers before it are quantized already."""

from __future__ import annotations

import torch
from torch import Tensor

from bivlm_edge.calibration.moments import InputStatistics, Moments
from bivlm_edge.quant.linalg import inverse_factor, output_energy

_CONSTANT = 2.0**-44  # 1 % of it, the damping, is above the 2^-52 by which float64 moments err


def varies(fit: Moments) -> bool:
    """Whether inputs have moments around their mean that can be told from rounding.

    Of constant inputs nothing definite is left there: any weight does, and the moments around zero
    choose one.
    """
    return bool(fit.around(fit.mean).trace() > _CONSTANT * fit.hessian.trace())


def second_moment(moments: Moments, fit: Moments, is_centred: bool) -> Tensor:
    """E[x x^T] of `moments`, around the mean of `fit` if the layer's bias takes that up."""
    return moments.around(fit.mean) if is_centred else moments.hessian


def target_weight(weight: Tensor, statistics: InputStatistics, is_centred: bool) -> Tensor:
    """The weight that makes of the quantized model's inputs x what `weight` makes of float ones f.

    T = W + s W (E[f x^T] - E[x x^T]) E[x x^T]^-1, the second moment damped: the error of all
    layers before is made good as far as it is linear in x. The step s in 0..1 is the best on
    held-out inputs; 1 if there are none. Arai and Ichikawa, "Quantization Error Propagation",
    2025, propose the target, with a step that the user chooses.

    Args:
        weight: W, float32 (n, k).
        statistics: Of the layer's inputs; without `cross` the target is the weight itself.
        is_centred: Whether the layer's bias takes up the mean error; only where inputs vary.

    Returns:
        T, float32 (n, k).

    Raises:
        IndefiniteError: no damping makes the second moment positive definite.
    """
    fit, held_out = statistics.fit, statistics.held_out
    if fit.cross is None:
        return weight
    wide = weight.double()
    drift = wide @ _drift(fit, fit, is_centred)
    factor = inverse_factor(second_moment(fit, fit, is_centred))
    change = drift @ factor.T @ factor
    step = 1.0
    if held_out is not None:
        wanted = float((change * (wide @ _drift(held_out, fit, is_centred))).sum())
        energy = output_energy(change, second_moment(held_out, fit, is_centred))
        step = min(max(wanted / energy, 0.0), 1.0) if energy > 0 else 0.0
    return (wide + step * change).float()


def _drift(moments: Moments, fit: Moments, is_centred: bool) -> Tensor:
    """E[(f - x) x^T], f and x around their means in `fit` where the bias takes those up."""
    if moments.cross is None or fit.reference_mean is None or moments.reference_mean is None:
        raise ValueError("the moments were collected without a reference.")
    drift = moments.cross - moments.hessian
    if not is_centred:
        return drift
    x, mean = moments.mean, fit.mean
    shift = fit.reference_mean - mean
    return drift - torch.outer(moments.reference_mean - x, mean) - torch.outer(shift, x - mean)
