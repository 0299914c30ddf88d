"""The int8 path on a CPU with what torch has: the GPU kernels' int32 sums, from one byte a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .formats import unpack
from .reference import ONE_127TH, SMALLEST_ABSMAX

ROWS = 1024
"""Tokens taken at a time: temporaries stay a few MB, and larger pieces are no faster."""

_unpacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def codes_of(packed: Tensor, K: int) -> Tensor:
    """Codes int8 [N, K] of a packed weight, unpacked once and kept as long as it lives."""
    if packed.is_inference():  # no version counter: a change in place could not be noticed
        return unpack(packed, K)
    kept = _unpacked.get(packed)
    if kept is None or kept[0] != packed._version or kept[1].shape[1] != K:
        with torch.inference_mode(False):
            kept = (packed._version, unpack(packed, K))
        _unpacked[packed] = kept
    return kept[1]


def remember(packed: Tensor, codes: Tensor) -> None:
    """Keep the codes int8 [N, K] that a packed weight was made of, so that they need not be unpacked."""
    _unpacked[packed] = (packed._version, codes)


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int, gelu: bool
) -> Tensor:
    """y [M, N] in x's dtype for x [M, K]."""
    codes = codes_of(packed, x.shape[1])
    y = x.new_empty((x.shape[0], packed.shape[0]))
    for out, part in zip(y.split(ROWS), x.split(ROWS)):
        x_q, scale_x = quantize(part) if activation_bits == 8 else (part, None)
        _fill(out, x_q, scale_x, codes, scale, bias, gelu)
    return y


def linear_int8(
    x_q: Tensor, scale_x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``linear`` of activations that ``quantize`` has made int8: y [M, N] in ``dtype``, the same bits."""
    codes = codes_of(packed, x_q.shape[1])
    y = torch.empty((x_q.shape[0], packed.shape[0]), dtype=dtype)
    for out, part, part_scale in zip(y.split(ROWS), x_q.split(ROWS), scale_x.split(ROWS)):
        _fill(out, part, part_scale, codes, scale, bias, False)
    return y


def _fill(
    out: Tensor,
    x: Tensor,
    scale_x: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
) -> None:
    """Fill out [M, N] for x [M, K]: int8 with its scale [M], or floating point without."""
    if scale_x is not None:
        y = torch.ops.aten._int_mm(x, codes.t()) * scale_x[:, None]  # int32 times float32: float32
    else:
        y = torch.mm(x.float(), codes.float().t())
    target = out if out.dtype == torch.float32 else y
    y = torch.mul(y, scale, out=target) if bias is None else torch.addcmul(bias.float(), y, scale, out=target)
    y = torch.nn.functional.gelu(y) if gelu else y
    if y is not out:
        out.copy_(y)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.quantize_activations`` in fewer passes: [M, K] in natural order."""
    values = x.float()
    # amax and amin are ten times as fast as torch.aminmax(dim=1)
    absmax = torch.maximum(values.amax(1), values.amin(1).neg_()).clamp_(min=SMALLEST_ABSMAX)
    scale = absmax * ONE_127TH
    inverse = torch.full_like(absmax, 127.0).div_(absmax)
    if not math.isfinite(float(absmax.sum())):
        finite = torch.isfinite(absmax)
        scale = torch.where(finite, scale, torch.nan)
        values = torch.where(finite[:, None], values, 0.0)
        inverse = torch.where(finite, inverse, 0.0)
    return (values * inverse[:, None]).round_().to(torch.int8), scale
