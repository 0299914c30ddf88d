"""What is added when a ternary model is saved: the manifest, the requirement of tritern and a model card."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .checkpoint import sealed
from .choice import of_peft
from .config import TernaryConfig
from .embedding import QuantizedEmbedding
from .errors import TriternError
from .inputs import check_folder
from .linear import TernaryLinear

ROUNDED_TABLES = {8: "int8 per row", 4: "4 bits in groups of 32"}
"""What model cards say of embedding tables, by their bits."""


def extend() -> None:
    """From the first ternary model on, saving ends with what is added for ternary models, and peft's refusals
    of them say what to do.
    """
    _extend_save()
    if "peft" in sys.modules:  # as after transformers loaded any model, where peft is installed
        from .adapters import explain

        explain()


@cache
def _extend_save() -> None:
    """transformers' and sentence-transformers' ``save`` for ternary models. Others are saved as ever.

    Classes are changed rather than the model, as a SentenceTransformer that was loaded from disk does not
    pass through this package's hands: the quantizer sees the transformers model inside only.
    """
    from sentence_transformers.base.model import BaseModel

    PreTrainedModel.save_pretrained = _sealing(PreTrainedModel.save_pretrained)
    BaseModel.save = _with_requirement(BaseModel.save)


def is_ternary(model: nn.Module) -> bool:
    """Whether any layer or table is in one of the forms of this package."""
    return any(isinstance(m, (TernaryLinear, QuantizedEmbedding)) for m in model.modules())


def _sealing(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save_pretrained)

    @wraps(save_pretrained)
    def save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if not is_ternary(model):
            return save_pretrained(model, *args, **kwargs)
        call = signature.bind(model, *args, **kwargs)
        given = call.arguments
        check_adapters(model)
        if not given.get("save_original_format", True):
            raise TriternError(
                "save_original_format must be True for ternary models: the digest is of that format"
            )
        if _quantizer(model) is None:  # part of a model that was patched
            from .hf import attach  # which imports this module

            attach(model)
        folder = given["save_directory"]
        writes = model.should_save_on_this_rank(given.get("is_main_process", True))
        if not writes:
            return save_pretrained(*call.args, **call.kwargs)
        check_folder(folder, "save_directory")
        push = given.pop("push_to_hub", False)
        with sealed(folder):
            save_pretrained(*call.args, **call.kwargs)
        if push:  # afterwards, so that the manifest goes along
            known = inspect.signature(model.push_to_hub).parameters
            named = {**given, **given.get("kwargs", {})}
            hub = {name: value for name, value in named.items() if name in known and name != "self"}
            model.push_to_hub(**{"repo_id": Path(folder).name, **hub})

    return save


def _with_requirement(plain: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(plain)

    @wraps(plain)
    def save(model: Any, path: str | None, *args: Any, **kwargs: Any) -> None:
        if path is None or not is_ternary(model):
            return plain(model, path, *args, **kwargs)
        check_adapters(model)
        if not signature.bind(model, path, *args, **kwargs).arguments.get("safe_serialization", True):
            raise TriternError(
                "safe_serialization must be True for ternary models: they are saved without pickles"
            )
        check_folder(path, "path")
        patched_while_loading = next(_patched_here(model), None) is not None
        if patched_while_loading and "tritern" not in (model._model_card_text or ""):
            model._model_card_text = model_card(model, settings_of(model))
        with sealed(path):
            plain(model, path, *args, **kwargs)
            file = Path(path, "config_sentence_transformers.json")
            config = json.loads(file.read_text(encoding="utf-8"))
            # without tritern, loading says what to install
            config["requirements"] = {**config.get("requirements", {}), "tritern": ">=0.1"}
            file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    return save


def check_adapters(model: nn.Module) -> None:
    """Refuse to save adapters of a ternary model that no folder holds.

    Raises:
        TriternError: what would be saved is the adapters and the name of the full-precision model, on which
            they would be put without a word.
    """
    for base in _patched_here(model):
        if any(of_peft(module) for module in base.modules()):
            raise TriternError(
                "the adapters are on a model that was made ternary in memory, and would be saved with the "
                f"name of the full-precision one ({base.name_or_path}). Save the ternary model first, "
                "load it, and adapt that"
            )


def _patched_here(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models inside that were made ternary in memory rather than loaded as such."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and is_ternary(module):
            quantizer = _quantizer(module)
            if quantizer is not None and not quantizer.pre_quantized:
                yield module


def _quantizer(model: PreTrainedModel) -> Any:
    return getattr(model, "hf_quantizer", None)


def settings_of(model: nn.Module) -> Any:
    """What the first ternary transformers model inside says of how it was patched."""
    configs = (m.config for m in model.modules() if isinstance(m, PreTrainedModel) and is_ternary(m))
    return getattr(next(configs, None), "quantization_config", TernaryConfig())


def kind_of(model: Any) -> str:
    """Name of the sentence-transformers class that loads a model."""
    kinds = (k.__name__ for k in type(model).__mro__ if k.__module__.startswith("sentence_transformers."))
    return next(kinds, "SentenceTransformer")


def model_card(model: Any, config: Any, calibrated_on: int = 0, tables_alone: bool = False) -> str:
    """README.md of a sentence-transformers model that was patched and not trained.

    Args:
        model: the SentenceTransformer, CrossEncoder or the like.
        config: has ``rule`` and ``activation_bits``.
        calibrated_on: number of texts that the weights were fitted to.
        tables_alone: the model was ternary before, and only its embedding tables were changed.
    """
    layers = sum(isinstance(m, TernaryLinear) for m in model.modules())
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

{layers} linear layers hold weights in {{-1, 0, +1}}, two bits each, one scale per output row
(rule `{config.rule}`); activations are {"int8 per token" if config.activation_bits == 8 else "16-bit"},
word embeddings {"not rounded" if tables == 16 else ROUNDED_TABLES[tables]}.
{made}
Scores published for the original do not hold for this model.

```python
import tritern  # registers the format
from sentence_transformers import {kind}

model = {kind}("path/to/this/folder")
```
"""
