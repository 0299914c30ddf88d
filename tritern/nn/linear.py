"""``TernaryLinear``: a drop-in for ``nn.Linear`` with two-bit weights; ``Int4Linear``: with four bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritern_kernels import PackedWeight, round_to_int4, ternarize_weight
from tritern_kernels.formats import check_shape, packed_width
from tritern_kernels.internals import recorded
from tritern_kernels.ops import FLOATS, linear_unchecked
from tritern_kernels.reference import Rule

from ..config import bits
from ..errors import TriternError
from ..inputs import whole_number


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` over the last dimension; shape and dtype of x are kept.

    The mean square and the division are in float32, the product with the weight in x's dtype, as in Llama,
    Qwen3 and BitNet. (``nn.RMSNorm`` rounds only once in half precision and so gives other int8 activations.)

    Attributes:
        weight: parameter [features].
        eps: added to the mean square.
    """

    def __init__(
        self,
        features: int,
        eps: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., features] -> [..., features]."""
        normalized = F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
        return (self.weight * normalized).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype if autocast is on for its device (the meta device has none)."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class TernaryLinear(nn.Module):
    """y = x W^T + bias with ``W[n] = weight_scale[n] * codes[n]``, codes in {-1, 0, +1}.

    Takes x [..., in_features] in float32, float16 or bfloat16. Returns [..., out_features] in x's dtype
    (autocast's dtype where autocast is on). ``activation_bits=8`` quantizes each token to int8 and sums
    exactly in int32; 16 uses the activations as they are. ``tritern_kernels.linear`` has the details.

    Attributes:
        weight_bits: class attribute, bits of a code: 2.
        weight: buffer, uint8 [out_features, padded_k(in_features) * weight_bits / 8], the packed codes.
        weight_scale: buffer, float32 [out_features]; stays float32 when the module is cast.
        bias: parameter [out_features] or None.
        norm: an ``RMSNorm`` applied to x before quantization, or None.

    Args:
        in_features: K, from 1 to ``tritern_kernels.max_k(weight_bits)``.
        out_features: N.
        bias: whether there is a bias.
        activation_bits: 8 or 16.
        norm_eps: eps of the RMSNorm; None for a layer without one.
        device: where the buffers live.
        dtype: of the bias and of the norm's weight.

    Raises:
        TriternError: an argument out of its range.
    """

    weight_bits: ClassVar[int] = 2
    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation_bits: int = 8,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = whole_number(in_features, "in_features", 1)
        out_features = whole_number(out_features, "out_features", 1)
        try:
            check_shape(out_features, in_features, self.weight_bits)
        except ValueError as error:
            raise TriternError(str(error)) from None
        self.in_features = in_features
        self.out_features = out_features
        self.activation_bits = bits(activation_bits, "activation_bits")
        packed_shape = (out_features, packed_width(in_features, self.weight_bits))
        self.register_buffer("weight", torch.zeros(packed_shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.norm = None if norm_eps is None else RMSNorm(in_features, norm_eps, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rule: Rule = "mse", activation_bits: int = 8) -> TernaryLinear:
        """Round a linear layer; ``rule`` as in ``TernaryConfig`` (4 bits have one rule). The bias parameter
        is shared, not copied.

        Raises:
            TriternError: not an ``nn.Linear``; weights on the meta device, of another dtype, or with NaN or
                infinity; unknown rule.
        """
        if not isinstance(linear, nn.Linear):
            raise TriternError(f"linear must be an nn.Linear; received {type(linear).__name__}")
        if linear.weight.is_meta:
            raise TriternError("the layer's weights are on the meta device; load them before ternarizing")
        try:
            packed = cls._round(linear.weight, rule)
        except (TypeError, ValueError) as error:
            raise TriternError(str(error)) from None
        return cls.from_packed(packed, linear.bias, activation_bits=activation_bits).train(linear.training)

    @staticmethod
    def _round(weight: Tensor, rule: Rule) -> PackedWeight:
        return ternarize_weight(weight, rule)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: nn.Parameter | None = None,
        *,
        activation_bits: int = 8,
        norm: RMSNorm | None = None,
    ) -> TernaryLinear:
        """A layer around packed weights, of the class for their bits; tensors and the norm are shared, not
        copied.
        """
        N, K = packed.shape
        layer = linear_of(packed.bits)(K, N, bias=False, activation_bits=activation_bits, device="meta")
        layer.weight, layer.weight_scale, layer.bias = packed.packed, packed.scale, bias
        layer.norm = norm
        return layer

    def packed(self) -> PackedWeight:
        """The weights with their shape; shares this layer's tensors."""
        return PackedWeight(self.weight, self.weight_scale, (self.out_features, self.in_features))

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The ``nn.Linear`` with the same rounded weights in ``dtype``; its parameters can be trained.

        Raises:
            TriternError: the layer has a norm; an ``nn.Linear`` cannot hold one.
        """
        if self.norm is not None:
            raise TriternError(
                f"a {type(self).__name__} with an RMSNorm cannot be written as an nn.Linear; "
                "use `layer.norm` and `layer.packed().dequantize()` one after the other"
            )
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.packed().dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in_features] -> [..., out_features]."""
        if self.norm is not None:
            x = self.norm(x)
        x = autocast(x)
        weight, scale, bias = self.weight, self.weight_scale, self.bias  # each looked up once: it takes time
        arguments = weight, scale, bias, self.in_features, self.activation_bits
        if not torch.is_grad_enabled() and not recorded() and self._fits(x, weight, scale, bias):
            return linear_unchecked(x, *arguments)
        return torch.ops.tritern.linear(x, *arguments)

    def _fits(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
        """Whether these tensors would pass the operator's checks: plain ones, on a device with kernels."""
        device = x.device
        return (
            type(x) is Tensor
            and x.layout is torch.strided
            and x.dtype in FLOATS
            and (x.is_cpu or x.is_cuda)
            and x.dim() > 0
            and x.shape[-1] == self.in_features
            and device == weight.device == scale.device
            and (bias is None or (bias.device == device and bias.dtype in FLOATS))
        )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation_bits={self.activation_bits}"
        )

    def requires_grad_(self, requires_grad: bool = True) -> TernaryLinear:
        """Refuse True: packed codes have no gradient."""
        if requires_grad:
            raise TriternError(
                f"the codes of a {type(self).__name__} are constants and cannot be trained. Train "
                f"`layer.to_linear()` and round it again with {type(self).__name__}.from_linear(); the bias "
                "alone trains with `layer.bias.requires_grad_()`."
            )
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TernaryLinear:
        """Move both buffers with the module but keep their dtypes: .half() leaves scales float32."""
        weight, scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.uint8:
            self.weight = weight.to(self.weight.device)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for name, dtype in (("weight", torch.uint8), ("weight_scale", torch.float32)):
            value = state_dict.get(prefix + name)
            if value is not None and value.dtype != dtype:  # copy_ would convert it without a word
                error_msgs.append(
                    f"{prefix}{name} must be {dtype}, packed by tritern; the state dict holds {value.dtype}. "
                    "Load full-precision weights before patching the model."
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Int4Linear(TernaryLinear):
    """A ``TernaryLinear`` with codes from -7 to 7 in four bits, for layers that lose too much in two.

    Everything else is the same: one scale per output row, the same int8 activations, exact int32 sums, the
    same arguments, attributes and errors. ``reference.round_int4`` says how weights are rounded.
    """

    weight_bits = 4

    @staticmethod
    def _round(weight: Tensor, rule: Rule) -> PackedWeight:
        return round_to_int4(weight)


def linear_of(bits: int) -> type[TernaryLinear]:
    """The class of layers with weights of 2 or 4 bits."""
    return Int4Linear if bits == 4 else TernaryLinear
