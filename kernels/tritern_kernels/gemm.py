"""The GEMM kernels: packed ternary weights times int8 or 16-bit activations.

    y[m, n] = gelu( scale_x[m] * scale[n] * sum_k x[m, k] * codes[n, k] + bias[n] )

Both compute the transpose, [BLOCK_N, BLOCK_M] = W x^T: with the weights on the left, the unpacked codes feed
the tensor cores as the register operand and never pass through shared memory. int32 sums are exact, and the
epilogue is one function with an explicit fused multiply-add, so a token's outputs do not depend on the tile,
the split or the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm_few
from .common import prefetch, store_scaled, unpack8, unpack16, wait_for_inputs, warm
from .formats import padded_k
from .launch import ASM, launch

if TYPE_CHECKING:
    from .config import KernelConfig


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Grouped order: GROUP token tiles share their activations while the program ids walk along N."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = pid // in_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + pid % in_group % size, pid % in_group // size


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
        prefetch(packed_ptr, rows_n, stride_p, first * (BLOCK_K // 4), last * (BLOCK_K // 4), LINES, ASM)
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
        acc = tl.dot(unpack8(tl.load(w), ASM), x_tile, acc, out_dtype=tl.int32)
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
            store_scaled(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, 1.0 / 64.0, HAS_BIAS, GELU)
    else:
        scale_x = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)
        v = acc.to(tl.float32) * scale_x[None, :]
        store_scaled(y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y, 1.0 / 64.0, HAS_BIAS, GELU)


@triton.jit(do_not_specialize=["M"])
def gemm_16bit_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, K_padded, stride_x, stride_p, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, LINES: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, ASM: tl.constexpr,
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
        prefetch(packed_ptr.to(tl.pointer_type(tl.uint8)), rows_n, stride_p * 2, 0, K_padded // 4, LINES, ASM)
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, K_padded // BLOCK_K):
        if BLOCK_M == 16:
            x_tile = tl.load(x, mask=(m < M)[None, :] & (k[:, None] < K - step * BLOCK_K), other=0.0)
        elif EVEN_K:
            x_tile = tl.load(x)
        else:
            x_tile = tl.load(x, mask=k[:, None] < K - step * BLOCK_K, other=0.0)
        acc = tl.dot(unpack16(tl.load(w), x_ptr.dtype.element_ty, ASM), x_tile, acc)
        if ASM:  # without this no-op ptxas serializes the register-operand wgmma (warning C7515)
            acc = tl.inline_asm_elementwise(
                "// $0 $1", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1
            )
        x += BLOCK_K
        w += BLOCK_K // 8
    store_scaled(y_ptr, acc, scale_ptr, bias_ptr, m, n, M, N, stride_y, 0.5, HAS_BIAS, GELU)


def int8_kernel(
    config: KernelConfig, K_padded: int, has_bias: bool, gelu: bool
) -> tuple[Any, tuple[int | bool, ...]]:
    """The kernel for int8 activations that a configuration stands for, and its compile-time arguments but the
    last.
    """
    tile, end = (config.block_m, config.block_n, config.block_k), (has_bias, gelu, ASM)
    if config.share_k:
        even = K_padded % (config.num_warps * config.block_k) == 0
        return gemm_few.gemm_int8_few_kernel, (*tile, config.num_warps, even, config.lines(K_padded), *end)
    return gemm_int8_kernel, (*tile, config.group_m, config.split_k, config.lines(K_padded), *end)


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
    kernel, constants = int8_kernel(config, K_padded, bias is not None, gelu)
    workspace: tuple[Tensor, ...] = ()
    if kernel is gemm_int8_kernel:
        workspace = scale_x, scale_x  # unused without a split
    if config.split_k > 1:
        size = config.tiles(M, N) * config.split_k * config.block_m * config.block_n
        shares = torch.empty(size, dtype=torch.int32, device=x_q.device)
        workspace = shares, make_tickets(x_q, N, config).zero_() if tickets is None else tickets
    launch(
        kernel,
        config.grid(M, N),
        (
            x_q, packed, scale_x, scale, scale if bias is None else bias, y, *workspace,
            M, N, K_padded, packed.stride(0), y.stride(0),
        ),
        constants,
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return y


def make_tickets(x: Tensor, N: int, config: KernelConfig) -> Tensor:
    """int32, one for each tile of the product of x [M, K], rounded up to 128; not set."""
    return torch.empty(-(-config.tiles(x.shape[0], N) // 128) * 128, dtype=torch.int32, device=x.device)


def direct_kernel(
    config: KernelConfig, K: int, has_bias: bool, gelu: bool
) -> tuple[Any, tuple[int | bool, ...]]:
    """The kernel that takes activations as they are, 16-bit ones or (``quantizing``) to quantize them itself,
    and its compile-time arguments but the last.
    """
    tile, end = (config.block_m, config.block_n, config.block_k), (has_bias, gelu, ASM)
    if config.quantizing:
        return gemm_few.gemm_quantizing_kernel, (*tile, config.num_warps, *end)
    loop = (K % config.step == 0, config.lines(padded_k(K)))
    if config.share_k:
        return gemm_few.gemm_16bit_few_kernel, (*tile, config.num_warps, *loop, *end)
    return gemm_16bit_kernel, (*tile, config.group_m, *loop, *end)


def gemm_direct(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None,
    config: KernelConfig, out_dtype: torch.dtype, gelu: bool = False,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``out_dtype`` from x [M, K], rows contiguous: fp16 or bf16, used as they are, or with a
    ``quantizing`` configuration also fp32, quantized per token on the way. Arguments are not checked.
    """
    (M, K), N = x.shape, packed.shape[0]
    weight = packed if config.quantizing else packed.view(torch.uint16)
    y = torch.empty((M, N), dtype=out_dtype, device=x.device)
    kernel, constants = direct_kernel(config, K, bias is not None, gelu)
    launch(
        kernel,
        config.grid(M, N),
        (
            x, weight, scale, scale if bias is None else bias, y,
            M, N, K, padded_k(K), x.stride(0), weight.stride(0), y.stride(0),
        ),
        constants,
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return y
