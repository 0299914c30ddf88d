"""Pooling of packed texts and normalization. The order of a text's sums does not depend on other texts."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import triton
from torch import Tensor

from .device.pooling import normalize_kernel, pool_kernel
from .launch import launch
from .ops import FLOATS

Mode = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]
MODES: tuple[Mode, ...] = get_args(Mode)
BLOCK_T, BLOCK_H = 16, 128
"""Tokens and columns per step of a program."""
WIDEST = 16384
"""Most columns of a row in ``normalize``."""


def pool(x: Tensor, starts: Tensor, mode: str) -> Tensor:
    """Pool each text's token vectors into one, like sentence-transformers' Pooling, in one launch.

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
