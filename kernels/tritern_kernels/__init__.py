"""Ternary kernels: two-bit (or four-bit) weights, int8 or 16-bit activations. Needs only torch and triton."""

from .embedding import lookup, quantize_table
from .formats import ATOM, MAX_K, PackedWeight, pack, padded_k, unpack
from .ops import linear, quantize_activations, round_to_int4, ternarize_weight

__all__ = [
    "ATOM",
    "MAX_K",
    "PackedWeight",
    "linear",
    "lookup",
    "pack",
    "padded_k",
    "quantize_activations",
    "quantize_table",
    "round_to_int4",
    "ternarize_weight",
    "unpack",
]
