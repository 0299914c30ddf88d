"""Linear layers with everything decided: which kernels, compiled, and what lies where in one buffer.

Up to some hundred tokens the host sets the pace, not the GPU. After the first call of its kind, a call
costs the host one or two allocations and one or two launches.
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
    """Multiply x [M, K] by packed weights [N, K], for up to ``most`` tokens in ``config``'s tiles.

    ``activation_bits`` 8 quantizes x first; x's rows are ``stride_x`` apart, the result's are contiguous.
    """

    def __init__(
        self,
        config: KernelConfig,
        activation_bits: int,
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
        self.pdl = overlaps(device.index)
        self.direct = activation_bits == 16 or config.quantizing
        self.kernels: tuple[Any, ...] | None = None
        if self.direct:
            self.words = activation_bits == 16
            stride_p = self.K_padded // (8 if self.words else 4)
            self.kernel, self.constants = gemm.direct_kernel(config, K, has_bias, gelu)
            self.sizes = (N, K, self.K_padded, stride_x, stride_p, N)
        else:
            split = config.split_k
            self.tickets = -(-config.tiles(most, N) // 128) * 128 if split > 1 else 0
            self.tile_bytes = 4 * split * config.block_m * config.block_n if split > 1 else 0
            self.kernel, self.constants = gemm.int8_kernel(config, self.K_padded, has_bias, gelu)
            self.shares = self.kernel is gemm.gemm_int8_kernel
            self.sizes = (N, self.K_padded, self.K_padded // 4, N)
            block_m, block_k, pieces = activations.quantize_blocks(K)
            self.rows_per_program = block_m
            self.quantize_sizes = (K, self.K_padded, stride_x, self.K_padded)
            self.quantize_constants = (block_m, block_k, pieces, self.tickets, False, ASM)
            self.quantize_tail = (*self.quantize_sizes, *self.quantize_constants, self.pdl)
        self.tail = (*self.sizes, *self.constants, self.pdl)

    def __call__(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
        """y [M, N]; None if a tensor is not aligned to 16 bytes or a profiler has hooked launches."""
        x_ptr, packed_ptr, scale_ptr = x.data_ptr(), packed.data_ptr(), scale.data_ptr()
        bias_ptr = scale_ptr if bias is None else bias.data_ptr()
        unaligned = (x_ptr | packed_ptr | scale_ptr | bias_ptr) & 15 or 4 * packed.stride(0) != self.K_padded
        if unaligned or hooked():
            return None
        M = x.shape[0]
        y = torch.empty((M, self.N), dtype=self.dtype, device=self.device)
        grid = self.config.grid(M, self.N)
        call = self._direct if self.direct else self._quantized
        call(x, packed, scale, scale if bias is None else bias, y, grid, (x_ptr, packed_ptr, scale_ptr, bias_ptr))
        return y

    def _direct(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor, y: Tensor,
        grid: tuple[int, int], pointers: tuple[int, ...],
    ) -> None:  # fmt: skip
        if self.kernels is None:
            weight = packed.view(torch.uint16) if self.words else packed
            arguments = (x, weight, scale, bias, y, x.shape[0], *self.sizes)
            self.kernels = (self._compile(self.kernel, grid, arguments),)
            return
        run(
            self.kernels[0], grid, current_stream(self.device.index),
            (*pointers, y.data_ptr(), x.shape[0], *self.tail),
        )  # fmt: skip

    def _quantized(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor, y: Tensor,
        grid: tuple[int, int], pointers: tuple[int, ...],
    ) -> None:  # fmt: skip
        M = x.shape[0]
        scale_x = M * self.K_padded  # in bytes, as all of these; what they begin is aligned to 128
        tickets = scale_x + (4 * M + 127 & -128)
        shares = tickets + 4 * self.tickets
        size = shares + (self.config.tiles(M, self.N) * self.tile_bytes if self.tile_bytes else 0)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        quantize_grid = (-(-M // self.rows_per_program), 1)
        if self.kernels is None:
            q, ticket, share = buffer[:scale_x], buffer[tickets:shares], buffer[shares:]
            scales = buffer[scale_x : scale_x + 4 * M].view(torch.float32)
            q, ticket, share = q.view(torch.int8), ticket.view(torch.int32), share.view(torch.int32)
            if not self.tickets:
                ticket = share = scales
            quantize = compile_and_run(
                activations.quantize_kernel, quantize_grid, (x, q, scales, ticket, M, *self.quantize_sizes),
                self.quantize_constants, num_warps=4,
            )  # fmt: skip
            workspace = (share, ticket) if self.shares else ()
            arguments = (q, packed, scales, scale, bias, y, *workspace, M, *self.sizes)
            self.kernels = quantize, self._compile(self.kernel, grid, arguments)
            return
        x_ptr, packed_ptr, scale_ptr, bias_ptr = pointers
        base = buffer.data_ptr()
        stream = current_stream(self.device.index)
        quantize, multiply = self.kernels
        run(
            quantize, quantize_grid, stream,
            (x_ptr, base, base + scale_x, base + tickets, M, *self.quantize_tail),
        )  # fmt: skip
        run(
            multiply, grid, stream,
            (
                base, packed_ptr, base + scale_x, scale_ptr, bias_ptr, y.data_ptr(),
                *((base + shares, base + tickets) if self.shares else ()), M, *self.tail,
            ),
        )  # fmt: skip

    def _compile(self, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...]) -> Any:
        config = self.config
        return compile_and_run(kernel, grid, arguments, self.constants, config.num_warps, config.num_stages)
