"""Pooling of packed texts, and normalization of rows to length 1."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import wait_for_inputs


@triton.jit(do_not_specialize=["N"])
def pool_kernel(
    x_ptr, starts_ptr, y_ptr, N, H, MODE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [N, H] of x [T, H]: row i from rows starts[i] to starts[i + 1] - 1. Empty texts give zeros."""
    wait_for_inputs(PDL)
    text = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    start = tl.load(starts_ptr + text).to(tl.int64)
    count = (tl.load(starts_ptr + text + 1).to(tl.int64) - start).to(tl.int32)
    at = x_ptr + start * H + cols
    if MODE == "cls" or MODE == "lasttoken":
        row = 0 if MODE == "cls" else count - 1
        y = tl.load(at + row * H, mask=cols < tl.where(count > 0, H, 0), other=0.0).to(tl.float32)
    else:
        none = float("-inf") if MODE == "max" else 0.0
        sums = tl.full((BLOCK_T, BLOCK_H), none, tl.float32)  # row r: of tokens r, r + BLOCK_T, ...
        for first in range(0, count, BLOCK_T):
            tokens = first + tl.arange(0, BLOCK_T)
            mask = (tokens < count)[:, None] & (cols < H)[None, :]
            x = tl.load(at[None, :] + tokens[:, None].to(tl.int64) * H, mask=mask, other=none).to(tl.float32)
            if MODE == "max":
                sums = tl.maximum(sums, x, propagate_nan=tl.PropagateNan.ALL)
            elif MODE == "weightedmean":
                sums += x * (tokens + 1).to(tl.float32)[:, None]
            else:
                sums += x
        if MODE == "max":
            spoiled = tl.max((sums != sums).to(tl.int32), axis=0) > 0  # tl.max passes over NaN
            y = tl.where(spoiled, float("nan"), tl.where(count > 0, tl.max(sums, axis=0), 0.0))
        else:
            y = tl.sum(sums, axis=0)
            n = tl.maximum(count, 1).to(tl.float32)
            if MODE == "mean":
                y = y / n
            elif MODE == "weightedmean":
                y = y / (n * (n + 1) * 0.5)
            else:
                y = y / tl.sqrt(n)
    tl.store(y_ptr + text * H + cols, y.to(y_ptr.dtype.element_ty), mask=cols < H)


@triton.jit(do_not_specialize=["N"])
def normalize_kernel(x_ptr, y_ptr, N, W, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y [N, W] = rows of x, divided by their length, or by 1e-12 if that is larger."""
    wait_for_inputs(PDL)
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + cols, mask=cols < W, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, axis=0))
    y = x / tl.where(length < 1e-12, 1e-12, length)  # NaN stays NaN
    tl.store(y_ptr + row * W + cols, y.to(y_ptr.dtype.element_ty), mask=cols < W)
