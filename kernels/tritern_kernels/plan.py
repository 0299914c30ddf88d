"""Linear layers with everything decided: which kernels, compiled, and what lies where in one buffer.

Up to some thousand tokens the host sets the pace, not the GPU. After the first call of its kind, a call costs
the host one or two allocations and its launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import activations, gemm
from .config import KernelConfig
from .formats import padded_k
from .launch import ASM, INTERPRETED, Launch, current_stream, hooked


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
        self.direct = activation_bits == 16 or config.quantizing
        self.words = activation_bits == 16
        if self.direct:
            kernel, constants = gemm.direct_kernel(config, K, has_bias, gelu)
            sizes = (N, K, self.K_padded, stride_x, self.K_padded // (8 if self.words else 4), N)
            self.multiply = Launch(kernel, sizes, constants, device, config.num_warps, config.num_stages)
        else:
            self.tickets = tickets_of(config, most, N)
            self.tile_bytes = 4 * config.split_k * config.block_m * config.block_n if self.tickets else 0
            self.quantize, self.rows = quantizer(K, stride_x, self.tickets, "", device)
            self.multiply = product(config, N, K, has_bias, gelu, device)

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
        stream = 0 if INTERPRETED else current_stream(self.device.index)
        last = scale if bias is None else bias
        if self.direct:
            if self.multiply.compiled is None:
                weight = packed.view(torch.uint16) if self.words else packed
                self.multiply(grid, stream, M, (x, weight, scale, last, y))
            else:
                self.multiply(grid, stream, M, (x_ptr, packed_ptr, scale_ptr, bias_ptr, y.data_ptr()))
            return y
        at_scale = M * self.K_padded  # in bytes, as all of these; what they begin is aligned to 128
        at_tickets = at_scale + (4 * M + 127 & -128)
        at_shares = at_tickets + 4 * self.tickets
        size = at_shares + (self.config.tiles(M, self.N) * self.tile_bytes if self.tickets else 0)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        rows = (-(-M // self.rows), 1)
        if self.multiply.compiled is None:
            q, scales = (
                buffer[:at_scale].view(torch.int8),
                buffer[at_scale : at_scale + 4 * M].view(torch.float32),
            )
            tickets, shares = (
                buffer[at_tickets:at_shares].view(torch.int32),
                buffer[at_shares:].view(torch.int32),
            )
            if not self.tickets:
                tickets = shares = scales
            workspace = (shares, tickets) if self.multiply.kernel is gemm.gemm_int8_kernel else ()
            self.quantize(rows, stream, M, (x, q, scales, tickets))
            self.multiply(grid, stream, M, (q, packed, scales, scale, last, y, *workspace))
            return y
        q = buffer.data_ptr()
        scales, tickets = q + at_scale, q + at_tickets
        workspace = (q + at_shares, tickets) if self.multiply.kernel is gemm.gemm_int8_kernel else ()
        self.quantize(rows, stream, M, (x_ptr, q, scales, tickets))
        self.multiply(
            grid, stream, M, (q, packed_ptr, scales, scale_ptr, bias_ptr, y.data_ptr(), *workspace)
        )  # fmt: skip
        return y


def tickets_of(config: KernelConfig, most: int, N: int) -> int:
    """Tickets for up to ``most`` tokens, rounded up to 128; none without a split."""
    return -(-config.tiles(most, N) // 128) * 128 if config.split_k > 1 else 0


def quantizer(
    K: int, stride_x: int, tickets: int, activation: activations.Activation, device: torch.device
) -> tuple[Launch, int]:
    """Launches ``activations.quantize_kernel``; and the rows a program takes."""
    block_m, block_k, pieces = activations.quantize_blocks(K)
    sizes = (K, padded_k(K), stride_x, padded_k(K))
    constants = (block_m, block_k, pieces, tickets, activation, ASM)
    return Launch(activations.quantize_kernel, sizes, constants, device), block_m


def product(config: KernelConfig, N: int, K: int, has_bias: bool, gelu: bool, device: torch.device) -> Launch:
    """Launches the product of int8 activations."""
    kernel, constants = gemm.int8_kernel(config, padded_k(K), has_bias, gelu)
    sizes = (N, padded_k(K), padded_k(K) // 4, N)
    return Launch(kernel, sizes, constants, device, config.num_warps, config.num_stages)
