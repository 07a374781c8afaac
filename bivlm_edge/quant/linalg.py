"""Factors of a damped Hessian, the compensated column loop built on them, and the error measure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DAMPING = 0.01
_MAX_DAMPING = 1e3
_BLOCK = 128
_SUBJECT: ContextVar[str] = ContextVar("_SUBJECT", default="a Hessian")


class IndefiniteError(ValueError):
    """A Hessian that no damping makes positive definite; the message does not know the layer."""


@contextmanager
def concerning(subject: str) -> Iterator[None]:
    """Inside, log lines of `inverse_factor` begin with `subject`."""
    token = _SUBJECT.set(subject)
    try:
        yield
    finally:
        _SUBJECT.reset(token)


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian plus `damping` times its mean diagonal: float64 (k, k).

    An all-zero Hessian (inputs that are always zero) becomes the identity.
    """
    matrix = hessian.double()
    mean = float(matrix.diagonal().mean())
    if mean <= 0.0:
        return torch.eye(len(matrix), dtype=torch.float64)
    return matrix + torch.eye(len(matrix), dtype=torch.float64) * (damping * mean)


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1: float64 (k, k).

    Damping grows tenfold, with a log line, until the factorization succeeds.

    Raises:
        IndefiniteError: no damping helps, as of a Hessian that is not finite.
    """
    used = damping
    while used <= _MAX_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, used))
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper
        subject = _SUBJECT.get()
        logger.warning("%s: Cholesky failed with damping %g, trying %g", subject, used, used * 10)
        used *= 10
    raise IndefiniteError(
        f"the Hessian ({len(hessian)} x {len(hessian)}) is not positive definite even with "
        f"damping {_MAX_DAMPING:g}. It must be a sum of x x^T."
    )


def compensate(weight_t: Tensor, factor: Tensor, assign: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Round column after column, each error pushed onto the columns still to come (GPTQ).

    Frantar et al., "GPTQ", 2023, algorithm 1.

    Args:
        weight_t: (k, n), one input column of the layer per row.
        factor: `inverse_factor` of the Hessian in the same order of columns, (k, k).
        assign: Maps the position of a column and its compensated values (n,) to rounded values.

    Returns:
        The rounded values, (k, n).
    """
    k = len(weight_t)
    rest = weight_t.clone()
    rounded = torch.empty_like(rest)
    factor = factor.to(rest.dtype)
    scales = factor.diagonal().tolist()
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        block = rest[start:stop]
        errors = torch.empty_like(block)
        inner = factor[start:stop, start:stop]
        for i in range(stop - start):
            rounded[start + i] = assign(start + i, block[i])
            errors[i] = (block[i] - rounded[start + i]) / scales[start + i]
            block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1.0)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
    return rounded


def output_energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T), the mean squared output for weight (n, k) and inputs with E[x x^T] = H."""
    return float(((weight.double() @ hessian.double()) * weight.double()).sum())
