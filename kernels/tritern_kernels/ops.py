"""Check, choose, launch: the public operations and their ``torch.library`` registration.

``tritern::linear`` and ``tritern::quantize_activations`` run on CUDA (the Triton kernels) and on the CPU
(``cpu``, equal int32 sums), refuse other devices (``devices``), have fake implementations for
``torch.compile`` and, for ``linear``, a gradient with respect to x and bias that treats the activations'
rounding as the identity (straight-through).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, reference
from .config import KernelConfig, bucket
from .devices import check_device, refuse
from .formats import PackedTernary, check_packed, check_shape, pack, padded_k, to_packed_order
from .reference import RULES, Rule
from .tables import choose

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATION_BITS = (8, 16)
LONGEST_ROW = 8192
"""Most hidden features of a block whose steps are planned: a row of them fits into registers."""


# ---------------------------------------------------------------- public, checked


def linear(
    x: Tensor,
    weight: PackedTernary,
    bias: Tensor | None = None,
    *,
    activation_bits: int = 8,
    gelu: bool = False,
) -> Tensor:
    """Y = gelu(x W^T + bias) for a packed ternary W.

    Args:
        x: [..., K] fp32, fp16 or bf16.
        weight: shape (N, K), on x's device.
        bias: [N] or None.
        activation_bits: 8 quantizes each token to int8 (int32 sums, exact). 16 multiplies fp16 or bf16 as
            they are; fp32 is rounded to bf16 on CUDA and kept on the CPU.
        gelu: apply the exact (erf) GELU in the epilogue.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device does not fit; a device without kernels.
    """
    return torch.ops.tritern.linear(
        x, weight.packed, weight.scale, bias, weight.shape[1], activation_bits, gelu
    )


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token absmax int8 of x [M, K]: int8 [M, padded_k(K)] in packed order and float32 scale [M].

    A token with NaN or infinity gets zeros and scale NaN.
    """
    return torch.ops.tritern.quantize_activations(x)


def ternarize_weight(weight: Tensor, rule: Rule = "mse") -> PackedTernary:
    """Ternarize and pack a weight [N, K]; rules as in ``reference.ternarize``.

    Raises:
        TypeError: not fp32, fp16, bf16. ValueError: not a matrix, unknown rule, NaN or infinity, K beyond the
            bound, a device without kernels.
    """
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, float16 or bfloat16; received {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [N, K]; received shape {list(weight.shape)}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; received {rule!r}")
    N, K = weight.shape
    check_shape(N, K)
    check_device(weight.device)
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        row = int((~torch.isfinite(weight)).any(1).nonzero()[0])
        raise ValueError(
            f"weight holds NaN or infinity (first in row {row}); repair the checkpoint before ternarizing"
        )
    if weight.is_cuda:
        from .ternarize import ternarize

        return ternarize(weight, rule)
    codes, scale = reference.ternarize(weight, rule)
    return PackedTernary(pack(codes), scale, (N, K))


# ---------------------------------------------------------------- checks


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


# ---------------------------------------------------------------- CUDA


_plans: dict[tuple[Any, ...], Any] = {}


@cache
def _device(index: int) -> tuple[str, int, int]:
    """Name, compute capability and multiprocessors of a GPU with kernels."""
    check_device(torch.device("cuda", index))
    p = torch.cuda.get_device_properties(index)
    return p.name, 10 * p.major + p.minor, p.multi_processor_count


def _linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    activation_bits: int,
    gelu: bool,
) -> Tensor:
    _check_linear(x, packed, scale, bias, in_features, activation_bits)
    return linear_unchecked(x, packed, scale, bias, in_features, activation_bits, gelu)


def linear_unchecked(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, K: int, activation_bits: int, gelu: bool
) -> Tensor:
    """``tritern::linear`` on CUDA and the CPU, without its checks, its gradients and the cost of a call
    through torch's dispatcher.
    """
    rows = x.reshape(-1, K)
    (M, _), N = rows.shape, packed.shape[0]
    if M == 0:
        return x.new_empty((*x.shape[:-1], N))
    if x.is_cpu:
        return cpu.linear(rows, packed, scale, bias, activation_bits, gelu).view(*x.shape[:-1], N)
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return linear_unchecked(x, packed, scale, bias, K, activation_bits, gelu)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if activation_bits == 16 and rows.dtype == torch.float32:
        y = _unplanned(rows.bfloat16(), packed, scale, bias, x.dtype, 16, gelu)
    else:
        y = _planned(rows, packed, scale, bias, activation_bits, gelu)
    return y.view(*x.shape[:-1], N)


