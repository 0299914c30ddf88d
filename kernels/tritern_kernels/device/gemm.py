"""The GEMM kernels: packed weights of 2 or 4 bits times int8 or 16-bit activations.

    y[m, n] = scale_x[m] * scale[n] * sum_k x[m, k] * codes[n, k] + bias[n]

Both compute the transpose, [BLOCK_N, BLOCK_M] = W x^T. With the weights on the left, the unpacked codes are
the register operand of the tensor cores and never pass through shared memory. int32 sums are exact, and the
epilogue is one function with an explicit fused multiply-add. So a token's outputs do not depend on the tile,
the split or the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import prefetch, store_scaled, unpack8, unpack16, wait_for_inputs, warm

_GROUP = tl.constexpr(8)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grouped order: _GROUP token tiles share their activations while the program ids walk along N."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = _GROUP * tl.cdiv(N, BLOCK_N)
    first = pid // in_group * _GROUP
    size = tl.minimum(tiles_m - first, _GROUP)
    return first + pid % in_group % size, pid % in_group // size


@triton.jit(do_not_specialize=["M"])
def gemm_int8_kernel(
    x_ptr, packed_ptr, scale_x_ptr, scale_ptr, bias_ptr, y_ptr, shares_ptr, tickets_ptr,
    M, N, K_padded, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, LINES: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x int8 [M, K_padded] in packed order. With SPLIT > 1, program_id(1) takes a share of K. The last
    program to finish a tile (by the tile's ticket) adds the shares and stores the sum.
    """
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    pm, pn = _tile(M, N, BLOCK_M, BLOCK_N)
    m = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    first = 0
    last = K_padded // BLOCK_K
    if SPLIT > 1:
        share = tl.cdiv(last, SPLIT)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, last)
    rows_m = tl.minimum(m, M - 1).to(tl.int64)  # reading a valid row twice is cheaper than masking the loads
    rows_n = tl.minimum(n, N - 1).to(tl.int64)
    x = x_ptr + rows_m[None, :] * K_padded + (first * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    w = packed_ptr + rows_n[:, None] * stride_p + (first * BYTES + tl.arange(0, BYTES))[None, :]
    if LINES > 0:
        prefetch(packed_ptr, rows_n, stride_p, first * BYTES, last * BYTES, LINES, ASM)
    wait_for_inputs(PDL)
    if LINES == 0:
        warm(scale_x_ptr + rows_m, ASM)
        warm(scale_ptr + rows_n, ASM)
        if HAS_BIAS:
            warm(bias_ptr + rows_n, ASM)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for _ in tl.range(first, last):
        if BLOCK_M == 16:  # but not where one token would be read sixteen times
            x_tile = tl.load(x, mask=(m < M)[None, :], other=0)
        else:
            x_tile = tl.load(x)
        acc = tl.dot(unpack8(tl.load(w), BITS, ASM), x_tile, acc, out_dtype=tl.int32)
        x += BLOCK_K
        w += BYTES
    if SPLIT > 1:
        offsets = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        shares = shares_ptr + tl.program_id(0).to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M) + offsets
        tl.store(shares + tl.program_id(1) * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()  # every thread must store its part before the ticket is drawn
        ticket = tl.atomic_add(tickets_ptr + tl.program_id(0), 1, sem="acq_rel")
        if ticket == SPLIT - 1:
            acc = tl.load(shares, cache_modifier=".cg")
            for i in tl.static_range(1, SPLIT):
                acc += tl.load(shares + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            scale_x = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)
            v = acc.to(tl.float32) * scale_x[None, :]
            store_scaled(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, (1 << BITS) / 256.0, HAS_BIAS)
    else:
        scale_x = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)
        v = acc.to(tl.float32) * scale_x[None, :]
        store_scaled(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, (1 << BITS) / 256.0, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def gemm_16bit_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, K_padded, stride_x, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, LINES: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x fp16 or bf16 [M, K] in natural order; packed as uint16 words, stride_p words per row."""
    WORDS: tl.constexpr = BLOCK_K * BITS // 16
    pm, pn = _tile(M, N, BLOCK_M, BLOCK_N)
    m = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows_m = tl.minimum(m, M - 1).to(tl.int64)
    rows_n = tl.minimum(n, N - 1).to(tl.int64)
    x = x_ptr + rows_m[None, :] * stride_x + k[:, None]
    w = packed_ptr + rows_n[:, None] * stride_p + tl.arange(0, WORDS)[None, :]
    if LINES > 0:
        prefetch(
            packed_ptr.to(tl.pointer_type(tl.uint8)),
            rows_n,
            stride_p * 2,
            0,
            K_padded * BITS // 8,
            LINES,
            ASM,
        )
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, K_padded // BLOCK_K):
        if BLOCK_M == 16:
            x_tile = tl.load(x, mask=(m < M)[None, :] & (k[:, None] < K - step * BLOCK_K), other=0.0)
        elif EVEN_K:
            x_tile = tl.load(x)
        else:
            x_tile = tl.load(x, mask=k[:, None] < K - step * BLOCK_K, other=0.0)
        acc = tl.dot(unpack16(tl.load(w), x_ptr.dtype.element_ty, BITS, ASM), x_tile, acc)
        if ASM:  # without this no-op ptxas serializes the register-operand wgmma (warning C7515)
            acc = tl.inline_asm_elementwise(
                "// $0 $1", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1
            )
        x += BLOCK_K
        w += WORDS
    store_scaled(y_ptr, acc, scale_ptr, bias_ptr, m, n, M, N, stride_y, BITS / 4.0, HAS_BIAS)
