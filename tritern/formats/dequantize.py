"""``tritern.dequantize``: a ternary model as a plain one, for programs that do not know tritern."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ..checkpoint import quantizer
from ..checkpoint.card import kind_of
from ..inputs import check_model
from ..nn.replace import replace_by_plain

Model = TypeVar("Model", bound=nn.Module)


def dequantize(model: Model) -> Model:
    """Replace the ternary layers and rounded tables by plain ``nn.Linear`` and ``nn.Embedding`` with the same
    weights, in place, and return the model.

    It then saves as an ordinary checkpoint of full size that loads without tritern. Weights are
    ``scale * codes`` in the dtype of the model's other parameters. The vectors are those of the ternary model
    with 16-bit activations, up to the rounding of that dtype. A ternary model with ``activation_bits=8`` also
    rounds activations; the dequantized one does not.

    Raises:
        TriternError: not a model, nothing to dequantize, or layers with an RMSNorm of their own (from
            ``from_bitnet``); a plain model cannot hold these. The model is then unchanged.
    """
    check_model(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layers = replace_by_plain(model, dtype)
    quantizer.detach(model)
    for module in model.modules():
        if hasattr(module, "_model_card_text"):  # a sentence-transformers model
            vars(module)["_model_card_text"] = _card(module, layers)
    return model


def _card(model: Any, layers: int) -> str:
    data = model.model_card_data
    base = data.base_model or data.model_id or "a sentence-transformers model"
    kind = kind_of(model)
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers]
---

# Dequantized ternary version of {base}

{layers} linear layers were ternary (weights in {{-1, 0, +1}} times one scale per output row) and are stored
here as ordinary floating-point weights with the same values: they load without any further package.
Scores published for the original do not hold for this model.

```python
from sentence_transformers import {kind}

model = {kind}("path/to/this/folder")
```
"""
