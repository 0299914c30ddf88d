"""The model card of a model that was patched and not trained."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import TernaryConfig
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import TernaryLinear
from ..nn.replace import is_ternary

ROUNDED_TABLES = {8: "int8 per row", 4: "4 bits in groups of 32"}
"""Model cards' words for embedding tables, by their bits."""


def settings_of(model: nn.Module) -> Any:
    """The settings that the first ternary transformers model inside was patched with."""
    configs = (m.config for m in model.modules() if isinstance(m, PreTrainedModel) and is_ternary(m))
    return getattr(next(configs, None), "quantization_config", TernaryConfig())


def kind_of(model: Any) -> str:
    """Name of the sentence-transformers class that loads a model."""
    kinds = (k.__name__ for k in type(model).__mro__ if k.__module__.startswith("sentence_transformers."))
    return next(kinds, "SentenceTransformer")


def _weights(two: int, four: int, rule: str) -> str:
    """The model card's words for so many layers of two and of four bits."""
    row = "one scale per output row"
    ternary = f"hold weights in {{-1, 0, +1}}, two bits each, {row}\n(rule `{rule}`)"
    wide = f"hold weights from -7 to 7, four bits each, {row}"
    if not four:
        return f"{two} linear layers {ternary}"
    return f"{two} linear layers {ternary};\n{four} {wide}" if two else f"{four} linear layers {wide}"


def model_card(model: Any, config: Any, calibrated_on: int = 0, tables_alone: bool = False) -> str:
    """README.md of a sentence-transformers model that was patched and not trained.

    Args:
        model: the SentenceTransformer, CrossEncoder or the like.
        config: has ``rule`` and ``activation_bits``.
        calibrated_on: number of texts that the weights were fitted to.
        tables_alone: the model was ternary before; only its embedding tables changed.
    """
    found = [m.weight_bits for m in model.modules() if isinstance(m, TernaryLinear)]
    layers, wide = found.count(2), found.count(4)
    tables = next((m.bits for m in model.modules() if isinstance(m, QuantizedEmbedding)), 16)
    data = model.model_card_data
    base = data.base_model or data.model_id or "a sentence-transformers model"
    named = f"\nbase_model: {data.base_model}" if data.base_model else ""
    fitted = f", its weights fitted to {calibrated_on:,} texts" if calibrated_on else ""
    made = f"Made by `tritern.patch` without training{fitted}: expect lower quality than the original's."
    if tables_alone:
        made = "Its word embeddings were changed when it was ternary already: earlier scores do not hold."
    kind = kind_of(model)
    return f"""---
library_name: sentence-transformers{named}
tags: [sentence-transformers, tritern, ternary]
---

# Ternary version of {base}

{_weights(layers, wide, config.rule)};
activations are {"int8 per token" if config.activation_bits == 8 else "16-bit"},
word embeddings {"not rounded" if tables == 16 else ROUNDED_TABLES[tables]}.
{made}
Scores published for the original do not hold for this model.

```python
import tritern  # registers the format
from sentence_transformers import {kind}

model = {kind}("path/to/this/folder")
```
"""
