"""Attention over packed texts: texts laid end to end, without padding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .config import QUERY_ROWS, widest_head
from .device.attention import packed_attention_kernel
from .launch import INTERPRETED, launch
from .ops import FLOATS


@dataclass(frozen=True)
class Blocks:
    """Compile-time settings of the kernel: keys per step, warps, and blocks of keys in flight."""

    block_k: int
    num_warps: int
    num_stages: int


@cache
def blocks_of(head_dim: int, dtype: torch.dtype, bias: bool) -> Blocks:
    """``Blocks`` for a head width. They spill no registers and fit into sm_89's 99 KB of shared memory."""
    if dtype == torch.float32:
        return Blocks(16, 8, 2)
    block_k, warps = (64, 4) if head_dim <= 64 else (32, 8)
    return Blocks(block_k // 2 if bias else block_k, warps, 2)


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

    A text's result depends on its own rows alone, to the last bit, and not on their place.

    Args:
        q: [heads, T, D] fp32, fp16 or bf16, D from 16 to ``widest_head``; rows contiguous.
        k, v: [key heads, T, D] of the same dtype; heads / key heads consecutive query heads share each.
        tiles: int32 [G, 3], contiguous: the first row of ``QUERY_ROWS`` queries, and the start and end of
            their text. The first row is the start plus a multiple of ``QUERY_ROWS``. A tile is unused if its
            first row is not before the end.
        scale: of the products.
        causal: a token attends to itself and earlier tokens.
        window: a token attends to tokens less than this many positions away.
        bias: [heads, B], B odd: added by the key's position relative to the query's, from -(B // 2) to
            B // 2. Farther positions have the outermost bias.

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
