"""The packed layout: two bits per weight, in the order of the tensor cores.

Letters used throughout: ``M`` tokens, ``N`` out_features, ``K`` in_features; ``codes`` are int8 in {-1, 0,
+1}, ``packed`` are the bytes, ``scale`` always multiplies codes to give values.

A code is stored as 2-bit two's complement: 00 = 0, 01 = +1, 11 = -1 (10 never occurs). Shifted to the top of
its lane it is the number itself: 64*t in int8, 2.0*t in fp16, bf16 and fp8. So unpacking is one shift and one
AND.

``K`` is padded with zeros to whole atoms of 128 weights. An atom takes 32 bytes, or 16 little-endian 16-bit
words. Word ``w``, slab ``s`` (bits ``2s, 2s+1``) holds ``k = 16*s + w``. In bytes: byte ``i = 2w + h``, slab
``j`` holds ``k = 64*h + 16*j + w``. 8-bit activations are stored in this order (``to_packed_order``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ATOM = 128
BYTES_PER_ATOM = ATOM // 4
MAX_K = (2**31 - 1) // (127 * 64) // ATOM * ATOM
"""Largest K for which the int32 sum of 127 * 64 * K cannot overflow: 264,192."""


def padded_k(K: int) -> int:
    """K rounded up to whole atoms."""
    return -(-K // ATOM) * ATOM


def check_shape(N: int, K: int) -> None:
    """Raise ``ValueError`` unless an [N, K] matrix can be packed and multiplied without overflow."""
    if N < 1 or K < 1:
        raise ValueError(f"out_features and in_features must be at least 1; received [{N}, {K}]")
    if K > MAX_K:
        raise ValueError(
            f"in_features must be at most {MAX_K:,}, the bound for exact int32 sums; received {K:,}. "
            "Split the layer along its inputs."
        )


@dataclass(frozen=True, eq=False)
class PackedTernary:
    """A ternary matrix of ``shape`` (N, K): ``packed`` uint8 [N, padded_k(K)/4] and ``scale`` float32 [N].

    Row n is ``scale[n] * codes[n]``. Two objects are equal if they hold the same bits on one device. On the
    meta device, without bits, an object equals only itself. Comparing waits for the GPU.

    Raises:
        TypeError: wrong dtype. ValueError: shapes that do not match, or K beyond ``MAX_K``.
    """

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        N, K = self.shape
        check_shape(N, K)
        check_packed(self.packed, self.scale, N, K)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedTernary) or self is other:
            return self is other
        if self.shape != other.shape or self.packed.device != other.packed.device or self.packed.is_meta:
            return False
        return torch.equal(self.packed, other.packed) and torch.equal(self.scale, other.scale)

    def __hash__(self) -> int:
        return hash(self.shape)  # not the content: it may change in place

    def codes(self) -> Tensor:
        """int8 [N, K] in {-1, 0, +1}."""
        return unpack(self.packed, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] in ``dtype``: ``scale[:, None] * codes``."""
        return (self.codes().to(torch.float32) * self.scale[:, None]).to(dtype)


def check_packed(packed: Tensor, scale: Tensor, N: int, K: int) -> None:
    """Raise unless ``packed`` and ``scale`` have the dtypes and shapes of an [N, K] ternary matrix on one
    device.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8 (made by pack()); received {packed.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(
            f"scale must be float32; received {scale.dtype}. Keep scales in float32 when casting a model."
        )
    if tuple(packed.shape) != (N, padded_k(K) // 4):
        raise ValueError(
            f"packed must have shape [{N}, {padded_k(K) // 4}] for a [{N}, {K}] matrix; "
            f"received {list(packed.shape)}"
        )
    if tuple(scale.shape) != (N,):
        raise ValueError(
            f"scale must hold one value per output row, shape [{N}]; received {list(scale.shape)}"
        )
    if packed.device != scale.device:
        raise ValueError(
            f"packed and scale must be on one device; received {packed.device} and {scale.device}"
        )


def check_codes(packed: Tensor) -> None:
    """Raise ``ValueError`` if a byte holds the unused pattern 10. Waits for the GPU."""
    if (packed & ~(packed << 1) & 0xAA).any():  # high bit set, low bit clear
        raise ValueError("packed holds the bit pattern 10, not a ternary code: the data is damaged")


def check_scale(scale: Tensor) -> None:
    """Raise ``ValueError`` if a scale is NaN, infinite or negative. Waits for the GPU."""
    if not (torch.isfinite(scale) & (scale >= 0)).all():
        raise ValueError("scale holds NaN, infinity or a negative value: the data is damaged")


def pack(codes: Tensor) -> Tensor:
    """Pack codes int8 [N, K] in {-1, 0, +1} into uint8 [N, padded_k(K)/4].

    Raises:
        TypeError: codes are not int8. ValueError: not two-dimensional, or a value outside {-1, 0, +1}.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8; received {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be a matrix [N, K]; received shape {list(codes.shape)}")
    N, K = codes.shape
    check_shape(N, K)
    if codes.abs().amax() > 1 or codes.amin() < -1:
        raise ValueError(
            f"codes must lie in {{-1, 0, +1}}; received values from {codes.min()} to {codes.max()}"
        )
    padded = torch.nn.functional.pad(codes, (0, padded_k(K) - K))
    bits = (padded & 3).to(torch.uint8).view(N, -1, 2, 4, 16)  # [N, atom, h, j, w]
    byte = bits[:, :, :, 0] | bits[:, :, :, 1] << 2 | bits[:, :, :, 2] << 4 | bits[:, :, :, 3] << 6
    return byte.transpose(2, 3).reshape(N, padded_k(K) // 4)


def unpack(packed: Tensor, K: int, check: bool = True) -> Tensor:
    """Inverse of ``pack``: uint8 [N, padded_k(K)/4] -> codes int8 [N, K]. ``check`` waits for the GPU.

    Raises:
        ValueError: shape does not fit K, or a byte holds the unused pattern 10 (the data is not ternary).
    """
    N = packed.shape[0]
    check_packed(packed, torch.empty(N, dtype=torch.float32, device=packed.device), N, K)
    if check and packed.device.type != "meta":
        check_codes(packed)
    byte = packed.view(N, -1, 16, 2).transpose(2, 3)  # [N, atom, h, w]
    lanes = torch.stack(
        [byte << 6, byte << 4, byte << 2, byte], dim=3
    )  # [N, atom, h, j, w], code in the top bits
    return (lanes.view(torch.int8) >> 6).reshape(N, padded_k(K))[:, :K].contiguous()


def to_packed_order(x: Tensor) -> Tensor:
    """Reorder [M, padded K] activations from natural order to the order of the int8 kernel."""
    return x.view(x.shape[0], -1, 2, 4, 16).permute(0, 1, 3, 4, 2).reshape(x.shape)


def from_packed_order(x: Tensor) -> Tensor:
    """Inverse of ``to_packed_order``."""
    return x.view(x.shape[0], -1, 4, 16, 2).permute(0, 1, 4, 2, 3).reshape(x.shape)
