"""Replacing a model's modules in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import TriternError
from .embedding import QuantizedEmbedding
from .linear import TernaryLinear

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""The attributes where torch keeps a module's forward hooks and which of them want keyword arguments."""


def is_ternary(model: nn.Module) -> bool:
    """Whether the model has a ternary layer or a rounded table."""
    return any(isinstance(m, (TernaryLinear, QuantizedEmbedding)) for m in model.modules())


def put(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` in the place of the module with these names; it takes over the forward hooks."""
    for name in names:
        old = model.get_submodule(name)
        for hooks in _HOOKS:
            setattr(module, hooks, getattr(old, hooks))
        model.set_submodule(name, module)


def replace_by_plain(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace ternary layers and rounded tables by plain ones, in place; return the number of layers.

    Raises:
        TriternError: as ``dequantize``.
    """
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (TernaryLinear, QuantizedEmbedding))
    ]
    if not found or not found[0][0]:
        raise TriternError(
            f"no ternary layer or rounded table inside {type(model).__name__}; dequantize() wants a model "
            "that tritern.patch() has changed (for a bare layer there are to_linear() and to_embedding())"
        )
    for name, module in found:
        if isinstance(module, TernaryLinear) and module.norm is not None:
            raise TriternError(
                f"{name} has an RMSNorm of its own; a plain {type(model).__name__} has no place for it; "
                "save the ternary model instead"
            )
    plain: dict[int, nn.Module] = {}  # by layer, so that a layer with two names stays one
    weights: dict[int, Any] = {}  # by packed weight, so that layers that share one go on sharing it
    for name, old in found:
        if id(old) not in plain:
            new = old.to_linear(dtype) if isinstance(old, TernaryLinear) else old.to_embedding(dtype)
            new.weight = weights.setdefault(id(old.weight), new.weight)
            plain[id(old)] = new
        put(model, [name], plain[id(old)])
    return sum(isinstance(m, nn.Linear) for m in plain.values())
