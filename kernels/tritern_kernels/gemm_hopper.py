"""The int8 GEMM for many tokens on Hopper, in Gluon, where the pipeline is written out.

The same product and the same epilogue as ``gemm.gemm_int8_kernel``. The tensor memory accelerator brings tiles of
activations and packed weights to shared memory, STAGES of them ahead. While the tensor cores multiply one step's
tiles, the next step's weights are unpacked in registers and their product is queued behind: Triton's own pipeline
waits for each int32 product before it unpacks again.

Every warpgroup computes 64 weight rows: with 128, ptxas runs the products one after another.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import launch

if TYPE_CHECKING:
    from .tuning import KernelConfig

# renamed between Triton 3.6 and 3.9
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _unpack(w, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """uint8 [ROWS, 32] -> int8 [ROWS, 128] of 64 * code, slab by slab: registers change their names, not their
    lanes.
    """
    w0, w1, w2, w3 = gl.inline_asm_elementwise(
        """{ .reg .b32 t0, t1, t2;
        shl.b32 t0, $4, 6; shl.b32 t1, $4, 4; shl.b32 t2, $4, 2;
        and.b32 $0, t0, 0xC0C0C0C0; and.b32 $1, t1, 0xC0C0C0C0;
        and.b32 $2, t2, 0xC0C0C0C0; and.b32 $3, $4, 0xC0C0C0C0; }""",
        "=&r,=&r,=&r,=&r,r",
        [w],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    c = gl.join(gl.join(w0, w2), gl.join(w1, w3))
    c = gl.permute(c, (0, 2, 3, 1)).reshape((ROWS, 128))
    return gl.convert_layout(c, LAYOUT, assert_trivial=True)


@gluon.jit
def _fetch(
    x_desc, w_desc, x_tiles, w_tiles, full, slot, m, n, step, steps,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step's tiles into a slot, unless the step is beyond the last."""
    more = step < steps
    mbarrier.expect(full.index(slot), BLOCK_N * 32 + BLOCK_M * 128, pred=more)
    _load(w_desc, [n, step * 32], full.index(slot), w_tiles.index(slot), pred=more)
    _load(x_desc, [m, step * 128], full.index(slot), x_tiles.index(slot), pred=more)


@gluon.jit(do_not_specialize=["M"])
def gemm_int8_hopper_kernel(
    x_desc, w_desc, scale_x_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K_padded, stride_y,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x int8 [M, K_padded] in packed order and packed uint8 [N, K_padded / 4] by tensor descriptors."""
    WARPS: gl.constexpr = gl.num_warps()
    INSTRUCTION: gl.constexpr = [16, BLOCK_M if BLOCK_M < 128 else 128, 32]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], INSTRUCTION)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    LANES: gl.constexpr = 32 if BLOCK_N >= 256 else BLOCK_N // 8
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])  # 16-byte stores

    tiles_n = gl.cdiv(N, BLOCK_N)
    pid = gl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP  # grouped order, as in gemm._tile
    size = gl.minimum(gl.cdiv(M, BLOCK_M) - first, GROUP)
    m = (first + pid % (GROUP * tiles_n) % size) * BLOCK_M
    n = pid % (GROUP * tiles_n) // size * BLOCK_N
    steps = K_padded // 128

    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, 32], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for i in gl.static_range(STAGES - 1):
        _fetch(x_desc, w_desc, x_tiles, w_tiles, full, i, m, n, i, steps, BLOCK_M, BLOCK_N)

    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    free = gl.to_tensor(STAGES - 1)
    acc = gl.zeros((BLOCK_N, BLOCK_M), dtype=gl.int32, layout=mma)
    for step in range(steps):
        mbarrier.wait(full.index(slot), phase)
        w = _unpack(w_tiles.index(slot).load(left), BLOCK_N, left)
        x = x_tiles.index(slot).permute((1, 0))
        acc = warpgroup_mma(w, x, acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is multiplied
        _barrier()  # by all warps: its slot is free
        _fetch(
            x_desc, w_desc, x_tiles, w_tiles, full, free, m, n, step + STAGES - 1, steps, BLOCK_M, BLOCK_N
        )
        free = slot
        slot += 1
        wrap = slot == STAGES
        slot = gl.where(wrap, 0, slot)
        phase = gl.where(wrap, phase ^ 1, phase)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))

    token = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
    row = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
    scale_x = gl.load(scale_x_ptr + token, mask=token < M, other=0.0)
    scale = gl.load(scale_ptr + row, mask=row < N, other=0.0) * (1.0 / 64.0)
    v = acc.to(gl.float32) * scale_x[None, :]
    if HAS_BIAS:
        bias = gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
        scale_all, _ = gl.broadcast(scale[:, None], v)
        bias_all, _ = gl.broadcast(bias[:, None], v)
        v = gl.fma(v, scale_all, bias_all)
    else:
        v = v * scale[:, None]
    out = gl.convert_layout(gl.permute(v.to(y_ptr.dtype.element_ty), (1, 0)), rows)
    token = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rows))
    row = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, rows))
    mask = (token[:, None] < M) & (row[None, :] < N)
    gl.store(y_ptr + token[:, None].to(gl.int64) * stride_y + row[None, :], out, mask=mask)


@lru_cache
def layouts(block_m: int, block_n: int) -> tuple[Any, Any]:
    """Shared-memory layouts of the tiles of activations and of packed weights."""
    make = gl.NVMMASharedLayout.get_default_for
    return make([block_m, 128], gl.int8), make([block_n, 32], gl.uint8)


def gemm_int8_hopper(
    x_q: Tensor, scale_x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None,
    config: KernelConfig, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As ``gemm.gemm_int8``; x_q and packed must be contiguous and 16-byte aligned."""
    (M, K_padded), N = x_q.shape, packed.shape[0]
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    x_layout, w_layout = layouts(config.block_m, config.block_n)
    x_desc = TensorDescriptor(x_q, [M, K_padded], [K_padded, 1], [config.block_m, 128], x_layout)
    w_shape, w_strides = [N, K_padded // 4], [K_padded // 4, 1]
    w_desc = TensorDescriptor(packed, w_shape, w_strides, [config.block_n, 32], w_layout)
    launch(
        gemm_int8_hopper_kernel,
        (config.tiles(M, N), 1),
        (x_desc, w_desc, scale_x, scale, scale if bias is None else bias, y, M, N, K_padded, N),
        (config.block_m, config.block_n, config.group_m, config.num_stages, bias is not None),
        config.num_warps,
    )
    return y
