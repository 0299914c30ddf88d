"""Per-token int8 quantization, written in the order the int8 GEMM reads (see ``formats``): alone, behind a GELU,
and behind a residual's addition and LayerNorm, in one pass over memory each.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import wait_for_inputs
from .formats import padded_k
from .launch import ASM as _ASM
from .launch import launch
from .reference import ONE_127TH, SMALLEST_ABSMAX

_ABS_BITS = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)
_ROUND = tl.constexpr(12582912.0)
_SMALLEST = tl.constexpr(SMALLEST_ABSMAX)
_ONE_127TH = tl.constexpr(ONE_127TH)


@triton.jit
def load_rows(x_ptr, rows, cols, stride_x, M, K):
    """fp32 [rows, cols] of x [M, K]; zero outside."""
    mask = (rows[:, None] < M) & (cols[None, :] < K)
    return tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def absmax_bits(x):
    """The largest magnitude of each row of x fp32, as bits."""
    # As integers, magnitudes keep their order, and NaN and infinity rank above all numbers.
    return tl.max(x.to(tl.int32, bitcast=True) & _ABS_BITS, axis=1)


@triton.jit
def scales_of(bits, BLOCK_M: tl.constexpr):
    """From largest magnitudes as bits: the scale, the factor that quantizes, whether all is finite."""
    finite = bits < _INF_BITS
    absmax = tl.maximum(tl.where(finite, bits, 0).to(tl.float32, bitcast=True), _SMALLEST)
    inverse = tl.div_rn(tl.full((BLOCK_M,), 127.0, tl.float32), absmax)
    return tl.where(finite, absmax * _ONE_127TH, float("nan")), inverse, finite


@triton.jit
def codes_of(x, inverse, finite, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr):
    """x fp32 [BLOCK_M, BLOCK_K] quantized to int8, each atom in packed order."""
    v = x * inverse[:, None]
    if (
        ASM
    ):  # an instruction of its own: the compiler cannot fuse the product into it and round once, not twice
        v = tl.inline_asm_elementwise(
            "cvt.rni.f32.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        v = (v + _ROUND) - _ROUND  # to nearest even too: 1.5 * 2**23 leaves no fraction bits
    q = tl.where(finite[:, None], v, 0.0).to(tl.int8)
    q = tl.reshape(q, (BLOCK_M, BLOCK_K // 128, 2, 4, 16))
    return tl.reshape(tl.permute(q, (0, 1, 3, 4, 2)), (BLOCK_M, BLOCK_K))


@triton.jit
def _store(
    q_ptr, x, inverse, finite, rows, cols, stride_q, M, K_padded,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    q = codes_of(x, inverse, finite, BLOCK_M, BLOCK_K, ASM)
    mask = (rows[:, None] < M) & (cols[None, :] < K_padded)
    tl.store(q_ptr + rows[:, None] * stride_q + cols[None, :], q, mask=mask)


@triton.jit
def _gelu(x, x_ptr):
    """As torch does it: in fp32, rounded to x's dtype."""
    return (0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, clear_ptr, M, K, K_padded, stride_x, stride_q,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONE_TILE: tl.constexpr, CLEAR: tl.constexpr,
    GELU: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x or gelu(x) [M, K] -> q int8 [M, K_padded] in packed order, scale fp32 [M]. ONE_TILE: a row fits
    BLOCK_K, read it once. The first program also sets CLEAR int32 to zero.
    """
    wait_for_inputs(PDL)
    if CLEAR > 0:
        if tl.program_id(0) == 0:
            for i in tl.static_range(0, CLEAR, 128):
                tl.store(clear_ptr + i + tl.arange(0, 128), tl.zeros((128,), tl.int32))
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_K)
    x = load_rows(x_ptr, rows, lanes, stride_x, M, K)
    if GELU:
        x = _gelu(x, x_ptr)
    bits = absmax_bits(x)
    if not ONE_TILE:
        for k in range(BLOCK_K, K, BLOCK_K):
            more = load_rows(x_ptr, rows, k + lanes, stride_x, M, K)
            if GELU:
                more = _gelu(more, x_ptr)
            bits = tl.maximum(bits, absmax_bits(more))
    scale, inverse, finite = scales_of(bits, BLOCK_M)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    _store(q_ptr, x, inverse, finite, rows, lanes, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)
    if not ONE_TILE:
        for k in range(BLOCK_K, K_padded, BLOCK_K):
            x = load_rows(x_ptr, rows, k + lanes, stride_x, M, K)
            if GELU:
                x = _gelu(x, x_ptr)
            _store(q_ptr, x, inverse, finite, rows, k + lanes, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)


@triton.jit(do_not_specialize=["M"])
def add_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, M, K, K_padded, EPS,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(x + residual), all [M, K] of one dtype and contiguous; its q and scale as in
    ``quantize_kernel``. A row fits BLOCK_K. Sum and result are rounded to the dtype, as if by torch.
    """
    wait_for_inputs(PDL)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    v = load_rows(x_ptr, rows, cols, K, M, K) + load_rows(residual_ptr, rows, cols, K, M, K)
    v = v.to(x_ptr.dtype.element_ty).to(tl.float32)
    inside = (cols < K)[None, :]
    v = tl.where(inside, v - (tl.sum(v, axis=1) / K)[:, None], 0.0)
    v = v * tl.rsqrt(tl.sum(v * v, axis=1) / K + EPS)[:, None]
    weight = tl.load(weight_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
    y = (v * weight[None, :] + bias[None, :]).to(y_ptr.dtype.element_ty)
    mask = (rows[:, None] < M) & inside
    tl.store(y_ptr + rows[:, None] * K + cols[None, :], y, mask=mask)
    y = y.to(tl.float32)
    scale, inverse, finite = scales_of(absmax_bits(y), BLOCK_M)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    _store(q_ptr, y, inverse, finite, rows, cols, K_padded, M, K_padded, BLOCK_M, BLOCK_K, ASM)


@cache
def quantize_blocks(K: int) -> tuple[int, int, bool]:
    """BLOCK_M, BLOCK_K and ONE_TILE for rows of K: about 4,096 elements a program; rows above 8,192 are
    read twice, in pieces.
    """
    width = triton.next_power_of_2(padded_k(K))
    block_k = min(width, 8192 if width <= 8192 else 4096)
    block_m = max(1, 4096 // block_k)
    return block_m, block_k, width == block_k


def quantize(x: Tensor, clear: Tensor | None = None, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] (fp32, fp16 or bf16, rows contiguous), or its exact GELU, per token.

    ``clear``, int32 of a multiple of 128 elements, is set to zero by the same launch: a GEMM's tickets.

    Returns:
        q int8 [M, padded_k(K)] in packed order, zeros beyond K; scale float32 [M].
    """
    M, K = x.shape
    q = torch.empty((M, padded_k(K)), dtype=torch.int8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    if M == 0:
        return q, scale
    block_m, block_k, one_tile = quantize_blocks(K)
    launch(
        quantize_kernel,
        (triton.cdiv(M, block_m), 1),
        (x, q, scale, scale if clear is None else clear, M, K, q.shape[1], x.stride(0), q.stride(0)),
        (block_m, block_k, one_tile, 0 if clear is None else clear.numel(), gelu, _ASM),
        num_warps=4,
    )
    return q, scale


LONGEST_ROW = 8192
"""Largest K of ``add_norm_quantize``."""


def add_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x + residual) and its int8 form, in one launch.

    x and residual [M, K], contiguous and of one dtype (fp32, fp16 or bf16), K up to ``LONGEST_ROW``; weight
    and bias [K]. Not checked.

    Returns:
        y [M, K] in x's dtype; q and scale as ``quantize`` gives them for y.
    """
    M, K = x.shape
    y = torch.empty_like(x)
    q = torch.empty((M, padded_k(K)), dtype=torch.int8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    block_m, block_k, _ = quantize_blocks(K)
    launch(
        add_norm_quantize_kernel,
        (triton.cdiv(M, block_m), 1),
        (x, residual, weight, bias, y, q, scale, M, K, q.shape[1], eps),
        (block_m, block_k, _ASM),
        num_warps=4,
    )
    return y, q, scale
