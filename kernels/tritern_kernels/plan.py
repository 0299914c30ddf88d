"""The int8 linear layer with everything decided: which kernels, compiled, and what lies where in one buffer.

Up to some hundred tokens the host sets the pace, not the GPU. After the first call of its kind, a call
costs the host two allocations and two launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import activations, gemm
from .formats import padded_k
from .launch import ASM, compile_and_run, current_stream, hooked, overlaps, run
from .tuning import KernelConfig


class Plan:
    """Quantize x [M, K] and multiply by packed weights [N, K], for up to ``most`` tokens in ``config``'s
    tiles.

    ``stride_x`` is the distance of x's rows, ``dtype`` that of the result.
    """

    def __init__(
        self,
        config: KernelConfig,
        most: int,
        N: int,
        K: int,
        stride_x: int,
        dtype: torch.dtype,
        has_bias: bool,
        gelu: bool,
        device: torch.device,
    ) -> None:
        self.config, self.N, self.dtype, self.device = config, N, dtype, device
        self.K_padded = padded_k(K)
        self.split = config.split_k
        self.tickets = -(-config.tiles(most, N) // 128) * 128 if self.split > 1 else 0
        self.tile_bytes = 4 * self.split * config.block_m * config.block_n if self.split > 1 else 0
        block_m, block_k, one_tile = activations.quantize_blocks(K)
        self.rows_per_program = block_m
        pdl = overlaps(device.index)
        self.quantize_sizes = (K, self.K_padded, stride_x, self.K_padded)
        self.quantize_constants = (block_m, block_k, one_tile, self.tickets, ASM)
        self.multiply_sizes = (N, self.K_padded, self.K_padded // 4, N)
        self.multiply_constants = gemm.constants(config, self.K_padded, has_bias, gelu)
        self.quantize_tail = (*self.quantize_sizes, *self.quantize_constants, pdl)
        self.multiply_tail = (*self.multiply_sizes, *self.multiply_constants, pdl)
        self.kernels: tuple[Any, Any] | None = None

    def __call__(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
        """y [M, N]; None if a tensor is not aligned to 16 bytes or a profiler has hooked launches."""
        x_ptr, packed_ptr, scale_ptr = x.data_ptr(), packed.data_ptr(), scale.data_ptr()
        bias_ptr = scale_ptr if bias is None else bias.data_ptr()
        unaligned = (x_ptr | packed_ptr | scale_ptr | bias_ptr) & 15 or 4 * packed.stride(0) != self.K_padded
        if unaligned or hooked():
            return None
        M = x.shape[0]
        tiles = self.config.tiles(M, self.N)
        scale_x = M * self.K_padded  # in bytes, as all of these; what they begin is aligned to 128
        tickets = scale_x + (4 * M + 127 & -128)
        shares = tickets + 4 * self.tickets
        buffer = torch.empty(shares + tiles * self.tile_bytes, dtype=torch.uint8, device=self.device)
        y = torch.empty((M, self.N), dtype=self.dtype, device=self.device)
        grids = (-(-M // self.rows_per_program), 1), (tiles, self.split)
        if self.kernels is None:
            q, ticket, share = buffer[:scale_x], buffer[tickets:shares], buffer[shares:]
            scales = buffer[scale_x : scale_x + 4 * M].view(torch.float32)
            q, ticket, share = q.view(torch.int8), ticket.view(torch.int32), share.view(torch.int32)
            if not self.tickets:
                ticket = share = scales
            quantize = compile_and_run(
                activations.quantize_kernel, grids[0], (x, q, scales, ticket, M, *self.quantize_sizes),
                self.quantize_constants, num_warps=4,
            )  # fmt: skip
            last = scale if bias is None else bias
            multiply = compile_and_run(
                gemm.gemm_int8_kernel, grids[1],
                (q, packed, scales, scale, last, y, share, ticket, M, *self.multiply_sizes),
                self.multiply_constants, self.config.num_warps, self.config.num_stages,
            )  # fmt: skip
            self.kernels = quantize, multiply
            return y
        base = buffer.data_ptr()
        stream = current_stream(self.device.index)
        quantize, multiply = self.kernels
        run(
            quantize, grids[0], stream,
            (x_ptr, base, base + scale_x, base + tickets, M, *self.quantize_tail),
        )  # fmt: skip
        run(
            multiply, grids[1], stream,
            (
                base, packed_ptr, base + scale_x, scale_ptr, bias_ptr, y.data_ptr(), base + shares,
                base + tickets, M, *self.multiply_tail,
            ),
        )  # fmt: skip
        return y
