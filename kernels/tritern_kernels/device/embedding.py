"""Lookup of rows of a 4-bit embedding table (``embedding``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import wait_for_inputs


@triton.jit(do_not_specialize=["M"])
def lookup_kernel(
    ids_ptr, packed_ptr, scale_ptr, y_ptr, M, ROWS, GROUPS, WIDTH, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y [M, WIDTH] = rows of a table with ROWS rows of GROUPS groups; NaN for an id out of range."""
    wait_for_inputs(PDL)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token, group = index // GROUPS, index % GROUPS
    row = tl.load(ids_ptr + token, mask=token < M, other=0).to(tl.int64)
    known = (token < M) & (row >= 0) & (row < ROWS)
    at = row * GROUPS + group
    scale = tl.load(scale_ptr + at, mask=known, other=float("nan")).to(tl.float32)[:, None]
    byte = tl.arange(0, 16)[None, :]
    packed = tl.load(packed_ptr + at[:, None] * 16 + byte, mask=known[:, None], other=0).to(tl.int32)
    low, high = ((packed & 15) - 8).to(tl.float32) * scale, ((packed >> 4) - 8).to(tl.float32) * scale
    column = group[:, None] * 32 + byte
    y, mask = y_ptr + token[:, None] * WIDTH + column, (token < M)[:, None]
    tl.store(y, low.to(y_ptr.dtype.element_ty), mask=mask & (column < WIDTH))
    tl.store(y + 16, high.to(y_ptr.dtype.element_ty), mask=mask & (column + 16 < WIDTH))
