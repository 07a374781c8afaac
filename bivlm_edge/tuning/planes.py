"""A packed weight whose coefficients, and optionally signs, are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bivlm_edge.quant.hadamard import hadamard_matrix, unpack_signs
from bivlm_edge.quant.packed import (
    BinaryWeight,
    PlaneClass,
    pack_coefficients,
    pack_planes,
    padded_columns,
    plane_classes,
    unpack_planes,
)

_MARGIN = 0.1
_FLOAT16_MAX = 65504.0


class StoredCoordinates:
    """The linear map between a layer's weight and the columns of its planes, and its transpose.

    It is orthogonal but for the padding: the same map takes gradients along with weights.

    Args:
        packed: Whose transform and order to use.
    """

    def __init__(self, packed: BinaryWeight) -> None:
        self._k = packed.k
        self._kp = padded_columns(packed.k)
        self._order = torch.from_numpy(packed.column_order())
        self._places = self._order.argsort()
        self._block = packed.hadamard_block
        self._hadamard = (
            torch.from_numpy(hadamard_matrix(self._block).astype(np.float32))
            if self._block
            else None
        )
        self._signs = (
            None
            if packed.signs is None
            else torch.from_numpy(unpack_signs(packed.signs).astype(np.float32))
        )

    def store(self, weight: Tensor) -> Tensor:
        """A weight or gradient (n, k) in the columns of the planes: (n, kp)."""
        padded = nn.functional.pad(weight, (0, self._kp - self._k))
        if self._signs is not None:
            padded = padded * self._signs
        return self._rotate(padded).index_select(1, self._order)

    def restore(self, values: Tensor) -> Tensor:
        """Values (n, kp) of the planes as weight of the layer: (n, k)."""
        weight = self._rotate(values.index_select(1, self._places))
        if self._signs is not None:
            weight = weight * self._signs
        return weight[:, : self._k]

    def _rotate(self, values: Tensor) -> Tensor:
        if self._hadamard is None:
            return values
        blocks = values.reshape(len(values), -1, self._block)
        return (blocks @ self._hadamard).reshape(values.shape)


class PlaneWeight:
    """Coefficients and signs of a packed weight as tensors that an optimizer may change.

    With latent weights, the sign of plane p is that of what planes 0..p-1 leave of the latent
    weight, so a latent weight stands for its nearest level as long as the coefficients of a row
    fall fast enough; the gradient of a value is that of its latent weight (straight-through:
    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013).

    Args:
        packed: The weight to start from.
        target: Float weight (n, k) from which latent weights start: each is moved just as far as
            its stored signs demand. None fixes the signs.

    Attributes:
        coefficients: float32 (n, A), slots as in FORMAT.md.
        latent: float32 (n, kp), or None.
    """

    def __init__(self, packed: BinaryWeight, target: Tensor | None = None) -> None:
        self.packed = packed
        self._map = StoredCoordinates(packed)
        self._classes = plane_classes(packed.plane_columns)
        slots = packed.coefficients.shape[1]
        rows = packed.coefficients.transpose(0, 2, 1).reshape(-1, slots)[: packed.n]
        self.coefficients = torch.from_numpy(rows.astype(np.float32))
        self._planes = [
            torch.from_numpy(plane.astype(np.int8) * 2 - 1)
            for plane in unpack_planes(packed.codes, packed.n, packed.plane_columns)
        ]
        self._padding = (
            torch.from_numpy(packed.column_order() >= packed.k)
            if packed.hadamard_block == 0 and packed.k < padded_columns(packed.k)
            else None
        )
        self.latent: Tensor | None = None
        if target is not None:
            self._sort_planes()
            self.latent = self._latent(self._map.store(target.float()))

    def weight(self) -> Tensor:
        """The weight that coefficients and signs say, as a layer holds it: float32 (n, k)."""
        values = torch.zeros(self.packed.n, padded_columns(self.packed.k))
        for group in self._classes:
            columns = slice(group.start, group.stop)
            for p, sign in enumerate(self._signs(group)):
                values[:, columns] += sign.mul_(self._alpha(group, p))
        if self._padding is not None:
            values[:, self._padding] = 0.0
        return self._map.restore(values)

    def project(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of coefficients and latent weights from that of the layer's weight (n, k)."""
        stored = self._map.store(gradient)
        result = torch.empty_like(self.coefficients)
        for group in self._classes:
            columns = stored[:, group.start : group.stop]
            for p, sign in enumerate(self._signs(group)):
                result[:, group.slot + p] = sign.mul_(columns).sum(dim=1)
        return result, None if self.latent is None else stored

    def pack(self) -> BinaryWeight:
        """The weight with float16 coefficients; planes, transform and size are unchanged."""
        rows = self.coefficients.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).numpy().astype(np.float16)
        planes = [np.zeros(plane.shape, dtype=np.bool_) for plane in self._planes]
        for group in self._classes:
            for p, sign in enumerate(self._signs(group)):
                planes[p][:, group.start : group.stop] = (sign > 0).numpy()
        if self._padding is not None:
            padding = self._padding.numpy()
            for plane in planes:
                plane[:, padding[: plane.shape[1]]] = False
        return dataclasses.replace(
            self.packed, codes=pack_planes(planes), coefficients=pack_coefficients(rows)
        )

    def _alpha(self, group: PlaneClass, p: int) -> Tensor:
        return self.coefficients[:, group.slot + p, None]

    def _signs(self, group: PlaneClass) -> Iterator[Tensor]:
        """The signs +-1 of each plane in a class of columns: fresh float32 (n, columns)."""
        columns = slice(group.start, group.stop)
        if self.latent is None:
            for p in range(group.planes):
                yield self._planes[p][:, columns].float()
            return
        one = torch.ones(())
        rest = self.latent[:, columns]
        for p in range(group.planes):
            yield torch.copysign(one, rest)
            if p + 1 < group.planes:
                rest = rest - torch.copysign(self._alpha(group, p), rest)

    def _sort_planes(self) -> None:
        """Make coefficients positive and falling within each class; the values stay the same."""
        for group in self._classes:
            slots = slice(group.slot, group.slot + group.planes)
            alpha = self.coefficients[:, slots].clone()
            flips = torch.where(alpha < 0, -1, 1).to(torch.int8)
            order = alpha.abs().argsort(dim=1, descending=True, stable=True)
            self.coefficients[:, slots] = alpha.abs().gather(1, order)
            columns = slice(group.start, group.stop)
            signs = torch.stack([self._planes[p][:, columns] for p in range(group.planes)], dim=1)
            signs = (signs * flips[:, :, None]).gather(
                1, order[:, :, None].expand(-1, -1, signs.shape[2])
            )
            for p in range(group.planes):
                self._planes[p][:, columns] = signs[:, p]

    def _latent(self, target: Tensor) -> Tensor:
        """The values nearest to `target` that stand for the present signs, by a small margin."""
        latent = target.clone()
        for group in self._classes:
            columns = slice(group.start, group.stop)
            alpha = self.coefficients[:, group.slot : group.slot + group.planes]
            gap = _MARGIN * alpha[:, -1:]
            low = torch.full((len(alpha), group.stop - group.start), -torch.inf)
            high = -low
            level = torch.zeros_like(low)
            for p in range(group.planes):
                positive = self._planes[p][:, columns] > 0
                low = torch.where(positive, torch.maximum(low, level + gap), low)
                high = torch.where(positive, high, torch.minimum(high, level - gap))
                level = level + alpha[:, p : p + 1] * self._planes[p][:, columns]
            latent[:, columns] = torch.minimum(torch.maximum(target[:, columns], low), high)
        return latent
