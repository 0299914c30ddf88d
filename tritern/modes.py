"""Contexts that change the mode of a model while they last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep torch from cuDNN's attention while the context lasts. cuDNN plans 10 ms or more for every new
    batch shape.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients while the context lasts."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), without_cudnn_attention():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def quick_products() -> Iterator[None]:
    """float32 products in half the time or less, by bf16 (CPU) or TF32 (CUDA) with float32 sums, while the
    context lasts. For statistics over many tokens, where the rounding averages out.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
