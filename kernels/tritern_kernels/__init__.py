"""Ternary kernels: two-bit weights, int8 or 16-bit activations. Needs only torch and triton."""

from .embedding import lookup, quantize_table
from .formats import ATOM, MAX_K, PackedTernary, pack, padded_k, unpack
from .ops import linear, quantize_activations, ternarize_weight

__all__ = [
    "ATOM",
    "MAX_K",
    "PackedTernary",
    "linear",
    "lookup",
    "pack",
    "padded_k",
    "quantize_activations",
    "quantize_table",
    "ternarize_weight",
    "unpack",
]
