"""Per-token int8 quantization, alone or after a GELU or SwiGLU, in one pass over memory. The output has the
order of the int8 GEMM (see ``formats``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import ASM
from ..reference import ONE_127TH, SMALLEST_ABSMAX
from .common import wait_for_inputs

_ABS_BITS = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)
_ROUND = tl.constexpr(12582912.0)
_SMALLEST = tl.constexpr(SMALLEST_ABSMAX)
_ONE_127TH = tl.constexpr(ONE_127TH)
_ASM = tl.constexpr(ASM)


@triton.jit
def load_rows(x_ptr, rows, cols, stride_x, M, K):
    """fp32 [rows, cols] of x [M, K]; zero outside."""
    mask = (rows[:, None] < M) & (cols[None, :] < K)
    return tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, like_ptr):
    """x rounded to the dtype of the pointer's elements, in fp32."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def rounded_product(x, y, like_ptr):
    """x * y, both fp32 of one shape, rounded like ``rounded``, never fused with a later addition."""
    if _ASM:
        # LLVM makes a rounded product of 16-bit values a 16-bit multiplication, and fuses it with the next
        # sum into one fma: the last bit of one in eight results of a rotation differed from torch's.
        z = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        z = x * y
    return rounded(z, like_ptr)


@triton.jit
def absmax_bits(x):
    """The largest magnitude of each row of x fp32, as bits."""
    # As integers, magnitudes keep their order, and NaN and infinity rank above all numbers.
    return tl.max(x.to(tl.int32, bitcast=True) & _ABS_BITS, axis=1)


@triton.jit
def scales_of(bits, BLOCK_M: tl.constexpr):
    """From largest magnitudes as bits: the scale, the quantizing factor, and whether all is finite."""
    finite = bits < _INF_BITS
    absmax = tl.maximum(tl.where(finite, bits, 0).to(tl.float32, bitcast=True), _SMALLEST)
    inverse = tl.div_rn(tl.full((BLOCK_M,), 127.0, tl.float32), absmax)
    return tl.where(finite, absmax * _ONE_127TH, float("nan")), inverse, finite


@triton.jit
def codes_of(x, inverse, finite, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr):
    """x fp32 [BLOCK_M, BLOCK_K] quantized to int8, each atom in packed order; zeros if not ``finite``."""
    if ASM:
        # Adding 1.5 * 2**23 rounds to nearest even and leaves the integer in the low byte. Separate
        # instructions keep product and sum from being fused: that would round once, and torch rounds twice.
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
def store_codes(
    q_ptr, x, inverse, finite, rows, cols, stride_q, M, K_padded,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Store x fp32 [rows, cols] of [M, K_padded] as int8 codes."""
    q = codes_of(x, inverse, finite, BLOCK_M, BLOCK_K, ASM)
    mask = (rows[:, None] < M) & (cols[None, :] < K_padded)
    tl.store(q_ptr + rows[:, None] * stride_q + cols[None, :], q, mask=mask)


@triton.jit
def _reciprocal(x, ASM: tl.constexpr):
    if ASM:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def _exp2(x, ASM: tl.constexpr):
    if ASM:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _gelu(x, ASM: tl.constexpr):
    """x fp32 -> relu(x) - |x| erfc(|x| / sqrt 2) / 2, to 3e-7 |x| (Abramowitz and Stegun 7.1.26). It has a
    third of the instructions of the library's erf; that would take longer than reading and writing memory.
    """
    a = tl.abs(x)
    t = _reciprocal(1.0 + 0.231641888 * a, ASM)
    e = _exp2(-0.72134752 * a * a, ASM)
    p = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return tl.maximum(x, 0.0) - a * p * e


@triton.jit
def _read(x_ptr, rows, cols, stride_x, M, K, ACTIVATION: tl.constexpr, ASM: tl.constexpr):
    x = load_rows(x_ptr, rows, cols, stride_x, M, K)
    if ACTIVATION == "gelu":
        x = _gelu(x, ASM)
    if ACTIVATION == "swiglu":
        x = rounded(x * _reciprocal(1.0 + _exp2(-1.4426950408889634 * x, ASM), ASM), x_ptr)
        x = rounded(x * load_rows(x_ptr + K, rows, cols, stride_x, M, K), x_ptr)
    return x


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, clear_ptr, M, K, K_padded, stride_x, stride_q,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, CLEAR: tl.constexpr,
    ACTIVATION: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x, gelu(x) or swiglu(x) [M, K] -> q int8 [M, K_padded] in packed order, scale fp32 [M]. A row is 1 or
    3 pieces of BLOCK_K in registers; with PIECES = 0 it is any number of pieces, read twice. For swiglu a row
    of x holds gate, then up, K each; silu and product are rounded to the dtype, like torch's. The first
    program also sets CLEAR int32 to zero.
    """
    wait_for_inputs(PDL)
    if CLEAR > 0:
        if tl.program_id(0) == 0:
            for i in tl.static_range(0, CLEAR, 128):
                tl.store(clear_ptr + i + tl.arange(0, 128), tl.zeros((128,), tl.int32))
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.arange(0, BLOCK_K)
    second, third = BLOCK_K + first, 2 * BLOCK_K + first
    x = _read(x_ptr, rows, first, stride_x, M, K, ACTIVATION, ASM)
    bits = absmax_bits(x)
    if PIECES == 3:
        y = _read(x_ptr, rows, second, stride_x, M, K, ACTIVATION, ASM)
        z = _read(x_ptr, rows, third, stride_x, M, K, ACTIVATION, ASM)
        bits = tl.maximum(bits, tl.maximum(absmax_bits(y), absmax_bits(z)))
    if PIECES == 0:
        for k in range(BLOCK_K, K, BLOCK_K):
            more = _read(x_ptr, rows, k + first, stride_x, M, K, ACTIVATION, ASM)
            bits = tl.maximum(bits, absmax_bits(more))
    scale, inverse, finite = scales_of(bits, BLOCK_M)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    store_codes(q_ptr, x, inverse, finite, rows, first, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)
    if PIECES == 3:
        store_codes(q_ptr, y, inverse, finite, rows, second, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)
        store_codes(q_ptr, z, inverse, finite, rows, third, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM)
    if PIECES == 0:
        for k in range(BLOCK_K, K_padded, BLOCK_K):
            x = _read(x_ptr, rows, k + first, stride_x, M, K, ACTIVATION, ASM)
            store_codes(
                q_ptr, x, inverse, finite, rows, k + first, stride_q, M, K_padded, BLOCK_M, BLOCK_K, ASM
            )
