"""Vectors of packed texts, and their length: each text's in an order of additions that is its own."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import wait_for_inputs
from .launch import launch
from .ops import FLOATS

Mode = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]
MODES: tuple[Mode, ...] = get_args(Mode)
BLOCK_T, BLOCK_H = 16, 128
"""Tokens and columns that a program takes at once."""
WIDEST = 16384
"""Columns of a row that ``normalize`` takes."""


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
    """y [N, W] = rows of x, divided by their length or, if that is less, by 1e-12."""
    wait_for_inputs(PDL)
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + cols, mask=cols < W, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, axis=0))
    y = x / tl.where(length < 1e-12, 1e-12, length)  # NaN stays NaN
    tl.store(y_ptr + row * W + cols, y.to(y_ptr.dtype.element_ty), mask=cols < W)


def pool(x: Tensor, starts: Tensor, mode: str) -> Tensor:
    """One vector of each text's token vectors, in one launch, as sentence-transformers' Pooling gives it.

    A text's vector depends on its own tokens alone, to the last bit: no atomics.

    Args:
        x: [T, H] fp32, fp16 or bf16, contiguous.
        starts: int32 [N + 1], ascending: text i is rows starts[i] to starts[i + 1] - 1.
        mode: one of ``MODES``; weights are 1, 2, ... for "weightedmean".

    Returns:
        [N, H] in x's dtype, computed in fp32 and rounded once; zeros for a text without tokens.

    Raises:
        TypeError, ValueError: an argument's dtype or shape does not fit, or there is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; received {mode!r}")
    if x.dtype not in FLOATS or starts.dtype != torch.int32:
        raise TypeError(
            f"x must be float32, float16 or bfloat16 and starts int32; received {x.dtype} and {starts.dtype}"
        )
    if x.dim() != 2 or not x.is_contiguous() or starts.dim() != 1 or not len(starts):
        raise ValueError(
            "x must be [T, H], contiguous, and starts [N + 1]; received "
            f"{list(x.shape)} and {list(starts.shape)}"
        )
    N, H = len(starts) - 1, x.shape[1]
    y = torch.empty((N, H), dtype=x.dtype, device=x.device)
    if N:
        grid = N, triton.cdiv(H, BLOCK_H)
        launch(pool_kernel, grid, (x, starts, y, N, H), (mode, BLOCK_T, BLOCK_H), num_warps=4)
    return y


def normalize(x: Tensor) -> Tensor:
    """Rows of length 1, in one launch. torch's own sums change their order with the number of rows.

    Args:
        x: [N, W] fp32, fp16 or bf16, W up to 16,384; rows contiguous.

    Returns:
        [N, W] in x's dtype, contiguous, computed in fp32 and rounded once; rows of zeros stay zeros.

    Raises:
        TypeError, ValueError: the dtype or shape does not fit.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, float16 or bfloat16; received {x.dtype}")
    if x.dim() != 2 or x.stride(1) != 1 or not 1 <= x.shape[1] <= WIDEST:
        raise ValueError(f"x must be [N, W], W up to {WIDEST:,}, rows contiguous; received {list(x.shape)}")
    N, W = x.shape
    y = torch.empty((N, W), dtype=x.dtype, device=x.device)
    if N:
        block = triton.next_power_of_2(W)
        launch(normalize_kernel, (N, 1), (x, y, N, W, x.stride(0)), (block,), num_warps=4)
    return y
