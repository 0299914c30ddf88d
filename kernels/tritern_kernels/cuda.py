"""The one host path of a product on a GPU: choose a configuration, make buffers, launch.

``ops`` checks the arguments. Only ``configuration`` checks here: it refuses a GPU without kernels.
Kernels run on the current device and stream.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from .config import KernelConfig, bucket
from .device import gemm, gemm_few, norms
from .device.quantize import quantize_kernel
from .devices import check_device
from .formats import padded_k, weight_bits
from .launch import ASM, launch
from .tables import choose
from .ternarize import expand

Activation = Literal["", "gelu", "swiglu"]
"""The quantized value: x itself, its exact (erf) GELU, or the silu of its first half times its second."""


# ---------------------------------------------------------------- choose


@cache
def _device(index: int) -> tuple[str, int, int]:
    """Name, compute capability and multiprocessors of a GPU with kernels."""
    check_device(torch.device("cuda", index))
    p = torch.cuda.get_device_properties(index)
    return p.name, 10 * p.major + p.minor, p.multi_processor_count


def configuration(
    activation_bits: int, M: int, N: int, K: int, device: torch.device, bits: int = 2
) -> KernelConfig:
    """The configuration for a product of x [M, K] and a weight [N, K] of ``bits`` bits on a GPU.

    Raises:
        ValueError: the GPU has no kernels.
    """
    return choose("int8" if activation_bits == 8 else "16bit", M, N, K, *_device(device.index), bits)


# ---------------------------------------------------------------- a whole product


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int = 8,
    activation: Activation = "",
) -> Tensor:  # fmt: skip
    """y [M, N] in x's dtype for x [M, K] of fp32, fp16 or bf16, M at least 1, and a packed weight [N, K].

    An activation (8 bits only) is applied to x first; for "swiglu" x is [M, 2 K].
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return linear(x, packed, scale, bias, activation_bits, activation)
    x = x if x.stride(1) == 1 else x.contiguous()
    M, N = x.shape[0], packed.shape[0]
    K = x.shape[1] // 2 if activation == "swiglu" else x.shape[1]
    config = configuration(activation_bits, M, N, K, x.device, weight_bits(packed, K))
    if activation_bits == 16:
        if x.dtype == torch.float32:
            return gemm_direct(x.bfloat16(), packed, scale, bias, config, x.dtype)
        if config.expand:
            bias = None if bias is None else bias.to(x.dtype)
            return torch.nn.functional.linear(x, expand(packed, scale, K, x.dtype), bias)
    if activation_bits == 16 or (config.quantizing and not activation):
        return gemm_direct(x, packed, scale, bias, config, x.dtype)
    tickets = make_tickets(x, N, config) if config.split_k > 1 else None
    x_q, scale_x = quantize(x, tickets, activation)
    return gemm_int8(x_q, scale_x, packed, scale, bias, config, x.dtype, tickets)


