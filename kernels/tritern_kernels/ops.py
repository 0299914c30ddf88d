"""The public operations: checks and ``torch.library`` registration.

``tritern::linear`` and ``tritern::quantize_activations`` run on CUDA (``cuda``) and on CPUs (``cpu``), with
equal int32 sums. They refuse other devices (``devices``). ``torch.compile`` sees fake implementations.
``linear`` has gradients for x and bias; they treat the activations' rounding as the identity
(straight-through).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference
from .devices import check_device, refuse
from .formats import PackedWeight, check_packed, check_shape, pack, padded_k, to_packed_order
from .reference import RULES, Rule

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATION_BITS = (8, 16)


# ---------------------------------------------------------------- public, checked


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation_bits: int = 8,
) -> Tensor:
    """Y = x W^T + bias for a packed W of 2 or 4 bits.

    Args:
        x: [..., K] fp32, fp16 or bf16.
        weight: shape (N, K), on x's device.
        bias: [N] or None.
        activation_bits: 8 quantizes each token to int8 (int32 sums, exact). 16 multiplies fp16 or bf16 as
            they are; fp32 is rounded to bf16 on CUDA and kept on the CPU.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device does not fit; a device without kernels.
    """
    return torch.ops.tritern.linear(x, weight.packed, weight.scale, bias, weight.shape[1], activation_bits)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token absmax int8 of x [M, K]: int8 [M, padded_k(K)] in packed order and float32 scale [M].

    A token with NaN or infinity gets zeros and scale NaN.
    """
    return torch.ops.tritern.quantize_activations(x)


def ternarize_weight(weight: Tensor, rule: Rule = "mse") -> PackedWeight:
    """Ternarize and pack a weight [N, K]; rules as in ``reference.ternarize``.

    Raises:
        TypeError: not fp32, fp16, bf16. ValueError: not a matrix, unknown rule, NaN or infinity, K beyond the
            bound, a device without kernels.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; received {rule!r}")
    weight = _checked_weight(weight, 2)
    if weight.is_cuda:
        from .ternarize import ternarize

        return ternarize(weight, rule)
    codes, scale = reference.ternarize(weight, rule)
    return PackedWeight(pack(codes), scale, (weight.shape[0], weight.shape[1]))


def round_to_int4(weight: Tensor) -> PackedWeight:
    """Round a weight [N, K] to 4 bits and pack it (``reference.round_int4``).

    Raises:
        TypeError: not fp32, fp16, bf16. ValueError: not a matrix, NaN or infinity, K beyond the bound.
    """
    weight = _checked_weight(weight, 4)
    codes, scale = reference.round_int4(weight)
    return PackedWeight(pack(codes, 4), scale, (weight.shape[0], weight.shape[1]))


# ---------------------------------------------------------------- checks


def _checked_weight(weight: Tensor, bits: int) -> Tensor:
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, float16 or bfloat16; received {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [N, K]; received shape {list(weight.shape)}")
    N, K = weight.shape
    check_shape(N, K, bits)
    check_device(weight.device)
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        row = int((~torch.isfinite(weight)).any(1).nonzero()[0])
        raise ValueError(
            f"weight holds NaN or infinity (first in row {row}); repair the checkpoint before rounding it"
        )
    return weight


def _check_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, activation_bits: int
) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(
            f"x must be float32, float16 or bfloat16; received {x.dtype}. Cast it, for example x.float()."
        )
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape [..., {in_features}]; received {list(x.shape)}")
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits must be 8 or 16; received {activation_bits}")
    check_packed(packed, scale, packed.shape[0], in_features)
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device} and the weight on {packed.device}; move one with .to()")
    if bias is not None:
        if bias.dtype not in FLOATS or tuple(bias.shape) != (packed.shape[0],) or bias.device != x.device:
            raise ValueError(
                f"bias must be float32, float16 or bfloat16, shape [{packed.shape[0]}], on {x.device}; "
                f"received {bias.dtype}, {list(bias.shape)}, {bias.device}"
            )


def _check_matrix(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, float16 or bfloat16; received {x.dtype}")
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x must be a matrix [M, K]; received shape {list(x.shape)}")


# ---------------------------------------------------------------- launch


def _linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, activation_bits: int
) -> Tensor:
    _check_linear(x, packed, scale, bias, in_features, activation_bits)
    return linear_unchecked(x, packed, scale, bias, in_features, activation_bits)


def linear_unchecked(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, K: int, activation_bits: int
) -> Tensor:
    """``tritern::linear`` on CUDA and the CPU, without checks, gradients and torch's dispatcher."""
    rows, N = x.reshape(-1, K), packed.shape[0]
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], N))
    if x.is_cpu:
        y = cpu.linear(rows, packed, scale, bias, activation_bits)
    else:
        from . import cuda  # needs Triton

        y = cuda.linear(rows, packed, scale, bias, activation_bits)
    return y.view(*x.shape[:-1], N)


def _quantize_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_matrix(x)
    check_device(x.device)
    from . import cuda  # needs Triton

    with torch.cuda.device(x.device):
        return cuda.quantize(x if x.stride(1) == 1 else x.contiguous())


def _quantize_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_matrix(x)
    q, scale = cpu.quantize(x)
    return to_packed_order(torch.nn.functional.pad(q, (0, padded_k(x.shape[1]) - x.shape[1]))), scale


# ---------------------------------------------------------------- fake and autograd


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    activation_bits: int,
) -> Tensor:
    _check_linear(x, packed, scale, bias, in_features, activation_bits)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_matrix(x)
    M, K = x.shape
    return x.new_empty((M, padded_k(K)), dtype=torch.int8), x.new_empty((M,), dtype=torch.float32)


def _dequantize_impl(packed: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    check_device(packed.device)
    if packed.is_cuda:
        from .ternarize import expand

        return expand(packed, scale, in_features, dtype)
    return PackedWeight(packed, scale, (packed.shape[0], in_features)).dequantize(dtype)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    x, packed, scale, bias, in_features, activation_bits = inputs
    ctx.save_for_backward(packed, scale, bias)
    ctx.in_features = in_features


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    packed, scale, bias = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.tritern.dequantize(packed, scale, ctx.in_features, grad.dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, None, None, grad_bias, None, None


_library = torch.library.Library("tritern", "DEF")
_library.define(
    "linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, "
    "int in_features, int activation_bits) -> Tensor"
)
_library.define("quantize_activations(Tensor x) -> (Tensor, Tensor)")
_library.define("dequantize(Tensor packed, Tensor scale, int in_features, ScalarType dtype) -> Tensor")
_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear, "CUDA")
_library.impl("quantize_activations", _quantize_cpu, "CPU")
_library.impl("quantize_activations", _quantize_cuda, "CUDA")
_library.impl("dequantize", _dequantize_impl, "CPU")
_library.impl("dequantize", _dequantize_impl, "CUDA")
for _name in ("linear", "quantize_activations", "dequantize"):
    _library.impl(_name, refuse, "CompositeExplicitAutograd")  # all other devices
torch.library.register_fake("tritern::linear", _linear_fake, lib=_library)
torch.library.register_fake("tritern::quantize_activations", _quantize_fake, lib=_library)
torch.library.register_fake(
    "tritern::dequantize",
    lambda packed, scale, in_features, dtype: packed.new_empty((packed.shape[0], in_features), dtype=dtype),
    lib=_library,
)
torch.library.register_autograd("tritern::linear", _backward, setup_context=_setup_context, lib=_library)
