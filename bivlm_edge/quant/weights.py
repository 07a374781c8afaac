"""What a quantized linear layer can be: bit planes, affine codes, or dense values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bivlm_edge.quant.packed import BinaryWeight

GROUP_BITS = (2, 3, 4, 8)
MIN_GROUP = 16


@dataclass(frozen=True, slots=True, eq=False)
class GroupWeight:
    """Affine codes with one scale and zero point per row and group: `scale * (code - zero)`.

    Attributes:
        n: Output features.
        k: Input features.
        bits: 2, 3, 4 or 8; MatMulNBits has no 3, so such a weight is compared but not exported.
        group: Columns that share a scale; a power of two >= 16, as MatMulNBits demands.
        codes: uint8 (n, groups * group), one code per byte; columns from k on are padding.
        scale: float16 (n, groups).
        zero: uint8 (n, groups).

    Raises:
        ValueError: a field does not follow from the others.
    """

    n: int
    k: int
    bits: int
    group: int
    codes: NDArray[np.uint8]
    scale: NDArray[np.float16]
    zero: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.bits not in GROUP_BITS:
            raise ValueError(f"bits {self.bits} is not one of {GROUP_BITS}.")
        if self.group < MIN_GROUP or self.group & (self.group - 1):
            raise ValueError(f"group {self.group} is not a power of two >= {MIN_GROUP}.")
        groups = -(-self.k // self.group)
        for name, array, kind, shape in (
            ("codes", self.codes, np.uint8, (self.n, groups * self.group)),
            ("scale", self.scale, np.float16, (self.n, groups)),
            ("zero", self.zero, np.uint8, (self.n, groups)),
        ):
            if array.dtype != kind or array.shape != shape:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}, expected {np.dtype(kind)} {shape} "
                    f"for N = {self.n}, K = {self.k}, group = {self.group}."
                )
        top = 2**self.bits - 1
        if self.codes.max(initial=0) > top or self.zero.max(initial=0) > top:
            raise ValueError(
                f"a code or zero point exceeds {top}, the largest of {self.bits} bits."
            )
        if not np.isfinite(self.scale).all():
            raise ValueError("scale holds NaN or infinity; float16 ends at 65504.")

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes, float16 scales and zero points packed by row."""
        groups = self.scale.shape[1]
        zero_bytes = self.n * -(-groups * self.bits // 8)
        total: int = self.codes.nbytes * self.bits // 8 + self.scale.nbytes + zero_bytes
        return total

    @property
    def true_bits(self) -> float:
        """Bits per weight, every byte counted."""
        return 8 * self.nbytes / (self.n * self.k)

    def dequantize(self) -> NDArray[np.float32]:
        """The weight: float32 (n, k)."""
        codes = self.codes.reshape(self.n, -1, self.group).astype(np.float32)
        centred = codes - self.zero[:, :, np.newaxis].astype(np.float32)
        values = centred * self.scale[:, :, np.newaxis].astype(np.float32)
        return np.ascontiguousarray(values.reshape(self.n, -1)[:, : self.k])


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes along the last axis into bytes, lowest bits first, padded to whole bytes.

    That is how MatMulNBits and GatherBlockQuantized read codes and zero points.

    Args:
        codes: ``(.., count)``, each below ``2**bits``.
        bits: 2, 4 or 8.

    Returns:
        uint8 ``(.., ceil(count * bits / 8))``.
    """
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)]).astype(np.uint8)
    packed = padded[..., ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= padded[..., place::per_byte] << np.uint8(place * bits)
    return packed


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """Quantized values without a packed form: for methods that are compared but not deployed.

    Attributes:
        values: float16 or float32 (n, k), what the layer computes with.
        claimed_bits: Bits per weight as the method's paper counts them.
        true_bits: Bits per weight that a decodable file would take, by formula.
    """

    values: NDArray[np.float16] | NDArray[np.float32]
    claimed_bits: float
    true_bits: float

    @property
    def n(self) -> int:
        """Output features."""
        return int(self.values.shape[0])

    @property
    def k(self) -> int:
        """Input features."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that `true_bits` comes to, rounded up."""
        return int(np.ceil(self.true_bits * self.n * self.k / 8))

    def dequantize(self) -> NDArray[np.float32]:
        """The weight: float32 (n, k)."""
        return np.ascontiguousarray(self.values.astype(np.float32))


QuantizedWeight = BinaryWeight | GroupWeight | DenseWeight
