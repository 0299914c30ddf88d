"""Facts for saving: whether a model carries LoRA adapters, and how it became ternary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import TriternError
from ..nn.replace import is_ternary
from ..selection import of_peft


def check_adapters(model: nn.Module) -> None:
    """Refuse to save the adapters of a ternary model that was never saved.

    Raises:
        TriternError: the adapters would be saved with the name of the full-precision model, and loading would
            put them on that model without a warning.
    """
    for base in patched_here(model):
        if any(of_peft(module) for module in base.modules()):
            raise TriternError(
                "the adapters are on a model that was made ternary in memory; they would be saved with the "
                f"name of the full-precision one ({base.name_or_path}). Save the ternary model first, "
                "load it, and adapt that"
            )


def patched_here(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models inside that were made ternary in memory, not loaded as ternary."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and is_ternary(module):
            quantizer = quantizer_of(module)
            if quantizer is not None and not quantizer.pre_quantized:
                yield module


def quantizer_of(model: PreTrainedModel) -> Any:
    """The model's quantizer plug-in, or None."""
    return getattr(model, "hf_quantizer", None)