def linear_int8(
    x_q: Tensor, scale_x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, K: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``dtype`` for int8 activations [M, K] from ``quantize``; M may be 0."""
    if x_q.shape[0] == 0:
        return x_q.new_empty((0, packed.shape[0]), dtype=dtype)
    config = configuration(8, x_q.shape[0], packed.shape[0], K, x_q.device, weight_bits(packed, K))
    return gemm_int8(x_q, scale_x, packed, scale, bias, config, dtype)


# ---------------------------------------------------------------- its two steps


@cache
def quantize_blocks(K: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_K and PIECES for rows of K: about 4,096 elements per program.

    BERT's rows of 3 * 2**n are three pieces, so no lane is idle. Rows above 8,192 are read twice, in pieces.
    """
    padded = padded_k(K)
    if padded % 3 == 0 and padded <= 6144 and (piece := padded // 3) & (piece - 1) == 0:
        return max(1, 1024 // piece), piece, 3
    width = triton.next_power_of_2(padded)
    block_k = min(width, 8192 if width <= 8192 else 4096)
    return max(1, 4096 // block_k), block_k, int(width == block_k)


def quantize(x: Tensor, clear: Tensor | None = None, activation: Activation = "") -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] (fp32, fp16 or bf16, rows contiguous), or an activation of it, per token.

    The same launch sets ``clear`` to zero: a GEMM's tickets, int32 of a multiple of 128 elements. For
    "swiglu", silu(gate) * up, x is [M, 2 K]: gate and up side by side.

    Returns:
        q int8 [M, padded_k(K)] in packed order, zeros beyond K; scale float32 [M].
    """
    M, K = x.shape[0], x.shape[1] // (2 if activation == "swiglu" else 1)
    q, scale = _int8(x, K)
    if M:
        block_m, block_k, pieces = quantize_blocks(K)
        tickets = 0 if clear is None else clear.numel()
        launch(
            quantize_kernel,
            (triton.cdiv(M, block_m), 1),
            (x, q, scale, scale if clear is None else clear, M, K, q.shape[1], x.stride(0), q.stride(0)),
            (block_m, block_k, pieces, tickets, activation, ASM),
            num_warps=4,
        )
    return q, scale


def _int8(x: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Empty tensors for int8 activations [M, padded_k(K)] and their scales [M]."""
    q = torch.empty((x.shape[0], padded_k(K)), dtype=torch.int8, device=x.device)
    return q, torch.empty((x.shape[0],), dtype=torch.float32, device=x.device)


def int8_kernel(
    config: KernelConfig, K_padded: int, has_bias: bool, bits: int = 2
) -> tuple[Any, tuple[int | bool, ...]]:
    """A configuration's kernel for int8 activations, and its compile-time arguments but the last."""
    tile, end = (config.block_m, config.block_n, config.block_k), (has_bias, bits, ASM)
    if config.share_k:
        even = K_padded % (config.num_warps * config.block_k) == 0
        return gemm_few.gemm_int8_few_kernel, (
            *tile,
            config.num_warps,
            even,
            config.lines(K_padded, bits),
            *end,
        )
    return gemm.gemm_int8_kernel, (*tile, config.split_k, config.lines(K_padded, bits), *end)


def gemm_int8(
    x_q: Tensor, scale_x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None,
    config: KernelConfig, out_dtype: torch.dtype, tickets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``out_dtype`` from ``quantize``'s output and a packed weight.

    With ``split_k > 1``, ``tickets`` must come from ``make_tickets`` and be zero (None: they are made here,
    with a further launch).
    """
    M, K_padded = x_q.shape
    N = packed.shape[0]
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    kernel, constants = int8_kernel(config, K_padded, bias is not None, weight_bits(packed, K_padded))
    workspace: tuple[Tensor, ...] = ()
    if kernel is gemm.gemm_int8_kernel:
        workspace = scale_x, scale_x  # unused without a split
    if config.split_k > 1:
        size = config.tiles(M, N) * config.split_k * config.block_m * config.block_n
        shares = torch.empty(size, dtype=torch.int32, device=x_q.device)
        workspace = shares, make_tickets(x_q, N, config).zero_() if tickets is None else tickets
    launch(
        kernel,
        config.grid(M, N),
        (
            x_q, packed, scale_x, scale, scale if bias is None else bias, y, *workspace,
            M, N, K_padded, packed.stride(0), y.stride(0),
        ),
        constants,
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return y


def make_tickets(x: Tensor, N: int, config: KernelConfig) -> Tensor:
    """Uninitialized int32 tickets, one per tile of the product of x [M, K]; M is rounded up as in ``choose``.

    Their number is rounded up to 128, because the quantizer's kernel clears 128 in one store.
    """
    tiles = config.tiles(max(bucket(x.shape[0]), x.shape[0]), N)
    return torch.empty(-(-tiles // 128) * 128, dtype=torch.int32, device=x.device)


def direct_kernel(
    config: KernelConfig, K: int, has_bias: bool, bits: int = 2
) -> tuple[Any, tuple[int | bool, ...]]:
    """The kernel that takes unquantized activations, and its compile-time arguments but the last. It uses
    16-bit ones as they are, or (``quantizing``) quantizes them itself.
    """
    tile, end = (config.block_m, config.block_n, config.block_k), (has_bias, bits, ASM)
    if config.quantizing:
        return gemm_few.gemm_quantizing_kernel, (*tile, config.num_warps, *end)
    loop = (K % config.step == 0, config.lines(padded_k(K), bits))
    if config.share_k:
        return gemm_few.gemm_16bit_few_kernel, (*tile, config.num_warps, *loop, *end)
    return gemm.gemm_16bit_kernel, (*tile, *loop, *end)


def gemm_direct(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None,
    config: KernelConfig, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [M, N] in ``out_dtype`` from x [M, K], rows contiguous. fp16 or bf16 are used as they are. A
    ``quantizing`` configuration quantizes them per token, and takes fp32, too.
    """
    (M, K), N = x.shape, packed.shape[0]
    weight = packed if config.quantizing else packed.view(torch.uint16)
    y = torch.empty((M, N), dtype=out_dtype, device=x.device)
    kernel, constants = direct_kernel(config, K, bias is not None, weight_bits(packed, K))
    launch(
        kernel,
        config.grid(M, N),
        (
            x, weight, scale, scale if bias is None else bias, y,
            M, N, K, padded_k(K), x.stride(0), weight.stride(0), y.stride(0),
        ),
        constants,
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------- a block's norms


def norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x + residual), or without a bias RMSNorm(x + residual), in int8, in one launch.

    x and residual [M, K], contiguous and of one dtype (fp32, fp16 or bf16), K up to 8,192;
    weight and bias [K].

    Returns:
        [M, K] in x's dtype: the LayerNorm's result, or the RMSNorm's input sum (x itself without a residual);
        q and scale of the norm's result, as from ``quantize``.
    """
    M, K = x.shape
    if residual is None and bias is None:
        y = x
    else:
        with torch.inference_mode(False):  # a tensor with a version counter
            y = torch.empty_like(x)
    q, scale = _int8(x, K)
    if M:
        block_m, block_k, pieces = quantize_blocks(K)
        other, last = x if residual is None else residual, weight if bias is None else bias
        launch(
            norms.norm_quantize_kernel,
            (triton.cdiv(M, block_m), 1),
            (x, other, weight, last, y, q, scale, M, K, q.shape[1], eps),
            (block_m, block_k, pieces, bias is None, residual is not None, ASM),
            num_warps=4,
        )
    return y, q, scale


def rotate_blocks(head_dim: int) -> int:
    """BLOCK: heads per program, about 4,096 elements."""
    return max(1, 4096 // head_dim)


def norm_rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    weights: tuple[Tensor, ...] = (),
    eps: float = 1e-6,
) -> None:
    """RMSNorm and rotary embedding of queries and keys, in place, in one launch.

    Args:
        x: [M, width], rows contiguous: query heads, key heads, then columns that do not change.
        cos, sin: contiguous [period, head_dim] in x's dtype; they rotate row m by their row m % period.
            head_dim is a power of two. Halves rotate: (a, b) -> (a cos - b sin, b cos + a sin).
        heads: numbers of query heads and key heads.
        weights: of the norms of queries and keys, [head_dim] each; none: no norm.
        eps: of the norms.
    """
    (M, _), head_dim = x.shape, cos.shape[-1]
    if M == 0:
        return
    q_weight, k_weight = weights or (cos, cos)
    block = rotate_blocks(head_dim)
    launch(
        norms.norm_rotate_kernel,
        (triton.cdiv(M * sum(heads), block), 1),
        (x, cos, sin, q_weight, k_weight, cos.shape[0], M, heads[0], sum(heads), x.stride(0), eps),
        (block, head_dim // 2, bool(weights)),
        num_warps=4,
    )
