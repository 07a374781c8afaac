"""What a layer is to approximate when the layers before it are quantized already."""

from __future__ import annotations

import torch
from torch import Tensor

from bivlm_edge.calibration.moments import InputStatistics, Moments
from bivlm_edge.quant.linalg import damped, output_energy

_CONSTANT = 2.0**-14  # 1 % of it, the damping, is above the 2^-24 by which float32 products err


def second_moment(moments: Moments, fit: Moments, is_centred: bool) -> Tensor:
    """E[x x^T] of `moments`, around the mean of `fit` where the layer's bias takes that up.

    Of inputs that are constant up to the rounding of float32 nothing definite is left around the
    mean: any weight does, and the moments around zero choose one.
    """
    return moments.around(fit.mean) if _is_centred(moments, fit, is_centred) else moments.hessian


def _is_centred(moments: Moments, fit: Moments, is_wanted: bool) -> bool:
    if not is_wanted:
        return False
    return bool(moments.around(fit.mean).trace() > _CONSTANT * moments.hessian.trace())


def target_weight(weight: Tensor, statistics: InputStatistics, is_centred: bool) -> Tensor:
    """The weight that makes of the quantized model's inputs x what `weight` makes of float ones f.

    T = W + s W (E[f x^T] - E[x x^T]) E[x x^T]^-1, the second moment damped: the error of all
    layers before is made good as far as it is linear in x. The step s in 0..1 is the best on
    held-out inputs; 1 if there are none. Arai and Ichikawa, "Quantization Error Propagation",
    2025, propose the target, with a step that the user chooses.

    Args:
        weight: W, float32 (n, k).
        statistics: Of the layer's inputs; without `cross` the target is the weight itself.
        is_centred: Whether the layer's bias takes up the mean error.

    Returns:
        T, float32 (n, k).
    """
    fit, held_out = statistics.fit, statistics.held_out
    if fit.cross is None:
        return weight
    wide = weight.double()
    drift = wide @ _drift(fit, fit, is_centred)
    inverse = torch.cholesky_inverse(
        torch.linalg.cholesky(damped(second_moment(fit, fit, is_centred)))
    )
    change = drift @ inverse
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
    if not _is_centred(moments, fit, is_centred):
        return drift
    x, mean = moments.mean, fit.mean
    shift = fit.reference_mean - mean
    return drift - torch.outer(moments.reference_mean - x, mean) - torch.outer(shift, x - mean)
