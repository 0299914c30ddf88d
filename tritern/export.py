"""``tritern.dequantize``: a ternary model as a plain one, for programs that do not know tritern."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from . import hf
from .embedding import QuantizedEmbedding
from .errors import TriternError
from .inputs import check_model
from .linear import TernaryLinear
from .patch import put
from .saving import kind_of

Model = TypeVar("Model", bound=nn.Module)


def dequantize(model: Model) -> Model:
    """Replace the ternary layers and rounded tables by plain ``nn.Linear`` and ``nn.Embedding`` with the same
    weights, in place, and return the model.

    It then saves as an ordinary checkpoint, which loads without tritern, at full size: weights are
    ``scale * codes`` in the dtype of the model's other parameters. Its vectors are those of the ternary model
    with 16-bit activations, up to the rounding of that dtype; with ``activation_bits=8`` the ternary model
    rounds activations too, and the dequantized one does not.

    Raises:
        TriternError: not a model, nothing to dequantize, or layers with an RMSNorm of their own (as
            ``from_bitnet`` may give), which no plain model can hold. The model is then unchanged.
    """
    check_model(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layers = replace_by_plain(model, dtype)
    hf.detach(model)
    for module in model.modules():
        if hasattr(module, "_model_card_text"):  # a sentence-transformers model
            vars(module)["_model_card_text"] = _card(module, layers)
    return model


def replace_by_plain(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace ternary layers and rounded tables, in place; the number of layers.

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
                f"{name} has an RMSNorm of its own, which a plain {type(model).__name__} has no place for; "
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
