"""The steps of a transformer block around attention: four products. The norms and activations between them
write the next product's int8 activations in the same pass over memory.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import cuda

Int8 = tuple[Tensor, Tensor]
"""Activations of a product: q int8 [M, padded K] in packed order and scale float32 [M]."""


class Product(NamedTuple):
    """A packed weight [N, K]: uint8 codes, float32 scale [N], bias [N] or None."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None


class BertWeights(NamedTuple):
    """Weights of a BERT block: the products query-key-value, output, intermediate and last; weight, bias and
    eps of the two LayerNorms.
    """

    qkv: Product
    output: Product
    inner: Product
    last: Product
    norms: tuple[tuple[Tensor, Tensor], ...]
    epsilons: tuple[float, float]


class DecoderWeights(NamedTuple):
    """Weights of a decoder block: the products query-key-value, output, gate-up and down; the weights of the
    RMSNorms before attention, before the feed-forward part, and of query and key heads (or none); their eps;
    the numbers of query heads and key heads.
    """

    qkv: Product
    output: Product
    inner: Product
    last: Product
    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, ...]
    epsilons: tuple[float, float, float]
    heads: tuple[int, int]


def bert_qkv(x: Tensor, known: Int8 | None, weights: BertWeights) -> Tensor:
    """qkv [M, 3 * hidden] of x [M, hidden]. ``known``: x in int8 from ``bert_output``, or None."""
    return _product(weights.qkv, known or cuda.quantize(x), x)


def bert_output(context: Tensor, x: Tensor, weights: BertWeights) -> tuple[Tensor, Int8]:
    """z [M, hidden] of attention's context [M, hidden] and the block's input x; also z in int8.

    y = norm(context Wout + x);  z = norm(gelu(y Winner) Wlast + y)
    """
    (first, second), (eps, last_eps) = weights.norms, weights.epsilons
    out = cuda.linear(context, *weights.output)
    y, q, scale = cuda.norm_quantize(out, x, *first, eps)
    inner = _product(weights.inner, (q, scale), x)
    out = cuda.linear(inner, *weights.last, activation="gelu")
    z, q, scale = cuda.norm_quantize(out, y, *second, last_eps)
    return z, (q, scale)


def decoder_qkv(x: Tensor, known: Int8 | None, cos: Tensor, sin: Tensor, weights: DecoderWeights) -> Tensor:
    """qkv [M, (heads + 2 key heads) * head_dim] of x [M, hidden]: norm(x) Wqkv. Queries and keys are rotated,
    and normalized first if they have norms.

    ``known``: norm(x) in int8 from ``decoder_output``, or None. cos and sin are [period, head_dim],
    contiguous, in x's dtype; they rotate row m by their row m % period.
    """
    eps = weights.epsilons
    if known is None:
        _, q, scale = cuda.norm_quantize(x, None, weights.norms[0], None, eps[0])
        known = q, scale
    qkv = _product(weights.qkv, known, x)
    cuda.norm_rotate(qkv, cos, sin, weights.heads, weights.head_norms, eps[2])
    return qkv


def decoder_output(
    context: Tensor, x: Tensor, weights: DecoderWeights, next_norm: Tensor | None
) -> tuple[Tensor, Int8 | None]:
    """z [M, hidden] of attention's context [M, heads * head_dim] and the block's input x; also norm(z) in
    int8, with the weight of the next block's norm.

        y = context Wout + x;  z = swiglu(norm(y) Winner) Wlast + y
    """
    eps = weights.epsilons
    out = cuda.linear(context, *weights.output)
    y, q, scale = cuda.norm_quantize(out, x, weights.norms[1], None, eps[1])
    inner = _product(weights.inner, (q, scale), x)
    out = cuda.linear(inner, *weights.last, activation="swiglu")
    if next_norm is None:
        return out + y, None
    z, q, scale = cuda.norm_quantize(out, y, next_norm, None, eps[0])
    return z, (q, scale)


def _product(product: Product, int8: Int8, x: Tensor) -> Tensor:
    """y [M, N] in x's dtype, of int8 activations."""
    packed, scale, bias = product
    return cuda.linear_int8(*int8, packed, scale, bias, x.shape[1], x.dtype)
