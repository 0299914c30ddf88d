"""The steps after the transformer: pooling of packed texts, then the other sentence-transformers modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 256
"""Modules always get this many vectors at a time, because torch's rounding depends on the number of rows."""
_PER_TEXT = ("Dense", "LayerNorm", "Dropout", "Normalize")


def why_not(modules: Sequence[nn.Module]) -> str:
    """Why the modules after the transformer cannot run on packed texts, or an empty string."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    if not modules or type(modules[0]) is not Pooling:
        return (
            f"its second module is {f'a {type(modules[0]).__name__}' if modules else 'missing'}, no Pooling"
        )
    for module in modules[1:]:
        known = type(module).__module__.startswith("sentence_transformers.")
        if not known or type(module).__name__ not in _PER_TEXT or not _in_and_out(module):
            return f"its {type(module).__name__} has no packed form"
    return ""


def _in_and_out(module: Any) -> bool:
    names = {getattr(module, n, None) for n in ("module_input_name", "module_output_name")}
    return names <= {None, "sentence_embedding"}


def vectors(modules: Sequence[Any], hidden: Tensor, starts: Tensor) -> Tensor:
    """Pool the hidden states of packed texts and run the further modules: vectors [texts, width].

    A text's vector depends on its own tokens alone, to the last bit.

    Args:
        modules: the modules after the transformer; ``why_not`` must be empty for them.
        hidden: hidden states [tokens, hidden] of the transformer.
        starts: int32 [texts + 1], the start of each text, then the end of the last.
    """
    from tritern_kernels.pooling import normalize, pool

    pooling, *others = modules
    modes = [pooling.pooling_mode] if isinstance(pooling.pooling_mode, str) else pooling.pooling_mode
    pooled = [pool(hidden, starts, mode) for mode in modes]
    found = pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)
    for module in others:
        name = type(module).__name__
        if name == "Normalize":
            found = normalize(found)
        elif name != "Dropout":
            found = _in_equal_parts(module, found)
    return found


def _in_equal_parts(module: Any, rows: Tensor) -> Tensor:
    missing = -len(rows) % ROWS
    parts = torch.nn.functional.pad(rows, (0, 0, 0, missing)).split(ROWS)
    done = [module({"sentence_embedding": part})["sentence_embedding"] for part in parts]
    return torch.cat(done)[: len(rows)]
