"""Restores the caller's state after a run, even a failed one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turn off dropout in training mode: in modules, and in the float attributes that attention reads."""
    kept: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in vars(module).items():
            if (dropout and name == "p") or ("dropout" in name and isinstance(value, float)):
                kept.append((module, name, value))
    try:
        for module, name, _ in kept:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the modules' training modes and the parameters' ``requires_grad``."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def device_kept(model: nn.Module | None) -> Iterator[None]:
    """Put the model back on its device."""
    first = None if model is None else next(model.parameters(), None)
    device = None if first is None else first.device
    try:
        yield
    finally:
        if model is not None and first is not None and device != next(model.parameters()).device:
            model.to(device)


def cuts_and_padding(tokenizer: Any) -> Callable[[], None]:
    """A function that restores the tokenizer's present truncation and padding. Every call changes these."""
    inner = tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None
    cut, padding = (None, None) if inner is None else (inner.truncation, inner.padding)

    def put_back() -> None:
        if inner is not None:
            inner.enable_truncation(**cut) if cut else inner.no_truncation()
            inner.enable_padding(**padding) if padding else inner.no_padding()

    return put_back


@contextmanager
def random_kept() -> Iterator[None]:
    """Restore the state of the global random generators; a run seeds them."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