def _planned(
    rows: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int, gelu: bool
) -> Tensor:
    (M, K), N = rows.shape, packed.shape[0]
    most = bucket(M)
    bias_dtype = None if bias is None else bias.dtype
    key = (N, K, most, rows.dtype, activation_bits, rows.stride(0), bias_dtype, gelu, rows.device)
    plan = _plans.get(key)
    if plan is None:
        config = _config(activation_bits, M, N, K, gelu, rows.device)
        if config.expand:
            return _unplanned(rows, packed, scale, bias, rows.dtype, activation_bits, gelu)
        from .plan import Plan

        plan = _plans[key] = Plan(
            config, activation_bits, max(most, M), N, K, rows.stride(0), rows.dtype, bias is not None, gelu,
            rows.device,
        )  # fmt: skip
    y = plan(rows, packed, scale, bias)
    return _unplanned(rows, packed, scale, bias, rows.dtype, activation_bits, gelu) if y is None else y


class BertSizes(NamedTuple):
    """Of a BERT block: hidden and intermediate features, which of its four products (query with key and
    value, output, intermediate, last) have a bias, and the eps of its two norms.
    """

    hidden: int
    inner: int
    biases: tuple[bool, ...]
    epsilons: tuple[float, float]


class DecoderSizes(NamedTuple):
    """Of a decoder's block: hidden and intermediate features, heads of queries and of keys (and values),
    their width, whether queries and keys are normalized, which of its four products (query with key and
    value, output, gate with up, down) have a bias, and the eps of its norms: before attention, before the
    feed-forward part, of heads.
    """

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    normalized_heads: bool
    biases: tuple[bool, ...]
    epsilons: tuple[float, float, float]


def block_plan(sizes: BertSizes | DecoderSizes, M: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The ``block.BertPlan`` or ``block.DecoderPlan`` for M tokens of a block of these sizes."""
    key = (type(sizes), sizes, bucket(M), dtype, device)
    plan = _plans.get(key)
    if plan is None:
        check_device(device)
        from .block import BertPlan, DecoderPlan

        def configure(M: int, N: int, K: int) -> KernelConfig:
            return _config(8, M, N, K, False, device)

        kind: Any = BertPlan if isinstance(sizes, BertSizes) else DecoderPlan
        plan = _plans[key] = kind(sizes, bucket(M), dtype, device, configure)
    return plan


def _config(activation_bits: int, M: int, N: int, K: int, gelu: bool, device: torch.device) -> KernelConfig:
    return choose("int8" if activation_bits == 8 else "16bit", M, N, K, gelu, *_device(device.index))


def _unplanned(
    rows: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation_bits: int,
    gelu: bool,
) -> Tensor:
    (M, K), N = rows.shape, packed.shape[0]
    config = _config(activation_bits, M, N, K, gelu, rows.device)
    from . import activations, gemm

    if config.expand and dtype == rows.dtype:
        from .ternarize import expand

        weight = expand(packed, scale, K, dtype)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(dtype))
        return torch.nn.functional.gelu(y) if gelu else y
    if activation_bits == 16 or config.quantizing:
        return gemm.gemm_direct(rows, packed, scale, bias, config, dtype, gelu)
    tickets = gemm.make_tickets(rows, N, config) if config.split_k > 1 else None
    x_q, scale_x = activations.quantize(rows, tickets)
    return gemm.gemm_int8(x_q, scale_x, packed, scale, bias, config, dtype, gelu, tickets)


def linear_int8_cuda(
    x_q: Tensor,
    scale_x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    gelu: bool = False,
) -> Tensor:
    """Y [M, N] in ``dtype`` for activations that ``activations.quantize`` has made int8."""
    if x_q.shape[0] == 0:
        return x_q.new_empty((0, packed.shape[0]), dtype=dtype)
    config = _config(8, x_q.shape[0], packed.shape[0], in_features, gelu, x_q.device)
    from . import gemm

    return gemm.gemm_int8(x_q, scale_x, packed, scale, bias, config, dtype, gelu)


def _quantize_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_matrix(x)
    check_device(x.device)
    from . import activations

    with torch.cuda.device(x.device):
        return activations.quantize(x if x.stride(1) == 1 else x.contiguous())


# ---------------------------------------------------------------- CPU


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
    gelu: bool,
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
    return PackedTernary(packed, scale, (packed.shape[0], in_features)).dequantize(dtype)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    x, packed, scale, bias, in_features, activation_bits, gelu = inputs
    ctx.save_for_backward(packed, scale, bias, x if gelu else None)
    ctx.in_features, ctx.activation_bits, ctx.x_dtype = in_features, activation_bits, x.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    packed, scale, bias, x = ctx.saved_tensors
    if x is not None:
        y = torch.ops.tritern.linear(x, packed, scale, bias, ctx.in_features, ctx.activation_bits, False)
        grad = torch.ops.aten.gelu_backward(grad, y)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.tritern.dequantize(packed, scale, ctx.in_features, grad.dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, None, None, grad_bias, None, None, None


_library = torch.library.Library("tritern", "DEF")
_library.define(
    "linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, "
    "int in_features, int activation_bits, bool gelu) -> Tensor"
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
