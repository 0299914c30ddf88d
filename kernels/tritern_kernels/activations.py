"""Per-token int8 quantization, written in the order the int8 GEMM reads (see ``formats``): alone, behind a
GELU, and behind a residual's addition and LayerNorm, in one pass over memory each.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import wait_for_inputs
from .formats import padded_k
from .launch import ASM, launch
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
    """x fp32 [BLOCK_M, BLOCK_K] quantized to int8, each atom in packed order; zeros where not ``finite``."""
    if ASM:
        # Adding 1.5 * 2**23 rounds to nearest even and leaves the integer in the low byte. As instructions of
        # their own, product and sum are not fused into one, which would round once where torch rounds twice.
        q = tl.inline_asm_elementwise(
            """{ .reg .f32 a, b, c, d; .reg .b32 i, j, k, l;
            mul.rn.f32 a, $1, $5; mul.rn.f32 b, $2, $6; mul.rn.f32 c, $3, $7; mul.rn.f32 d, $4, $8;
            add.rn.f32 a, a, 0f4B400000; add.rn.f32 b, b, 0f4B400000;
            add.rn.f32 c, c, 0f4B400000; add.rn.f32 d, d, 0f4B400000;
            mov.b32 i, a; mov.b32 j, b; mov.b32 k, c; mov.b32 l, d;
            and.b32 i, i, $9; and.b32 j, j, $10; and.b32 k, k, $11; and.b32 l, l, $12;
            prmt.b32 i, i, j, 0x0040; prmt.b32 k, k, l, 0x0040; prmt.b32 $0, i, k, 0x5410; }""",
            "=r,f,f,f,f,f,f,f,f,r,r,r,r",
            [
                x,
                tl.broadcast_to(inverse[:, None], x.shape),
                tl.broadcast_to(-finite.to(tl.int32)[:, None], x.shape),
            ],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        v = (x * inverse[:, None] + _ROUND) - _ROUND
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
def _gelu(x, ASM: tl.constexpr):
    """x fp32 -> relu(x) - |x| erfc(|x| / sqrt 2) / 2, to 3e-7 |x|: 7.1.26 of Abramowitz and Stegun, with a
    third of the instructions of the library's erf, which would take longer than reading and writing memory.
    """
    a = tl.abs(x)
    t = 1.0 + 0.231641888 * a
    e = -0.72134752 * a * a
    if ASM:
        t = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t, e = 1.0 / t, tl.exp2(e)
    p = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return tl.maximum(x, 0.0) - a * p * e


@triton.jit
def _read(x_ptr, rows, cols, stride_x, M, K, GELU: tl.constexpr, ASM: tl.constexpr):
    x = load_rows(x_ptr, rows, cols, stride_x, M, K)
    return _gelu(x, ASM) if GELU else x


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, clear_ptr, M, K, K_padded, stride_x, stride_q,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, CLEAR: tl.constexpr,
    GELU: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x or gelu(x) [M, K] -> q int8 [M, K_padded] in packed order, scale fp32 [M]. A row is 1 or 3 pieces of
    BLOCK_K, held in registers; PIECES = 0: any number, read twice. The first program also sets CLEAR int32 to
    zero.
    """
    wait_for_inputs(PDL)
    if CLEAR > 0:
        if tl.program_id(0) == 0:
            for i in tl.static_range(0, CLEAR, 128):
                tl.store(clear_ptr + i + tl.arange(0, 128), tl.zeros((128,), tl.int32))
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.arange(0, BLOCK_K)
    second, third = BLOCK_K + first, 2 * BLOCK_K + first
    x = _read(x_ptr, rows, first, stride_x, M, K, GELU, ASM)
    bits = absmax_bits(x)
    if PIECES == 3:
        y = _read(x_ptr, rows, second, stride_x, M, K, GELU, ASM)
        z = _read(x_ptr, rows, third, stride_x, M, K, GELU, ASM)
        bits = tl.maximum(bits, tl.maximum(absmax_bits(y), absmax_bits(z)))
    if PIECES == 0:
        for k in range(BLOCK_K, K, BLOCK_K):
            more = _read(x_ptr, rows, k + first, stride_x, M, K, GELU, ASM)
            bits = tl.maximum(bits, absmax_bits(more))
    scale, inverse, finite = scales_of(bits, BLOCK_M)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    _store(q_ptr, x, inverse, finite, rows, first, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)
    if PIECES == 3:
        _store(q_ptr, y, inverse, finite, rows, second, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)
        _store(q_ptr, z, inverse, finite, rows, third, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)
    if PIECES == 0:
        for k in range(BLOCK_K, K_padded, BLOCK_K):
            x = _read(x_ptr, rows, k + first, stride_x, M, K, GELU, ASM)
            _store(q_ptr, x, inverse, finite, rows, k + first, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)


