"""What is added when a ternary model is saved: the manifest, the requirement of tritern and a model card."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .checkpoint import sealed
from .config import TernaryConfig
from .embedding import Int8Embedding
from .linear import TernaryLinear


@cache
def extend_save() -> None:
    """From the first ternary model on, transformers' and sentence-transformers' ``save`` end with what is
    added for ternary models. Other models are saved as ever.

    Classes are changed rather than the model, as a SentenceTransformer that was loaded from disk does not
    pass through this package's hands: the quantizer sees the transformers model inside only.
    """
    from sentence_transformers.base.model import BaseModel

    PreTrainedModel.save_pretrained = _sealing(PreTrainedModel.save_pretrained)
    BaseModel.save = _with_requirement(BaseModel.save)


def is_ternary(model: nn.Module) -> bool:
    """Whether any layer or table is in one of the forms of this package."""
    return any(isinstance(m, (TernaryLinear, Int8Embedding)) for m in model.modules())


def _sealing(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    @wraps(save_pretrained)
    def save(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if not is_ternary(model) or not kwargs.get("is_main_process", True) or Path(save_directory).is_file():
            return save_pretrained(model, save_directory, *args, **kwargs)
        push = kwargs.pop("push_to_hub", False)
        with sealed(save_directory):
            save_pretrained(model, save_directory, *args, **kwargs)
        if push:  # afterwards, so that the manifest goes along
            known = inspect.signature(model.push_to_hub).parameters
            hub = {name: value for name, value in kwargs.items() if name in known}
            model.push_to_hub(**{"repo_id": Path(save_directory).name, **hub})

    return save


def _with_requirement(plain: Callable[..., None]) -> Callable[..., None]:
    @wraps(plain)
    def save(model: Any, path: str | None, *args: Any, **kwargs: Any) -> None:
        if path is None or not is_ternary(model):
            return plain(model, path, *args, **kwargs)
        if "tritern" not in (model._model_card_text or ""):  # it was patched while it was loaded
            model._model_card_text = model_card(model, _settings(model))
        Path(path).mkdir(parents=True, exist_ok=True)
        with sealed(path):
            plain(model, path, *args, **kwargs)
            file = Path(path, "config_sentence_transformers.json")
            config = json.loads(file.read_text(encoding="utf-8"))
            # without tritern, loading says what to install
            config["requirements"] = {**config.get("requirements", {}), "tritern": ">=0.1"}
            file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    return save


def _settings(model: nn.Module) -> Any:
    """What the first ternary transformers model inside says of how it was patched."""
    configs = (m.config for m in model.modules() if isinstance(m, PreTrainedModel) and is_ternary(m))
    return getattr(next(configs, None), "quantization_config", TernaryConfig())


def model_card(model: Any, config: Any) -> str:
    """README.md of a sentence-transformers model that was patched and not trained.

    Args:
        model: the SentenceTransformer.
        config: has ``rule`` and ``activation_bits``.
    """
    layers = sum(isinstance(m, TernaryLinear) for m in model.modules())
    tables = any(isinstance(m, Int8Embedding) for m in model.modules())
    data = model.model_card_data
    base = data.base_model or data.model_id or "a sentence-transformers model"
    named = f"\nbase_model: {data.base_model}" if data.base_model else ""
    return f"""---
library_name: sentence-transformers{named}
tags: [sentence-transformers, tritern, ternary]
---

# Ternary version of {base}

{layers} linear layers hold weights in {{-1, 0, +1}}, two bits each, one scale per output row
(rule `{config.rule}`); activations are {"int8 per token" if config.activation_bits == 8 else "16-bit"},
word embeddings {"int8 per row" if tables else "not rounded"}.
Made by `tritern.patch` without training: expect lower quality than the original's.
Scores published for the original do not hold for this model.

```python
import tritern  # registers the format
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
```
"""
