"""Attention over packed texts: texts laid end to end, without padding between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import wait_for_inputs
from .config import QUERY_ROWS, widest_head
from .launch import INTERPRETED, launch
from .ops import FLOATS

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-1e38)  # below every score, yet finite: a row that has seen no key gives no NaN


@dataclass(frozen=True)
class Blocks:
    """How the kernel is compiled: keys it takes at once, warps, and blocks of keys on their way to it."""

    block_k: int
    num_warps: int
    num_stages: int


@cache
def blocks_of(head_dim: int, dtype: torch.dtype, bias: bool) -> Blocks:
    """``Blocks`` for heads of a width: what neither spills registers nor needs more than sm_89's 99 KB."""
    if dtype == torch.float32:
        return Blocks(16, 8, 2)
    block_k, warps = (64, 4) if head_dim <= 64 else (32, 8)
    return Blocks(block_k // 2 if bias else block_k, warps, 2)


@triton.jit
def _tile(x_ptr, first, stride, rows, count, cols, D: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, cols] of a head, from its row ``first``; zero from row ``count`` and from column D."""
    at = x_ptr + first.to(tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    x = tl.load(at, mask=(rows[:, None] < count) & (cols[None, :] < D), other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit(do_not_specialize=["window"])
def packed_attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, tiles_ptr, y_ptr, window,
    stride_qh, stride_q, stride_kh, stride_k, stride_vh, stride_v, BIASES, SCALE,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile (first, start, end) of queries of one head: y [T, heads, D] from row ``first``. GROUP heads
    share keys and values. Positions count from the text's start, and so do blocks of keys. SCALE includes
    log2(e).
    """
    wait_for_inputs(PDL)
    first = tl.load(tiles_ptr + 3 * tl.program_id(0))
    start = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
    end = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    if first >= end:
        return
    head = tl.program_id(1).to(tl.int64)
    rows, cols, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    q = _tile(q_ptr + head * stride_qh, first, stride_q, rows, end - first, d, D, UPCAST)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    position = first - start + rows
    low, high = 0, end - start
    if WINDOW:
        low = tl.maximum(first - start - window + 1, 0) // BLOCK_K * BLOCK_K
        high = tl.minimum(high, first - start + BLOCK_Q - 1 + window)
    if CAUSAL:
        high = tl.minimum(high, first - start + BLOCK_Q)
    peak = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    y = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for at in range(low, high, BLOCK_K):
        count = end - start - at
        k = _tile(k_ptr, start + at, stride_k, cols, count, d, D, UPCAST)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        offset = (at + cols)[None, :] - position[:, None]
        if BIAS:
            middle = BIASES // 2
            index = tl.minimum(tl.maximum(offset, -middle), middle) + middle
            score += tl.load(bias_ptr + head * BIASES + index).to(tl.float32) * _LOG2_E
        seen = cols[None, :] < count
        if CAUSAL:
            seen = seen & (offset <= 0)
        if WINDOW:
            seen = seen & (offset > -window) & (offset < window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(score - higher[:, None])
        peak, total = higher, total * shrink + tl.sum(p, axis=1)
        v = _tile(v_ptr, start + at, stride_v, cols, count, d, D, UPCAST)
        p = p.to(v_ptr.dtype.element_ty).to(v.dtype)
        y = tl.dot(p, v, y * shrink[:, None], input_precision="ieee")
    y = tl.div_rn(y, tl.broadcast_to(total[:, None], y.shape))
    to = y_ptr + (first.to(tl.int64) * tl.num_programs(1) + head) * D
    to += rows[:, None] * (tl.num_programs(1) * D) + d[None, :]
    mask = (rows[:, None] < end - first) & (d[None, :] < D)
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=mask)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of each token to those of its own text, softmax(scale * q k^T + bias) v, in one launch.

    A text's result depends on its own rows alone, to the last bit, wherever they lie.

    Args:
        q: [heads, T, D] fp32, fp16 or bf16, D from 16 to ``widest_head``; rows contiguous.
        k, v: [key heads, T, D] of the same dtype; as many query heads after each other share each.
        tiles: int32 [G, 3], contiguous: the first row of ``QUERY_ROWS`` queries, and start and end of their
            text. The first row is a multiple of ``QUERY_ROWS`` behind the start. Tiles whose first row is not
            before the end are unused.
        scale: of the products.
        causal: a token attends to itself and those before it.
        window: a token attends to those less than so many positions away.
        bias: [heads, B], B odd: added by the key's position relative to the query's, from -(B // 2) to
            B // 2; farther ones have the outermost's.

    Returns:
        [T, heads, D], contiguous. Rows in no tile are undefined.

    Raises:
        TypeError, ValueError: an argument's dtype or shape does not fit.
    """
    _check(q, k, v, tiles, bias)
    heads, T, D = q.shape
    y = torch.empty((T, heads, D), dtype=q.dtype, device=q.device)
    if not len(tiles) or not T:
        return y
    blocks = blocks_of(D, q.dtype, bias is not None)
    values = tiles if bias is None else bias.contiguous()
    launch(
        packed_attention_kernel,
        (len(tiles), heads),
        (
            q, k, v, values, tiles, y, window or 0,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            1 if bias is None else bias.shape[1], scale * math.log2(math.e),
        ),
        constants_of(D, q.dtype, heads // k.shape[0], causal, window is not None, bias is not None),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )  # fmt: skip
    return y


def constants_of(
    head_dim: int, dtype: torch.dtype, group: int, causal: bool, window: bool, bias: bool
) -> tuple[Any, ...]:
    """The kernel's compile-time arguments but the last."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    upcast = INTERPRETED and dtype == torch.bfloat16  # the interpreter gets bf16 products wrong
    block_k = blocks_of(head_dim, dtype, bias).block_k
    return group, head_dim, block_d, QUERY_ROWS, block_k, causal, window, bias, upcast


def _check(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, bias: Tensor | None) -> None:
    if q.dtype not in FLOATS or {k.dtype, v.dtype} != {q.dtype}:
        raise TypeError(
            "q, k and v must be float32, float16 or bfloat16, all the same; received "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    shapes = [list(t.shape) for t in (q, k, v)]
    if (
        q.dim() != 3
        or k.shape != v.shape
        or k.dim() != 3
        or k.shape[1:] != q.shape[1:]
        or len(q) % len(k)
        or not 16 <= q.shape[2] <= widest_head(q.dtype)
        or {q.stride(2), k.stride(2), v.stride(2)} != {1}
    ):
        raise ValueError(
            "q must be [heads, T, D], k and v [key heads, T, D], with heads a multiple of key heads, D from "
            f"16 to {widest_head(q.dtype)}, and contiguous rows; received "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if tiles.dtype != torch.int32 or tiles.dim() != 2 or tiles.shape[1] != 3 or not tiles.is_contiguous():
        kind = f"{tiles.dtype} {list(tiles.shape)}"
        raise ValueError(f"tiles must be int32 [G, 3], contiguous; received {kind}")
    if bias is not None and (bias.dim() != 2 or len(bias) != len(q) or bias.shape[1] % 2 == 0):
        raise ValueError(f"bias must be [{len(q)}, B], B odd; received {list(bias.shape)}")
