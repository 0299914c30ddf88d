"""Trainable forms of the ternary layers: one linear layer, one embedding table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritern_kernels import PackedWeight, ternarize_weight
from tritern_kernels.reference import Rule
from tritern_kernels.training import Codes, blended_weight, ternarize_given, ternary_linear, transpose

from ..errors import TriternError
from ..nn.embedding import QuantizedEmbedding, embedding_of, multiplied, multiplier
from ..nn.linear import TernaryLinear, autocast

SMALLEST_SCALE = 1e-8
"""Learned scales stay at or above this."""


class TrainableTernaryLinear(nn.Module):
    """A ``TernaryLinear`` in training: latent weights, ternarized anew at every step.

    In evaluation it returns the same bits as ``packed_layer()``. In training the gradients are those of
    ``tritern_kernels.training.ternary_linear`` (straight-through, learned scales). While ``blend`` is below
    1, it is a dense layer with the weight ``(1 - blend) * latent + blend * ternary`` and full-precision
    activations.

    Attributes:
        weight: parameter, the latent weight [out_features, in_features].
        weight_scale: parameter, float32 [out_features].
        bias: parameter [out_features] or None.
        packed: buffer, uint8 [out_features, padded_k(in_features) / 4], codes of the latent weight.
        blend: share of the ternary weight while training, from 0 to 1.

    Args:
        linear: the layer to start from; its parameters are shared, not copied.
        rule: gives the first scales, and renews them if they are not learned. (With learned scales, weights
            beyond half a scale get a nonzero code from the start.)
        activation_bits: 8 or 16.
        learn_scale: learn the scales by gradient; otherwise ``rule`` gives them at every step.
        clip: weights beyond clip * scale get no gradient.
        scale: first scales [out_features], instead of the rule's.
        backward_dtype: of the backward products, and of the product while blended, if x is float32; None:
            float32.
    """

    packed: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rule: Rule = "mse",
        activation_bits: int = 8,
        learn_scale: bool = True,
        clip: float = 1.0,
        backward_dtype: torch.dtype | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rule, self.activation_bits, self.learn_scale, self.clip = (
            rule,
            activation_bits,
            learn_scale,
            clip,
        )
        self.backward_dtype = backward_dtype
        self.blend = 1.0
        self.weight, self.bias = linear.weight, linear.bias
        start = ternarize_weight(linear.weight, rule)
        scale = (start.scale if scale is None else scale).clamp(min=SMALLEST_SCALE)
        self.weight_scale = nn.Parameter(scale, requires_grad=learn_scale)
        self.register_buffer("packed", start.packed)
        self._transposed: Tensor | None = None
        self._stale = True
        self.train(linear.training)

    def refresh(self) -> Codes:
        """Compute the codes of the present latent weight."""
        if self._stale or self.training:
            with torch.inference_mode(False), torch.no_grad():  # training may use tensors of encode()
                self._ternarize()
        self._stale = self.training  # an optimizer may change the weights before the next call
        return Codes(self.packed, self._transposed)

    def _ternarize(self) -> None:
        # .data: a layer may run several times before one backward pass; later runs change nothing
        if self.learn_scale:
            self.weight_scale.data.clamp_(min=SMALLEST_SCALE)
            self.packed, self._transposed = ternarize_given(self.weight, self.weight_scale)
        else:
            new = ternarize_weight(self.weight, self.rule)  # pyright: ignore[reportArgumentType]
            self.weight_scale.data.copy_(new.scale.clamp_(min=SMALLEST_SCALE))
            self.packed, self._transposed = new.packed, transpose(new.packed, self.in_features)

    def packed_layer(self) -> TernaryLinear:
        """The inference layer with the present codes; it shares scale and bias.

        Raises:
            TriternError: latent weights that are not finite.
        """
        if not torch.isfinite(self.weight).all() or not torch.isfinite(self.weight_scale).all():
            raise TriternError("latent weights hold NaN or infinity; go back to an earlier checkpoint")
        packed = PackedWeight(
            self.refresh().packed, self.weight_scale.detach(), (self.out_features, self.in_features)
        )
        layer = TernaryLinear.from_packed(packed, self.bias, activation_bits=self.activation_bits)
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in_features] -> [..., out_features]."""
        x = autocast(x)
        codes = self.refresh()
        if self.training and self.blend < 1:
            weight = blended_weight(self.weight, self.weight_scale, codes, self.blend, self.clip)
            dtype = (self.backward_dtype if x.dtype == torch.float32 else None) or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)
        return ternary_linear(
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            codes,
            activation_bits=self.activation_bits,
            clip=self.clip,
            backward_dtype=self.backward_dtype if x.dtype == torch.float32 else None,
        )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rule={self.rule!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableTernaryLinear:
        """Move everything with the module; scales stay float32 and codes uint8."""
        scale, packed = self.weight_scale.data, self.packed
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        if self.packed.dtype != torch.uint8:
            self.packed = packed.to(self.packed.device)
        self._transposed, self._stale = None, True
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._transposed, self._stale = None, True


class TrainableQuantizedEmbedding(nn.Embedding):
    """An ``nn.Embedding`` that rounds looked-up rows like ``Int8Embedding`` or ``Int4Embedding``, with
    straight-through gradients.

    Attributes:
        bits, embed_scale, original: as in ``QuantizedEmbedding``.
    """

    bits: int
    embed_scale: float
    original: type[nn.Embedding]

    @classmethod
    def around(cls, table: nn.Embedding, bits: int) -> TrainableQuantizedEmbedding:
        """A table with these bits that shares the parameter of ``table``."""
        new = cls(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        new.weight, new.bits = table.weight, bits
        new.embed_scale, new.original = multiplier(table) or 1.0, type(table)
        return new.train(table.training)

    def packed_table(self) -> QuantizedEmbedding:
        """The inference table with the present values."""
        shape = self.num_embeddings, self.embedding_dim, self.padding_idx
        new = embedding_of(self.bits).from_embedding(nn.Embedding(*shape, _weight=self.weight))
        new.embed_scale, new.original = self.embed_scale, self.original
        return new.train(self.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the parent's name
        """Ids [...] -> [..., embedding_dim]."""
        rows, form = super().forward(input), embedding_of(self.bits)
        codes, scale = form.quantize(rows.detach().reshape(-1, self.embedding_dim))
        places = torch.arange(len(codes), dtype=torch.int64, device=rows.device)
        value = form.dequantize(places, codes, scale, self.embedding_dim).view(rows.shape)
        value = value + (rows - rows.detach())  # exactly value, with the rows' gradient
        return multiplied(value, self.embed_scale)
