"""The GEMM kernels: packed ternary weights times int8 or 16-bit activations.

    y[m, n] = gelu( scale_x[m] * scale[n] * sum_k x[m, k] * codes[n, k] + bias[n] )

Both compute the transpose, [BLOCK_N, BLOCK_M] = W x^T: with the weights on the left, the unpacked codes feed
the tensor cores as the register operand and never pass through shared memory. int32 sums are exact, and the
epilogue is one function with an explicit fused multiply-add, so a token's outputs do not depend on the tile,
the split or the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ASM, launch

if TYPE_CHECKING:
    from .tuning import KernelConfig


@triton.jit
def _unpack8(w, ASM: tl.constexpr):
    """uint8 [BN, BYTES] -> int8 [BN, 4 * BYTES] of 64 * code: atom by atom, slab by slab."""
    if ASM:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """{ .reg .b32 t0, t1, t2;
            shl.b32 t0, $4, 6; shl.b32 t1, $4, 4; shl.b32 t2, $4, 2;
            and.b32 $0, t0, 0xC0C0C0C0; and.b32 $1, t1, 0xC0C0C0C0;
            and.b32 $2, t2, 0xC0C0C0C0; and.b32 $3, $4, 0xC0C0C0C0; }""",
            "=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        w0 = ((w << 6) & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
        w1 = ((w << 4) & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
        w2 = ((w << 2) & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
        w3 = (w & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
    c = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BN, BYTES, high, low], slab = 2 * high + low
    c = tl.reshape(c, (c.shape[0], c.shape[1] // 32, 32, 2, 2))
    return tl.reshape(tl.permute(c, (0, 1, 3, 4, 2)), (c.shape[0], c.shape[1] * 128))


@triton.jit
def _unpack16(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """uint16 [BN, WORDS] -> fp16 or bf16 [BN, 8 * WORDS] of 2.0 * code: 0x4000 is 2.0 and 0xC000 is -2.0 in
    both.
    """
    if ASM:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            """{ .reg .b32 t0, t1, t2, t3, t4, t5, t6;
            shl.b32 t0, $8, 14; shl.b32 t1, $8, 12; shl.b32 t2, $8, 10; shl.b32 t3, $8, 8;
            shl.b32 t4, $8, 6; shl.b32 t5, $8, 4; shl.b32 t6, $8, 2;
            and.b32 $0, t0, 0xC000C000; and.b32 $1, t1, 0xC000C000; and.b32 $2, t2, 0xC000C000;
            and.b32 $3, t3, 0xC000C000; and.b32 $4, t4, 0xC000C000; and.b32 $5, t5, 0xC000C000;
            and.b32 $6, t6, 0xC000C000; and.b32 $7, $8, 0xC000C000; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
    else:
        w0 = ((w << 14) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w1 = ((w << 12) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w2 = ((w << 10) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w3 = ((w << 8) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w4 = ((w << 6) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w5 = ((w << 4) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w6 = ((w << 2) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w7 = (w & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
    c = tl.join(tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7)))
    c = tl.reshape(c, (c.shape[0], c.shape[1] // 16, 16, 2, 2, 2))  # [BN, atom, word, slab bits 2, 1, 0]
    c = tl.reshape(tl.permute(c, (0, 1, 3, 4, 5, 2)), (c.shape[0], c.shape[1] * 128))
    return c.to(DTYPE, bitcast=True)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Grouped order: GROUP token tiles share their activations while the program ids walk along N."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = pid // in_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + pid % in_group % size, pid % in_group // size


@triton.jit
def _store(
    y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y,
    UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Scale, add the bias, apply GELU and store v fp32 [BLOCK_N, BLOCK_M] as y [BLOCK_M, BLOCK_N]."""
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0) * UNIT
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        v = tl.math.fma(v, tl.broadcast_to(scale[:, None], v.shape), tl.broadcast_to(bias[:, None], v.shape))
    else:
        v = v * scale[:, None]
    if GELU:
        v = 0.5 * v * (1.0 + tl.math.erf(v * 0.7071067811865476))
    mask = (m[:, None] < M) & (n[None, :] < N)
    out = tl.trans(v).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None].to(tl.int64) * stride_y + n[None, :], out, mask=mask)


@triton.jit
def _wait_for_inputs(PDL: tl.constexpr):
    """With programmatic dependent launch this kernel starts while the one before it ends: wait for its
    results, and let the next one start.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _prefetch(w_ptr, rows, stride, first, last, LINES: tl.constexpr, ASM: tl.constexpr):
    """Ask for lines of 128 bytes, ``first`` to ``last`` - 1 bytes into these rows of packed weights, to
    come to the L2 cache: all at once, and while the kernel before may still run. Nothing is read here, so
    it does not matter if that kernel writes the weights.
    """
    if ASM:
        line = tl.minimum(first + tl.arange(0, LINES) * 128, last - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [w_ptr + rows[:, None] * stride + line[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["M"])
def gemm_int8_kernel(
    x_ptr, packed_ptr, scale_x_ptr, scale_ptr, bias_ptr, y_ptr, shares_ptr, tickets_ptr,
    M, N, K_padded, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, LINES: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x int8 [M, K_padded] in packed order. With SPLIT > 1, program_id(1) takes a share of K; the last
    program to finish a tile, which the tile's ticket tells, adds the shares and stores.
    """
    pm, pn = _tile(M, N, BLOCK_M, BLOCK_N, GROUP)
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
    w = (
        packed_ptr
        + rows_n[:, None] * stride_p
        + (first * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4))[None, :]
    )
    if LINES > 0:
        _prefetch(packed_ptr, rows_n, stride_p, first * (BLOCK_K // 4), last * (BLOCK_K // 4), LINES, ASM)
    _wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for _ in tl.range(first, last):
        if BLOCK_M == 16:  # but not where one token would be read sixteen times
            x_tile = tl.load(x, mask=(m < M)[None, :], other=0)
        else:
            x_tile = tl.load(x)
        acc = tl.dot(_unpack8(tl.load(w), ASM), x_tile, acc, out_dtype=tl.int32)
        x += BLOCK_K
        w += BLOCK_K // 4
    if SPLIT > 1:
        offsets = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        shares = shares_ptr + tl.program_id(0).to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M) + offsets
        tl.store(shares + tl.program_id(1) * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()  # every thread has stored its part before the ticket is drawn
        ticket = tl.atomic_add(tickets_ptr + tl.program_id(0), 1, sem="acq_rel")
        if ticket == SPLIT - 1:
            acc = tl.load(shares, cache_modifier=".cg")
            for i in tl.static_range(1, SPLIT):
                acc += tl.load(shares + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            scale_x = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)
            v = acc.to(tl.float32) * scale_x[None, :]
            _store(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, 1.0 / 64.0, HAS_BIAS, GELU)
    else:
        scale_x = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)
        v = acc.to(tl.float32) * scale_x[None, :]
        _store(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, 1.0 / 64.0, HAS_BIAS, GELU)


@triton.jit(do_not_specialize=["M"])
def gemm_16bit_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, K_padded, stride_x, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    LINES: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x fp16 or bf16 [M, K] in natural order; packed as uint16 words, stride_p words a row."""
    pm, pn = _tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    m = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows_m = tl.minimum(m, M - 1).to(tl.int64)
    rows_n = tl.minimum(n, N - 1).to(tl.int64)
    x = x_ptr + rows_m[None, :] * stride_x + k[:, None]
    w = packed_ptr + rows_n[:, None] * stride_p + tl.arange(0, BLOCK_K // 8)[None, :]
    if LINES > 0:
        _prefetch(
            packed_ptr.to(tl.pointer_type(tl.uint8)), rows_n, stride_p * 2, 0, K_padded // 4, LINES, ASM
        )
    _wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, K_padded // BLOCK_K):
        if BLOCK_M == 16:
            x_tile = tl.load(x, mask=(m < M)[None, :] & (k[:, None] < K - step * BLOCK_K), other=0.0)
        elif EVEN_K:
            x_tile = tl.load(x)
        else:
            x_tile = tl.load(x, mask=k[:, None] < K - step * BLOCK_K, other=0.0)
        acc = tl.dot(_unpack16(tl.load(w), x_ptr.dtype.element_ty, ASM), x_tile, acc)
        if ASM:  # without this no-op ptxas serializes the register-operand wgmma (warning C7515)
            acc = tl.inline_asm_elementwise(
                "// $0 $1", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1
            )
        x += BLOCK_K
        w += BLOCK_K // 8
    _store(y_ptr, acc, scale_ptr, bias_ptr, m, n, M, N, stride_y, 0.5, HAS_BIAS, GELU)


def constants(config: KernelConfig, K_padded: int, has_bias: bool, gelu: bool) -> tuple[int | bool, ...]:
    """Compile-time arguments of ``gemm_int8_kernel`` but the last."""
    tile = config.block_m, config.block_n, config.block_k, config.group_m
    return *tile, config.split_k, config.lines(K_padded), has_bias, gelu, ASM


def gemm_int8(
    x_q: Tensor, scale_x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None,
    config: KernelConfig, out_dtype: torch.dtype, gelu: bool = False, tickets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``out_dtype`` from ``activations.quantize``'s output and a packed weight; arguments are not
    checked.

    With ``split_k > 1``, ``tickets`` must be ``make_tickets``'s, set to zero (None: made here, by a launch
    of its own).
    """
    M, K_padded = x_q.shape
    N = packed.shape[0]
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    tiles, split = config.tiles(M, N), config.split_k
    shares = scale_x  # unused without a split
    if split > 1:
        size = tiles * split * config.block_m * config.block_n
        shares = torch.empty(size, dtype=torch.int32, device=x_q.device)
        tickets = make_tickets(x_q, N, config).zero_() if tickets is None else tickets
    launch(
        gemm_int8_kernel,
        (tiles, split),
        (
            x_q, packed, scale_x, scale, scale if bias is None else bias, y, shares,
            scale_x if tickets is None else tickets, M, N, K_padded, packed.stride(0), y.stride(0),
        ),
        constants(config, K_padded, bias is not None, gelu),
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return y


def make_tickets(x: Tensor, N: int, config: KernelConfig) -> Tensor:
    """int32, one for each tile of the product of x [M, K], rounded up to 128; not set."""
    return torch.empty(-(-config.tiles(x.shape[0], N) // 128) * 128, dtype=torch.int32, device=x.device)


def gemm_16bit(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None,
    config: KernelConfig, out_dtype: torch.dtype, gelu: bool = False,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``out_dtype`` from x fp16 or bf16 [M, K], rows contiguous; arguments are not checked."""
    M, K = x.shape
    N = packed.shape[0]
    words = packed.view(torch.uint16)
    y = torch.empty((M, N), dtype=out_dtype, device=x.device)
    launch(
        gemm_16bit_kernel,
        (config.tiles(M, N), 1),
        (
            x, words, scale, scale if bias is None else bias, y,
            M, N, K, words.shape[1] * 8, x.stride(0), words.stride(0), y.stride(0),
        ),
        (
            config.block_m, config.block_n, config.block_k, config.group_m, config.lines(words.shape[1] * 8),
            K % config.block_k == 0, bias is not None, gelu, ASM,
        ),
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return y
