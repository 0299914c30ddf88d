"""The ternary product with gradients for its weights, for training.

Forward is the inference path (packed codes, int8 activations), so training sees the served model. Backward
treats both roundings as straight-through (see ``ternary_linear``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, reference
from .devices import check_device
from .formats import from_packed_order, pack, unpack


class Codes(NamedTuple):
    """A weight's packed codes [N, K] and, on CUDA, those of its transpose [K, N] (for the input gradient)."""

    packed: Tensor
    transposed: Tensor | None


def ternarize_given(weight: Tensor, scale: Tensor) -> Codes:
    """Codes of a weight [N, K] for known scales float32 [N]: sign(w) where |w| > scale / 2.

    Raises:
        ValueError: a device without kernels.
    """
    check_device(weight.device)
    weight, scale = weight.detach(), scale.detach()
    if weight.is_cuda:
        from .ternarize import ternarize_given as kernel

        packed = kernel(weight, scale).packed
        return Codes(packed, transpose(packed, weight.shape[1]))
    codes = reference.codes_given(weight, scale)
    packed = pack(codes)
    cpu.remember(packed, codes)
    return Codes(packed, None)


def transpose(packed: Tensor, K: int) -> Tensor | None:
    """Packed codes of the transpose [K, N] on CUDA; None on the CPU, where codes are multiplied directly."""
    if not packed.is_cuda:
        return None
    from .ternarize import ternarize_given as kernel

    codes = unpack(packed, K, check=False).t().to(torch.float16, memory_format=torch.contiguous_format)
    return kernel(codes, torch.ones(K, dtype=torch.float32, device=packed.device)).packed


def ternary_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    codes: Codes,
    *,
    activation_bits: int = 8,
    clip: float = 1.0,
    backward_dtype: torch.dtype | None = None,
) -> Tensor:
    """``linear(x, scale * codes, bias)`` with gradients for x, weight, scale and bias.

    Let G = dL/dY, W^ = scale[n] * codes[n, k] and x^ the multiplied activations. The gradients are

        dX = G W^                                     the rounding of x passes as the identity
        dW^ = G^T x^
        dweight[n, k] = dW^[n, k] * inside            inside = 1 where |weight| <= clip * scale, else 0
        dscale[n] = sum over k of dW^[n, k] * (codes[n, k] - inside * weight[n, k] / scale[n])
        dbias[n] = sum over m of G[m, n]

    For clip = 1 this is learned step size quantization (arXiv:1902.08153) with levels -1, 0 and 1.

    Args:
        x: [..., K] fp32, fp16 or bf16.
        weight: latent weight [N, K]; only its gradient is used here, the values are in ``codes``.
        scale: float32 [N], positive.
        bias: [N] or None.
        codes: of ``weight`` for ``scale``, from ``ternarize_given``.
        activation_bits: 8 or 16, as in ``linear``.
        clip: see above.
        backward_dtype: of the operands of the products in dX and dW^; None: x's.
    """
    dtype = backward_dtype or x.dtype
    return _TernaryLinear.apply(x, weight, scale, bias, codes, activation_bits, clip, dtype)


def blended_weight(weight: Tensor, scale: Tensor, codes: Codes, blend: float, clip: float = 1.0) -> Tensor:
    """``(1 - blend) * weight + blend * scale * codes`` [N, K], with gradients of both parts.

    The second part has the gradients of ``ternary_linear``: straight-through inside the clip, learned scales.
    """
    ratio = weight / scale[:, None]
    through = ratio.masked_fill(ratio.detach().abs() > clip, 0.0)
    value = _codes_of(codes.packed, weight.shape[1]).to(through.dtype)
    return torch.lerp(weight, (through + (value - through).detach()) * scale[:, None], blend)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, bias, codes, *options):  # noqa: ANN001, ANN002, ANN205
        activation_bits, clip, dtype = options
        N, K = weight.shape
        rows = x.reshape(-1, K)
        if activation_bits == 8 and rows.shape[0]:  # keep one byte per value, not four
            kept, scale_x = _quantize(rows)
            y = _linear_int8(kept, scale_x, codes.packed, scale, bias, K, x.dtype).view(*x.shape[:-1], N)
        else:
            kept, scale_x = rows, None
            y = torch.ops.tritern.linear(x, codes.packed, scale, bias, K, activation_bits)
        ctx.save_for_backward(kept, scale_x, weight, scale, bias, *codes)
        ctx.shape, ctx.clip = x.shape, clip
        ctx.x_dtype, ctx.dtype = x.dtype, dtype
        return y

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        kept, scale_x, weight, scale, bias, packed, transposed = ctx.saved_tensors
        N, K = weight.shape
        grad = grad.reshape(-1, N)
        low = grad.to(ctx.dtype)
        dx = dweight = dscale = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(low, scale, packed, transposed, K).to(ctx.x_dtype).view(ctx.shape)
        if bias is not None and ctx.needs_input_grad[3]:
            dbias = grad.sum(0, dtype=torch.float32).to(bias.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dweight, dscale = _weight_gradients(low, kept, scale_x, weight, scale, packed, ctx.clip)
        return dx, dweight, dscale, dbias, None, None, None, None


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 in the device's order: packed on CUDA, natural on the CPU."""
    return torch.ops.tritern.quantize_activations(rows) if rows.is_cuda else cpu.quantize(rows)


def _linear_int8(
    x_q: Tensor,
    scale_x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    if not x_q.is_cuda:
        return cpu.linear_int8(x_q, scale_x, packed, scale, bias, dtype)
    from . import cuda  # needs Triton

    with torch.cuda.device(x_q.device):
        return cuda.linear_int8(x_q, scale_x, packed, scale, bias, K, dtype)


def _input_gradient(grad: Tensor, scale: Tensor, packed: Tensor, transposed: Tensor | None, K: int) -> Tensor:
    """grad [M, N] times the weight [N, K]. On CUDA the 16-bit kernel multiplies by the packed transpose."""
    if transposed is None:
        return grad @ (scale[:, None] * cpu.codes_of(packed, K)).to(grad.dtype)
    ones = torch.ones(K, dtype=torch.float32, device=grad.device)
    scaled = (grad * scale).to(grad.dtype)
    return torch.ops.tritern.linear(scaled, transposed, ones, None, grad.shape[1], 16)


def _codes_of(packed: Tensor, K: int) -> Tensor:
    """Codes int8 [N, K]; the CPU has kept them since packing."""
    return unpack(packed, K, check=False) if packed.is_cuda else cpu.codes_of(packed, K)


def _weight_gradients(
    grad: Tensor,
    kept: Tensor,
    scale_x: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    packed: Tensor,
    clip: float,
) -> tuple[Tensor, Tensor]:
    K = weight.shape[1]
    x = kept if scale_x is None else kept * scale_x[:, None]
    product = (grad.t() @ x.to(grad.dtype)).float()
    if scale_x is not None and kept.is_cuda:
        product = from_packed_order(product)[:, :K]
    codes = _codes_of(packed, K)
    dscale = torch.linalg.vecdot(product, codes.float())
    dweight = product.masked_fill_(weight.abs() > clip * scale[:, None], 0.0)
    dscale -= torch.linalg.vecdot(dweight, weight.float()) / scale
    return dweight.to(weight.dtype), dscale
