"""A full-precision model with its weights rounded by a public tool: what to compare ternary models with."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

import tritern

FORMATS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Of llama.cpp, by its ``gguf`` package: blocks of 32 weights with one scale (_1: and one offset), which
makes 8.5, 6, 5.5, 5 and 4.5 bits a weight."""


def load_gguf() -> Any:
    """The package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ModuleNotFoundError as error:
        message = f"--rounded needs the gguf package ({error}): pip install gguf"
        raise ModuleNotFoundError(message, name=error.name) from None
    return gguf


def weight_bytes(model: nn.Module, without: Container[int] = ()) -> int:
    """Bytes of a model's tensors with 16 bits for what is not packed; ``without`` tensors of these ids."""
    scales = {id(m.weight_scale) for m in model.modules() if isinstance(m, tritern.TernaryLinear)}
    return sum(
        2 * t.numel() if t.is_floating_point() and id(t) not in scales else t.nbytes
        for t in (*model.parameters(), *model.buffers())
        if id(t) not in without
    )


def round_weights(model: nn.Module, name: str) -> int:
    """Round the weights of all linear layers and embeddings to one of FORMATS and back, in place.

    Returns:
        Bytes of the model in that format, with 16 bits for everything else.

    Raises:
        ModuleNotFoundError: gguf is not installed. ValueError: rows that are no multiple of 32 long.
    """
    quants = load_gguf().quants
    kind: Any = load_gguf().GGMLQuantizationType[name]
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    size = weight_bytes(model, weights)
    for weight in weights.values():
        if weight.shape[1] % 32:
            raise ValueError(f"{name} takes rows of a multiple of 32 weights; received {weight.shape[1]}")
        rounded = quants.quantize(weight.detach().float().cpu().numpy(), kind)
        size += rounded.nbytes
        with torch.no_grad():
            weight.copy_(torch.from_numpy(quants.dequantize(rounded, kind)))
    return size
