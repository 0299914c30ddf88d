"""What saving has to know of a model that carries LoRA adapters, and of how it was made ternary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import TriternError
from ..nn.replace import is_ternary
from ..selection import of_peft


def check_adapters(model: nn.Module) -> None:
    """Refuse to save adapters of a ternary model that no folder holds.

    Raises:
        TriternError: what would be saved is the adapters and the name of the full-precision model, on which
            they would be put without a word.
    """
    for base in patched_here(model):
        if any(of_peft(module) for module in base.modules()):
            raise TriternError(
                "the adapters are on a model that was made ternary in memory, and would be saved with the "
                f"name of the full-precision one ({base.name_or_path}). Save the ternary model first, "
                "load it, and adapt that"
            )


def patched_here(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models inside that were made ternary in memory rather than loaded as such."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and is_ternary(module):
            quantizer = quantizer_of(module)
            if quantizer is not None and not quantizer.pre_quantized:
                yield module


def quantizer_of(model: PreTrainedModel) -> Any:
    """The quantizer plug-in that a model was given, or None."""
    return getattr(model, "hf_quantizer", None)
