"""Modes that a model runs in for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """torch takes another attention for as long as the context lasts: cuDNN plans 10 ms or more for every new
    shape of a batch.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients for as long as the context lasts."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), without_cudnn_attention():
            yield
    finally:
        for module, training in modes:
            module.training = training
