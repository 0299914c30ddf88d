"""Two steps of a transformer block, each in one pass over memory: addition of a residual, LayerNorm or
RMSNorm and int8 quantization; norm and rotation of heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import wait_for_inputs
from .quantize import absmax_bits, load_rows, rounded, rounded_product, scales_of, store_codes


@triton.jit
def _sum(x_ptr, residual_ptr, y_ptr, rows, cols, M, K, RMS: tl.constexpr, ADD: tl.constexpr):
    """The norm's input in fp32; an RMSNorm's sum is also stored."""
    v = load_rows(x_ptr, rows, cols, K, M, K)
    if ADD:
        v = rounded(v + load_rows(residual_ptr, rows, cols, K, M, K), x_ptr)
        if RMS:
            _store(y_ptr, v, rows, cols, M, K)
    return v


@triton.jit
def _normalized(v, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, cols, M, K, RMS: tl.constexpr):
    """The norm's result, rounded to the dtype, in fp32; a LayerNorm's is also stored."""
    weight = tl.load(weight_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
    y = (v - mean[:, None]) * rstd[:, None]
    if RMS:
        y = rounded(rounded(y, y_ptr) * weight[None, :], y_ptr)
    else:
        bias = tl.load(bias_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        y = rounded(y * weight[None, :] + bias[None, :], y_ptr)
        _store(y_ptr, y, rows, cols, M, K)
    return y


@triton.jit
def _store(y_ptr, y, rows, cols, M, K):
    mask = (rows[:, None] < M) & (cols[None, :] < K)
    tl.store(y_ptr + rows[:, None] * K + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _squares(v, mean, cols, K):
    d = tl.where((cols < K)[None, :], v - mean[:, None], 0.0)
    return tl.sum(d * d, axis=1)


@triton.jit(do_not_specialize=["M"])
def norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, M, K, K_padded, EPS,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    RMS: tl.constexpr, ADD: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """norm(x + residual), or without ADD norm(x); all are [M, K] of one dtype and contiguous. q, scale and
    PIECES (1 or 3) are as in ``quantize_kernel``. y gets a LayerNorm's result or an RMSNorm's input sum.
    Sum and result are rounded to the dtype, like torch's.
    """
    wait_for_inputs(PDL)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.arange(0, BLOCK_K)
    second, third = BLOCK_K + first, 2 * BLOCK_K + first
    x = _sum(x_ptr, residual_ptr, y_ptr, rows, first, M, K, RMS, ADD)
    if PIECES == 3:
        y = _sum(x_ptr, residual_ptr, y_ptr, rows, second, M, K, RMS, ADD)
        z = _sum(x_ptr, residual_ptr, y_ptr, rows, third, M, K, RMS, ADD)
    if RMS:
        mean = tl.zeros((BLOCK_M,), tl.float32)
    else:
        total = tl.sum(x, axis=1)
        if PIECES == 3:
            total += tl.sum(y, axis=1) + tl.sum(z, axis=1)
        mean = total / K
    total = _squares(x, mean, first, K)
    if PIECES == 3:
        total += _squares(y, mean, second, K) + _squares(z, mean, third, K)
    rstd = tl.rsqrt(total / K + EPS)
    x = _normalized(x, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, first, M, K, RMS)
    bits = absmax_bits(x)
    if PIECES == 3:
        y = _normalized(y, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, second, M, K, RMS)
        z = _normalized(z, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, third, M, K, RMS)
        bits = tl.maximum(bits, tl.maximum(absmax_bits(y), absmax_bits(z)))
    scale, inverse, finite = scales_of(bits, BLOCK_M)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    store_codes(q_ptr, x, inverse, finite, rows, first, K_padded, M, K_padded, BLOCK_M, BLOCK_K, ASM)
    if PIECES == 3:
        store_codes(q_ptr, y, inverse, finite, rows, second, K_padded, M, K_padded, BLOCK_M, BLOCK_K, ASM)
        store_codes(q_ptr, z, inverse, finite, rows, third, K_padded, M, K_padded, BLOCK_M, BLOCK_K, ASM)


@triton.jit
def _weight_of(q_ptr, k_ptr, cols, is_query):
    """Norm weights [rows, cols] of queries and keys."""
    q, k = tl.load(q_ptr + cols).to(tl.float32), tl.load(k_ptr + cols).to(tl.float32)
    return tl.where(is_query[:, None], q[None, :], k[None, :])


@triton.jit(do_not_specialize=["period", "M"])
def norm_rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, period, M, Q_HEADS, HEADS, stride_x, EPS,
    BLOCK: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Change the first HEADS heads, 2 * HALF wide, of each of M rows in place: RMSNorm (with NORM), then
    rotation by row ``m % period`` of cos and sin [period, 2 * HALF]. The first Q_HEADS heads are queries, the
    others keys. Every step is rounded to the dtype, like torch's.
    """
    wait_for_inputs(PDL)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows, heads = index // HEADS, index % HEADS
    low = tl.arange(0, HALF)
    high = HALF + low
    mask = (rows < M)[:, None]
    at = x_ptr + rows[:, None] * stride_x + heads[:, None] * (2 * HALF) + low[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + EPS)[:, None]
        is_query = heads < Q_HEADS
        a = rounded(rounded(a * rstd, x_ptr) * _weight_of(q_weight_ptr, k_weight_ptr, low, is_query), x_ptr)
        b = rounded(rounded(b * rstd, x_ptr) * _weight_of(q_weight_ptr, k_weight_ptr, high, is_query), x_ptr)
    turn = (rows % period)[:, None] * (2 * HALF) + low[None, :]
    cos_a = tl.load(cos_ptr + turn, mask=mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + turn, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + turn + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + turn + HALF, mask=mask, other=0.0).to(tl.float32)
    new_a = rounded_product(a, cos_a, x_ptr) - rounded_product(b, sin_a, x_ptr)
    new_b = rounded_product(b, cos_b, x_ptr) + rounded_product(a, sin_b, x_ptr)
    tl.store(at, new_a.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, new_b.to(x_ptr.dtype.element_ty), mask=mask)
