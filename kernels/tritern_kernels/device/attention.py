"""Attention over packed texts: one program for ``QUERY_ROWS`` queries of a text and a head."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .common import wait_for_inputs

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-1e38)  # below every score, but finite: a row without keys gives no NaN


@triton.jit
def _tile(x_ptr, first, stride, rows, count, cols, D: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, cols] of a head, from its row ``first`` on; zero from row ``count`` and from column D on."""
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
    """A tile (first, start, end) of queries of one head: y [T, heads, D] from row ``first`` on. GROUP heads
    share keys and values. Positions and blocks of keys count from the text's start. SCALE includes log2(e).
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
