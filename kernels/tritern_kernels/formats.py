"""The packed layout: two or four bits per weight, in the order of the tensor cores.

Letters used throughout: ``M`` tokens, ``N`` out_features, ``K`` in_features; ``codes`` are int8, in {-1, 0,
+1} for two bits and from -7 to 7 for four; ``packed`` are the bytes, ``scale`` always multiplies codes to
give values.

A code is stored in two's complement. The lowest number, binary 10 or 1000, never occurs. Shifted to the top
of its byte a code is a multiple of the number: 64*t for two bits, 16*t for four. So unpacking is one shift
and one AND. In 16 bits two-bit codes become 2.0*t in the same way, both in fp16 and in bf16.

``K`` is padded with zeros to whole atoms of 128 weights. An atom of two-bit codes takes 32 bytes, or 16
little-endian 16-bit words. Word ``w``, slab ``s`` (bits ``2s, 2s+1``) holds ``k = 16*s + w``. In bytes: byte
``i = 2w + h``, slab ``j`` holds ``k = 64*h + 16*j + w``. 8-bit activations are stored in this order
(``to_packed_order``): slab by slab, byte by byte.

An atom of four-bit codes takes 64 bytes, for the same order of the activations: byte ``i``, slab ``s`` (bits
``4s`` to ``4s+3``) holds the activation at ``64*s + i``. So word ``w`` of 32 holds ``k = 32*q + w`` in its
nibble ``q``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ATOM = 128
WEIGHT_BITS = (2, 4)
LARGEST_CODE = {2: 1, 4: 7}
"""Codes lie between this number and its negative, by bits."""


def padded_k(K: int) -> int:
    """K rounded up to whole atoms."""
    return -(-K // ATOM) * ATOM


def packed_width(K: int, bits: int = 2) -> int:
    """Bytes of a packed row."""
    return padded_k(K) * bits // 8


def max_k(bits: int) -> int:
    """Largest K whose int32 sums cannot overflow: 264,192 for two bits, 150,912 for four."""
    return (2**31 - 1) // (127 * LARGEST_CODE[bits] * (256 >> bits)) // ATOM * ATOM


MAX_K = max_k(2)
"""``max_k`` of two bits."""


def weight_bits(packed: Tensor, K: int) -> int:
    """Bits of a code, 2 or 4, of a packed [N, K] matrix, from its shape.

    Raises:
        ValueError: the shape is that of no [N, K] matrix.
    """
    for bits in WEIGHT_BITS:
        if packed.dim() == 2 and packed.shape[1] == packed_width(K, bits):
            return bits
    raise ValueError(
        f"packed must have shape [N, {packed_width(K)}] (2 bits) or [N, {packed_width(K, 4)}] (4 bits) "
        f"for {K} in_features; received {list(packed.shape)}"
    )


def check_shape(N: int, K: int, bits: int = 2) -> None:
    """Raise ``ValueError`` unless an [N, K] matrix can be packed and multiplied without overflow."""
    if N < 1 or K < 1:
        raise ValueError(f"out_features and in_features must be at least 1; received [{N}, {K}]")
    if K > max_k(bits):
        raise ValueError(
            f"in_features must be at most {max_k(bits):,}, the bound for exact int32 sums of {bits}-bit "
            f"weights; received {K:,}. Split the layer along its inputs."
        )


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix of ``shape`` (N, K) in 2 or 4 bits: ``packed`` uint8 [N, padded_k(K) * bits / 8] and ``scale``
    float32 [N].

    Row n is ``scale[n] * codes[n]``. Two objects are equal if they hold the same bits on one device. On the
    meta device, without bits, an object equals only itself. Comparing waits for the GPU.

    Raises:
        TypeError: wrong dtype. ValueError: shapes that do not match, or K beyond
            ``max_k``.
    """

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        N, K = self.shape
        check_shape(N, K)
        check_packed(self.packed, self.scale, N, K)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedWeight) or self is other:
            return self is other
        if self.shape != other.shape or self.packed.device != other.packed.device or self.packed.is_meta:
            return False
        return torch.equal(self.packed, other.packed) and torch.equal(self.scale, other.scale)

    def __hash__(self) -> int:
        return hash(self.shape)  # not the content: it may change in place

    @property
    def bits(self) -> int:
        """Bits of a code: 2 (ternary) or 4."""
        return weight_bits(self.packed, self.shape[1])

    def codes(self) -> Tensor:
        """int8 [N, K] in {-1, 0, +1}, or from -7 to 7 in four bits."""
        return unpack(self.packed, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] in ``dtype``: ``scale[:, None] * codes``."""
        return (self.codes().to(torch.float32) * self.scale[:, None]).to(dtype)


def check_packed(packed: Tensor, scale: Tensor, N: int, K: int) -> None:
    """Raise unless ``packed`` and ``scale`` have the dtypes and shapes of an [N, K] matrix on one device."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8 (made by pack()); received {packed.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(
            f"scale must be float32; received {scale.dtype}. Keep scales in float32 when casting a model."
        )
    if (
        packed.dim() != 2
        or packed.shape[0] != N
        or 8 * packed.shape[1] not in (2 * padded_k(K), 4 * padded_k(K))
    ):
        raise ValueError(
            f"packed must have shape [{N}, {packed_width(K)}], or [{N}, {packed_width(K, 4)}] in 4 bits, "
            f"for a [{N}, {K}] matrix; received {list(packed.shape)}"
        )
    if tuple(scale.shape) != (N,):
        raise ValueError(
            f"scale must hold one value per output row, shape [{N}]; received {list(scale.shape)}"
        )
    if packed.device != scale.device:
        raise ValueError(
            f"packed and scale must be on one device; received {packed.device} and {scale.device}"
        )


