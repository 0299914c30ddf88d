"""The GEMM kernels for few tokens, where reading the packed weights takes longer than computing.

Products and epilogue are those of ``gemm``, but the warps of a program share K: each multiplies its own part
of every step, and the parts are added once, at the end. So tiles can be small and many. They fill the GPU
without splitting K among programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import prefetch, store_scaled, unpack8, unpack16, wait_for_inputs
from .quantize import absmax_bits, codes_of, load_rows, scales_of


@triton.jit
def _parts(BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """k [PARTS, BLOCK_K] of the first step; part p has its p-th BLOCK_K."""
    return tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _by_part(w, PARTS: tl.constexpr):
    """[BN, PARTS * X] -> [PARTS * BN, X]. (Loaded part by part, the weights would conflict in the banks of
    shared memory.)
    """
    w = tl.permute(tl.reshape(w, (w.shape[0], PARTS, w.shape[1] // PARTS)), (1, 0, 2))
    return tl.reshape(w, (PARTS * w.shape[1], w.shape[2]))


@triton.jit
def _add_parts(acc, PARTS: tl.constexpr):
    """[PARTS, BN, BM] -> [BN, BM]. Halving brings the parts into one thread before they are added. tl.sum
    would shuffle every element and take longer than the products.
    """
    acc = tl.permute(acc, (1, 2, 0))
    for _ in tl.static_range(PARTS.bit_length() - 1):
        acc = tl.reshape(acc, (acc.shape[0], acc.shape[1], acc.shape[2] // 2, 2))
        a, b = tl.split(acc)
        acc = a + b
    return tl.reshape(acc, (acc.shape[0], acc.shape[1]))


@triton.jit(do_not_specialize=["M"])
def gemm_int8_few_kernel(
    x_ptr, packed_ptr, scale_x_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K_padded, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    EVEN_K: tl.constexpr, LINES: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x int8 [M, K_padded] in packed order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.minimum(n, N - 1).to(tl.int64)
    rows_m = tl.minimum(m, M - 1).to(tl.int64)
    k, byte = _parts(BLOCK_K, PARTS), tl.arange(0, PARTS * BLOCK_K * BITS // 8)
    x = x_ptr + rows_m[None, None, :] * K_padded + k[:, :, None]
    w = packed_ptr + rows_n[:, None] * stride_p + byte[None, :]
    if LINES > 0:
        prefetch(packed_ptr, rows_n, stride_p, 0, K_padded * BITS // 8, LINES, ASM)
    wait_for_inputs(PDL)
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in tl.range(0, tl.cdiv(K_padded, PARTS * BLOCK_K)):
        here = (m < M)[None, None, :]
        if EVEN_K:
            w_tile = tl.load(w)
        else:
            left = K_padded - step * (PARTS * BLOCK_K)
            w_tile = tl.load(w, mask=byte[None, :] < left * BITS // 8, other=0)
            here = here & (k[:, :, None] < left)
        x_tile = tl.load(x, mask=here, other=0)
        codes = unpack8(_by_part(w_tile, PARTS), BITS, ASM)
        acc = tl.dot(tl.reshape(codes, (PARTS, BLOCK_N, BLOCK_K)), x_tile, acc, out_dtype=tl.int32)
        x += PARTS * BLOCK_K
        w += PARTS * BLOCK_K * BITS // 8
    scale_x = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)
    v = _add_parts(acc, PARTS).to(tl.float32) * scale_x[None, :]
    store_scaled(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, (1 << BITS) / 256.0, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def gemm_quantizing_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, K_padded, stride_x, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x fp32, fp16 or bf16 [M, K], K at most PARTS * BLOCK_K. Every program quantizes x itself, to int8 per
    token, with all of K in one step.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.minimum(n, N - 1).to(tl.int64)
    byte = tl.arange(0, PARTS * BLOCK_K * BITS // 8)
    w = packed_ptr + rows_n[:, None] * stride_p + byte[None, :]
    prefetch(packed_ptr, rows_n, stride_p, 0, K_padded * BITS // 8, PARTS * BLOCK_K * BITS // 1024, ASM)
    wait_for_inputs(PDL)
    w_tile = tl.load(w, mask=byte[None, :] < K_padded * BITS // 8, other=0)
    x = load_rows(x_ptr, m.to(tl.int64), tl.arange(0, PARTS * BLOCK_K), stride_x, M, K)
    scale_x, inverse, finite = scales_of(absmax_bits(x), BLOCK_M)
    q = codes_of(x, inverse, finite, BLOCK_M, PARTS * BLOCK_K, ASM)
    q = tl.permute(tl.reshape(q, (BLOCK_M, PARTS, BLOCK_K)), (1, 2, 0))
    codes = unpack8(_by_part(w_tile, PARTS), BITS, ASM)
    acc = tl.dot(tl.reshape(codes, (PARTS, BLOCK_N, BLOCK_K)), q, out_dtype=tl.int32)
    v = _add_parts(acc, PARTS).to(tl.float32) * scale_x[None, :]
    store_scaled(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, (1 << BITS) / 256.0, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def gemm_16bit_few_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, K_padded, stride_x, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    EVEN_K: tl.constexpr, LINES: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x fp16 or bf16 [M, K] in natural order; packed as uint16 words, stride_p words per row."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.minimum(n, N - 1).to(tl.int64)
    rows_m = tl.minimum(m, M - 1).to(tl.int64)
    k, word = _parts(BLOCK_K, PARTS), tl.arange(0, PARTS * BLOCK_K * BITS // 16)
    x = x_ptr + rows_m[None, None, :] * stride_x + k[:, :, None]
    w = packed_ptr + rows_n[:, None] * stride_p + word[None, :]
    if LINES > 0:
        bytes_ptr = packed_ptr.to(tl.pointer_type(tl.uint8))
        prefetch(bytes_ptr, rows_n, stride_p * 2, 0, K_padded * BITS // 8, LINES, ASM)
    wait_for_inputs(PDL)
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(K_padded, PARTS * BLOCK_K)):
        here = (m < M)[None, None, :]
        if EVEN_K:
            w_tile = tl.load(w)
        else:
            done = step * (PARTS * BLOCK_K)
            w_tile = tl.load(w, mask=word[None, :] < (K_padded - done) * BITS // 16, other=0)
            here = here & (k[:, :, None] < K - done)
        x_tile = tl.load(x, mask=here, other=0.0)
        codes = unpack16(_by_part(w_tile, PARTS), x_ptr.dtype.element_ty, BITS, ASM)
        acc = tl.dot(tl.reshape(codes, (PARTS, BLOCK_N, BLOCK_K)), x_tile, acc)
        x += PARTS * BLOCK_K
        w += PARTS * BLOCK_K * BITS // 16
    v = _add_parts(acc, PARTS)
    store_scaled(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, BITS / 4.0, HAS_BIAS)
