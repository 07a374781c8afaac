"""Layers in the coordinates in which their planes are stored: rotated, ordered, padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bivlm_edge.errors import CheckpointError, DataError
from bivlm_edge.quant.hadamard import block_hadamard, pack_signs
from bivlm_edge.quant.linalg import DAMPING, inverse_factor
from bivlm_edge.quant.packed import CHUNK, padded_columns

Order = Literal["none", "chunks", "columns"]


class Variant(NamedTuple):
    """A Hadamard block (0: none) and what the saliency order moves."""

    block: int
    order: Order

    def fits(self, k: int) -> bool:
        """Whether the block divides the padded width."""
        return self.block == 0 or padded_columns(k) % self.block == 0

    def order_entries(self, k: int) -> int:
        """Length of the stored order for K = k."""
        kp = padded_columns(k)
        return {"none": 0, "chunks": kp // CHUNK if kp > CHUNK else 0, "columns": kp}[self.order]


@dataclass(frozen=True, slots=True)
class CalibratedLayer:
    """A layer and what is known of its inputs.

    Attributes:
        name: Dotted name, for messages.
        weight: float32 (n, k).
        hessian: (k, k), E[x x^T] of the inputs to fit, centred if a bias takes up the mean; scaled
            so that the errors of different layers compare.
        held_out: The same of inputs that must not be fitted, or None.

    Raises:
        CheckpointError: the weight holds NaN or infinity.
        DataError: the Hessian does.
    """

    name: str
    weight: Tensor
    hessian: Tensor
    held_out: Tensor | None = None

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.weight).all()):
            raise CheckpointError(
                f"the weight of '{self.name}' holds NaN or infinity. The checkpoint is damaged; "
                "get it again."
            )
        if not bool(torch.isfinite(self.hessian).all()):
            raise DataError(
                f"the Hessian of the inputs of '{self.name}' holds NaN or infinity. Check the "
                "calibration data, and that the float model's activations are finite."
            )


@dataclass(frozen=True, slots=True)
class StoredProblem:
    """Weight and Hessian with columns as they will be stored.

    Attributes:
        variant: How the columns came to be in this order.
        n: Output features.
        k: Input features of the layer.
        weight_t: float32 (columns, n). Without a Hadamard block padding columns, which come
            last, are left out.
        hessian: float32 (columns, columns), damped.
        factor: `inverse_factor` in the order of `visit`.
        visit: Order in which columns are rounded: falling diag(H), unless switched off.
        energy: Expected squared error per chunk, once rounded with compensation, of planes that
            leave 1 of the variance: float64 (chunks,), in the scale of the layer's Hessian.
        permutation: int64 (kp,), the transformed channel at each stored position.
        signs: Packed signs of the transform, or None.
        order: Stored order, or None.
    """

    variant: Variant
    n: int
    k: int
    weight_t: Tensor
    hessian: Tensor
    factor: Tensor
    visit: Tensor
    energy: NDArray[np.float64]
    permutation: NDArray[np.int64]
    signs: NDArray[np.uint8] | None
    order: NDArray[np.uint16] | None


def draw_signs(kp: int, seed: int) -> NDArray[np.bool_]:
    """The signs of a transform, True for +1."""
    return np.random.default_rng(seed).random(kp) < 0.5


def transform_problems(
    layers: Sequence[CalibratedLayer], variant: Variant, seed: int, *, act_order: bool = True
) -> list[StoredProblem]:
    """Bring layers with the same input into the coordinates of one variant.

    Signs and order of the columns are the same for all of them: the operators of the layers can
    become one. The order falls by the sum of the layers' saliencies.

    Args:
        layers: At least one, all of the same k.
        variant: Rotation and kind of order.
        seed: Seed of the signs.
        act_order: Whether columns are rounded by falling diag(H), or as they are stored.
    """
    k = layers[0].weight.shape[1]
    kp = padded_columns(k)
    columns = kp if variant.block else k
    flips = draw_signs(kp, seed) if variant.block else None
    rotated = [_rotate(layer, flips, variant.block) for layer in layers]
    saliency = np.zeros(kp)
    for weight, hessian in rotated:
        saliency[:columns] += _saliency(weight[:, :columns], hessian[:columns, :columns])
    permutation, order = _order(saliency, columns, variant)
    take = torch.from_numpy(permutation)
    take = take[take < columns]
    signs = None if flips is None else pack_signs(flips)
    problems = []
    for weight, hessian in rotated:
        mean = max(float(hessian.diagonal()[:columns].mean()), 1e-30)
        stored = hessian[take][:, take]
        visit = torch.arange(columns)
        if act_order:
            visit = stored.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(stored[visit][:, visit])
        stored = stored / mean + DAMPING * torch.eye(columns, dtype=torch.float64)
        weight_t = weight[:, take].T.contiguous()
        problems.append(
            StoredProblem(
                variant=variant,
                n=len(weight),
                k=k,
                weight_t=weight_t.float(),
                hessian=stored.float(),
                factor=factor,
                visit=visit,
                energy=_chunk_energy(weight_t, factor, visit),
                permutation=permutation,
                signs=signs,
                order=order,
            )
        )
    return problems


def _rotate(
    layer: CalibratedLayer, flips: NDArray[np.bool_] | None, block: int
) -> tuple[Tensor, Tensor]:
    """Padded weight (n, kp) and Hessian (kp, kp) in float64, transformed if there are signs."""
    n, k = layer.weight.shape
    kp = padded_columns(k)
    weight = np.zeros((n, kp))
    weight[:, :k] = layer.weight.numpy()
    moments = np.zeros((kp, kp))
    moments[:k, :k] = layer.hessian.numpy()
    if flips is not None:
        factors = np.where(flips, 1.0, -1.0)
        weight = block_hadamard(weight * factors, block)
        moments = block_hadamard(moments * factors * factors[:, np.newaxis], block)
        moments = block_hadamard(np.ascontiguousarray(moments.T), block)
    return torch.from_numpy(weight), torch.from_numpy(moments)


def _saliency(weight: Tensor, hessian: Tensor) -> NDArray[np.float64]:
    """Error that dropping a column costs after compensation: |w_j|^2 / [H^-1]_jj."""
    factor = inverse_factor(hessian)
    inverse_diagonal = (factor**2).sum(dim=0)
    return ((weight**2).sum(dim=0) / inverse_diagonal).numpy()


def _order(
    saliency: NDArray[np.float64], columns: int, variant: Variant
) -> tuple[NDArray[np.int64], NDArray[np.uint16] | None]:
    """Permutation of all kp columns by falling saliency, and what of it is stored."""
    kp = len(saliency)
    identity = np.arange(kp, dtype=np.int64)
    if variant.order_entries(kp) == 0:
        return identity, None
    if variant.order == "columns":
        ranked = np.argsort(-saliency[:columns], kind="stable")
        permutation = np.concatenate([ranked, identity[columns:]])
        return permutation, permutation.astype(np.uint16)
    chunks = saliency.reshape(-1, CHUNK).sum(axis=1)
    if columns < kp:
        chunks[-1] = -1.0  # the padded chunk stays last, so that real columns come first
    ranked = np.argsort(-chunks, kind="stable")
    return identity.reshape(-1, CHUNK)[ranked].reshape(-1), ranked.astype(np.uint16)


def _chunk_energy(weight_t: Tensor, factor: Tensor, visit: Tensor) -> NDArray[np.float64]:
    conditional = torch.empty(len(visit), dtype=torch.float64)
    conditional[visit] = 1 / factor.diagonal() ** 2
    squares = (weight_t.double() ** 2).sum(dim=1)
    chunks = padded_columns(len(visit)) // CHUNK
    energy = np.zeros(chunks)
    for chunk in range(chunks):
        columns = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        energy[chunk] = float(conditional[columns].sum() * squares[columns].mean())
    return energy
