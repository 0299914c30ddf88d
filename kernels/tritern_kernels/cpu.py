"""The int8 path on a CPU with what torch has: the GPU kernels' int32 sums, from one byte a weight.

Where the CPU multiplies int8 slowly (no VNNI, no AMX), the same integers are multiplied in float32, which
holds every partial sum exactly: the same bits.
"""

from __future__ import annotations

import math
import time
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .formats import unpack
from .reference import ONE_127TH, SMALLEST_ABSMAX

ROWS = 1024
"""Tokens taken at a time: temporaries stay a few MB, and larger pieces are no faster."""

LARGEST_EXACT_K = 2**24 // 127
"""Up to this K every partial sum of int8 activations times codes is an integer that float32 holds."""

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
    codes = _factor(codes_of(packed, x.shape[1]), activation_bits)
    y = x.new_empty((x.shape[0], packed.shape[0]))
    for out, part in zip(y.split(ROWS), x.split(ROWS)):
        x_q, scale_x = quantize(part) if activation_bits == 8 else (part, None)
        _fill(out, x_q, scale_x, codes, scale, bias, gelu)
    return y


def linear_int8(
    x_q: Tensor, scale_x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``linear`` of activations that ``quantize`` has made int8: y [M, N] in ``dtype``, the same bits."""
    codes = _factor(codes_of(packed, x_q.shape[1]), 8)
    y = torch.empty((x_q.shape[0], packed.shape[0]), dtype=dtype)
    for out, part, part_scale in zip(y.split(ROWS), x_q.split(ROWS), scale_x.split(ROWS)):
        _fill(out, part, part_scale, codes, scale, bias, False)
    return y


def _factor(codes: Tensor, activation_bits: int) -> Tensor:
    """Codes int8 [N, K] in the dtype in which they are multiplied: int8 or float32."""
    in_int8 = activation_bits == 8 and (codes.shape[1] > LARGEST_EXACT_K or int8_is_fast())
    return codes if in_int8 else codes.float()


@cache
def int8_is_fast() -> bool:
    """Whether ``torch._int_mm`` beats a float32 product here.

    Timed, once a process: instruction sets differ by an order of magnitude, and no one flag names them all.
    """
    int8 = torch.ones(256, 256, dtype=torch.int8)
    float32 = int8.float()
    seconds = [math.inf, math.inf]
    for _ in range(3):
        for i, multiply in enumerate(
            (lambda: torch.ops.aten._int_mm(int8, int8.t()), lambda: torch.mm(float32, float32.t()))
        ):
            start = time.perf_counter()
            multiply()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds[0] < seconds[1]


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
    if scale_x is not None and codes.dtype == torch.int8:
        y = torch.ops.aten._int_mm(x, codes.t()) * scale_x[:, None]  # int32 times float32: float32
    else:
        with torch.autocast("cpu", enabled=False):  # which would round the sums
            y = torch.mm(x.float(), codes.t())
        y = y if scale_x is None else y.mul_(scale_x[:, None])
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