def check_codes(packed: Tensor, bits: int = 2) -> None:
    """Raise ``ValueError`` if a byte holds the unused pattern, 10 or 1000. Waits for the GPU."""
    if bits == 2:
        damaged = packed & ~(packed << 1) & 0xAA  # high bit set, low bit clear
    else:
        damaged = packed & ~(packed << 1 | packed << 2 | packed << 3) & 0x88
    if damaged.any():
        pattern, kind = ("10", "ternary") if bits == 2 else ("1000", "4-bit")
        raise ValueError(f"packed holds the bit pattern {pattern}, not a {kind} code: the data is damaged")


def check_scale(scale: Tensor) -> None:
    """Raise ``ValueError`` if a scale is NaN, infinite or negative. Waits for the GPU."""
    if not (torch.isfinite(scale) & (scale >= 0)).all():
        raise ValueError("scale holds NaN, infinity or a negative value: the data is damaged")


def pack(codes: Tensor, bits: int = 2) -> Tensor:
    """Pack codes int8 [N, K], in {-1, 0, +1} or for 4 bits from -7 to 7, into uint8 [N, padded_k(K)*bits/8].

    Raises:
        TypeError: codes are not int8. ValueError: not two-dimensional, a value out of range, or other bits.
    """
    if bits not in WEIGHT_BITS:
        raise ValueError(f"bits must be 2 or 4; received {bits!r}")
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8; received {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be a matrix [N, K]; received shape {list(codes.shape)}")
    N, K = codes.shape
    check_shape(N, K, bits)
    low, high, most = codes.amin(), codes.amax(), LARGEST_CODE[bits]
    if low < -most or high > most:
        allowed = "in {-1, 0, +1}" if bits == 2 else "between -7 and 7"
        raise ValueError(f"codes must lie {allowed}; received values from {low} to {high}")
    padded = torch.nn.functional.pad(codes, (0, padded_k(K) - K))
    slabs = (
        (to_packed_order(padded) & ((1 << bits) - 1)).to(torch.uint8).view(N, -1, 8 // bits, ATOM * bits // 8)
    )
    byte = slabs[:, :, 0]
    for slab in range(1, 8 // bits):
        byte = byte | slabs[:, :, slab] << bits * slab
    return byte.reshape(N, packed_width(K, bits))


def unpack(packed: Tensor, K: int, check: bool = True) -> Tensor:
    """Inverse of ``pack``: uint8 [N, padded_k(K) * bits/8] -> codes int8 [N, K]. ``check`` waits for the GPU.

    Raises:
        ValueError: shape does not fit K, or a byte holds the unused pattern (the data is damaged).
    """
    N = packed.shape[0]
    check_packed(packed, torch.empty(N, dtype=torch.float32, device=packed.device), N, K)
    bits = weight_bits(packed, K)
    if check and packed.device.type != "meta":
        check_codes(packed, bits)
    byte = packed.view(N, -1, 1, ATOM * bits // 8)
    shifts = range(8 - bits, -1, -bits)  # a code to the top bits, slab by slab
    slabs = torch.cat([byte << shift for shift in shifts], dim=2).view(torch.int8) >> (8 - bits)
    return from_packed_order(slabs.view(N, padded_k(K)))[:, :K].contiguous()


def to_packed_order(x: Tensor) -> Tensor:
    """Reorder [M, padded K] activations from natural order to the order of the int8 kernel."""
    return x.view(x.shape[0], -1, 2, 4, 16).permute(0, 1, 3, 4, 2).reshape(x.shape)


def from_packed_order(x: Tensor) -> Tensor:
    """Inverse of ``to_packed_order``."""
    return x.view(x.shape[0], -1, 4, 16, 2).permute(0, 1, 4, 2, 3).reshape(x.shape)
