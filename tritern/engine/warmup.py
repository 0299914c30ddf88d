"""Compile the kernels of a model before the first text comes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from tritern_kernels.config import MOST_TOKENS, bucket

from ..inputs import check_model, whole_number
from ..modes import evaluating
from ..nn.embedding import Int4Embedding
from ..nn.linear import TernaryLinear
from ..progress import bar
from .encoder import Encoder, capture
from .fused import Fused, fused_blocks, kind_of, run_on_zeros

Model = TypeVar("Model", bound=nn.Module)


def warmup(
    model: Model,
    *,
    max_tokens: int = MOST_TOKENS,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Model:
    """Compile and load the kernels of the model's ternary layers and fused blocks. Capture the CUDA graphs of
    its ``encode``. Later calls then need no compiling.

    The number of tokens (texts times their padded length) selects the kernels. It is rounded up to a power of
    two from 16 to 16,384; larger numbers use the kernels of 16,384. Triton's cache keeps compiled kernels on
    disk, so a second process warms up in a moment.

    Args:
        model: on its GPU. On a CPU there is nothing to compile.
        max_tokens: tokens of the largest batch to expect.
        dtype: of the activations; default: that of the model's parameters.
        progress: show a progress bar.

    Returns:
        The model.

    Raises:
        TriternError: not a model, or ``max_tokens`` is not a whole number of at least 1.
    """
    check_model(model)
    max_tokens = whole_number(max_tokens, "max_tokens", 1)
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float16)
    kinds: dict[tuple, TernaryLinear] = {}
    for layer in model.modules():
        if isinstance(layer, TernaryLinear) and layer.weight.is_cuda:
            bias = None if layer.bias is None else layer.bias.dtype
            size = layer.out_features, layer.in_features
            kinds.setdefault(
                (*size, bias, layer.activation_bits, layer.weight_bits, layer.weight.device), layer
            )
    blocks: dict[tuple, Fused] = {}  # the first of each kind: another block follows it
    for block in fused_blocks(model):
        if (kind := kind_of(block))[1].type == "cuda":
            blocks.setdefault(kind, block)
    buckets = [1 << i for i in range(4, bucket(max_tokens).bit_length())]
    with torch.inference_mode():
        for table in model.modules():
            if isinstance(table, Int4Embedding) and table.weight.is_cuda:  # a kernel for every number of ids
                table(torch.zeros(1, dtype=torch.int64, device=table.weight.device))
        for layer in bar(kinds.values(), desc="Compiling", unit="layer", disable=not progress):
            for tokens in buckets:
                layer(torch.zeros(tokens, layer.in_features, dtype=dtype, device=layer.weight.device))
        for block in bar(blocks.values(), desc="Compiling", unit="block", disable=not progress):
            with evaluating(block):
                for tokens in buckets:
                    run_on_zeros(block, tokens // 16, 16, dtype)
        if isinstance(model, Encoder) and buckets:
            capture(model, bar(buckets, desc="Capturing", unit="graph", disable=not progress))
    return model