@triton.jit
def _sum(x_ptr, residual_ptr, rows, cols, M, K):
    v = load_rows(x_ptr, rows, cols, K, M, K) + load_rows(residual_ptr, rows, cols, K, M, K)
    return v.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _normalized(v, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, cols, M, K):
    """Stores y and returns it as stored, in fp32."""
    inside = cols < K
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = (v - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * K + cols[None, :], y, mask=(rows[:, None] < M) & inside[None, :])
    return y.to(tl.float32)


@triton.jit
def _squares(v, mean, cols, K):
    d = tl.where((cols < K)[None, :], v - mean[:, None], 0.0)
    return tl.sum(d * d, axis=1)


@triton.jit(do_not_specialize=["M"])
def add_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, M, K, K_padded, EPS,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(x + residual), all [M, K] of one dtype and contiguous; its q and scale, and PIECES (1 or
    3), as in ``quantize_kernel``. Sum and result are rounded to the dtype, as if by torch.
    """
    wait_for_inputs(PDL)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.arange(0, BLOCK_K)
    second, third = BLOCK_K + first, 2 * BLOCK_K + first
    x = _sum(x_ptr, residual_ptr, rows, first, M, K)
    total = tl.sum(x, axis=1)
    if PIECES == 3:
        y = _sum(x_ptr, residual_ptr, rows, second, M, K)
        z = _sum(x_ptr, residual_ptr, rows, third, M, K)
        total += tl.sum(y, axis=1) + tl.sum(z, axis=1)
    mean = total / K
    total = _squares(x, mean, first, K)
    if PIECES == 3:
        total += _squares(y, mean, second, K) + _squares(z, mean, third, K)
    rstd = tl.rsqrt(total / K + EPS)
    x = _normalized(x, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, first, M, K)
    bits = absmax_bits(x)
    if PIECES == 3:
        y = _normalized(y, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, second, M, K)
        z = _normalized(z, mean, rstd, weight_ptr, bias_ptr, y_ptr, rows, third, M, K)
        bits = tl.maximum(bits, tl.maximum(absmax_bits(y), absmax_bits(z)))
    scale, inverse, finite = scales_of(bits, BLOCK_M)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    _store(q_ptr, x, inverse, finite, rows, first, K_padded, M, K_padded, BLOCK_M, BLOCK_K, ASM)
    if PIECES == 3:
        _store(q_ptr, y, inverse, finite, rows, second, K_padded, M, K_padded, BLOCK_M, BLOCK_K, ASM)
        _store(q_ptr, z, inverse, finite, rows, third, K_padded, M, K_padded, BLOCK_M, BLOCK_K, ASM)


@cache
def quantize_blocks(K: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_K and PIECES for rows of K: about 4,096 elements a program. Rows of 3 * 2**n, which is
    what BERTs have, are three pieces, so that no lane is idle; rows above 8,192 are read twice, in pieces.
    """
    padded = padded_k(K)
    if padded % 3 == 0 and padded <= 6144 and (piece := padded // 3) & (piece - 1) == 0:
        return max(1, 1024 // piece), piece, 3
    width = triton.next_power_of_2(padded)
    block_k = min(width, 8192 if width <= 8192 else 4096)
    return max(1, 4096 // block_k), block_k, int(width == block_k)


def quantize(x: Tensor, clear: Tensor | None = None, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] (fp32, fp16 or bf16, rows contiguous), or its GELU, per token.

    ``clear``, int32 of a multiple of 128 elements, is set to zero by the same launch: a GEMM's tickets.

    Returns:
        q int8 [M, padded_k(K)] in packed order, zeros beyond K; scale float32 [M].
    """
    M, K = x.shape
    q = torch.empty((M, padded_k(K)), dtype=torch.int8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    if M == 0:
        return q, scale
    block_m, block_k, pieces = quantize_blocks(K)
    launch(
        quantize_kernel,
        (triton.cdiv(M, block_m), 1),
        (x, q, scale, scale if clear is None else clear, M, K, q.shape[1], x.stride(0), q.stride(0)),
        (block_m, block_k, pieces, 0 if clear is None else clear.numel(), gelu, ASM),
        num_warps=4,
    )
    return q, scale


def add_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x + residual) and its int8 form, in one launch.

    x and residual [M, K], contiguous and of one dtype (fp32, fp16 or bf16), K up to 8,192; weight
    and bias [K]. Not checked.

    Returns:
        y [M, K] in x's dtype; q and scale as ``quantize`` gives them for y.
    """
    M, K = x.shape
    y = torch.empty_like(x)
    q = torch.empty((M, padded_k(K)), dtype=torch.int8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    if M == 0:
        return y, q, scale
    block_m, block_k, pieces = quantize_blocks(K)
    launch(
        add_norm_quantize_kernel,
        (triton.cdiv(M, block_m), 1),
        (x, residual, weight, bias, y, q, scale, M, K, q.shape[1], eps),
        (block_m, block_k, pieces, ASM),
        num_warps=4,
    )
    return y, q, scale
