"""How a model's texts become vectors, and why."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tritern_kernels.config import widest_head
from tritern_kernels.devices import unsupported

from . import pooling
from .families import Family, family_of
from .packing import LARGEST
from .padded import Padded
from .pipeline import Way
from .runner import CudaGraphs, Packed, PackedModel, State, modules_of, state_of
from .tokens import FastTokenizer, fast_tokenizer

OTHERWISE = "sentence-transformers' own encode"


@dataclass(frozen=True)
class Path:
    """How a model's texts become vectors.

    Attributes:
        kind: "packed" (CUDA graphs over texts laid end to end), "padded" (batches of texts of one length) or
            "sentence-transformers" (its own ``encode``).
        reason: why the texts are not packed, or not padded either.
    """

    kind: str
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == "packed":
            return "the engine, packed: texts end to end in CUDA graphs"
        if self.kind == "padded":
            return f"the engine, in batches of texts of one length: {self.reason}"
        return f"{OTHERWISE}: {self.reason}"


def path_of(model: nn.Module, task: str | None = None) -> Path:
    """The path of a sentence-transformers model in its present state.

    Args:
        model: the model.
        task: "query", "document" or None.
    """
    state, tokenizer = state_of(model), _tokenizer(model, task)
    if why := _elsewhere(model, state, tokenizer):
        return Path("sentence-transformers", why)
    family = _family(model, state)
    return Path("padded", family) if isinstance(family, str) else Path("packed")


def way_of(
    model: Any,
    prompt: str | None = None,
    task: str | None = None,
    tokens: int | None = None,
) -> Way | str:
    """The engine's way from texts to vectors, or a string that says why only the model's ``encode`` works.

    Args:
        model: a sentence-transformers model. It is put in evaluation mode.
        prompt: put before every text.
        task: passed to the model's modules.
        tokens: most in a batch or run; None: the device's default.
    """
    state, tokenizer = state_of(model), _tokenizer(model, task)
    if state.training:
        model.eval()
    if why := _elsewhere(model, state, tokenizer):
        return why
    assert isinstance(tokenizer, FastTokenizer)
    family = _family(model, state)
    if isinstance(family, str) or (prompt and not model[1].include_prompt):
        return Padded(model, tokenizer, prompt or "", task, tokens)
    packed = _packed_model(model, family, state)
    return Packed(packed, model, tokenizer, prompt or "", None if tokens is None else min(tokens, LARGEST))


_packed: WeakKeyDictionary[nn.Module, PackedModel] = WeakKeyDictionary()
_packing = threading.Lock()


def _packed_model(model: nn.Module, family: Family, state: State) -> PackedModel:
    """The model's kept runs. They are made anew if its modules or tensors have changed."""
    with _packing:
        known = _packed.get(model)
        if known is None or known.places != state.places:
            known = _packed[model] = PackedModel(model, family, CudaGraphs())
        return known


def _tokenizer(model: Any, task: str | None) -> FastTokenizer | str:
    modules = modules_of(model)
    return fast_tokenizer(modules[0], task) if modules else "it has no modules"


def _elsewhere(model: Any, state: State, tokenizer: FastTokenizer | str) -> str:
    """Why the engine does not take a model's texts, or an empty string."""
    if model.device.type not in ("cpu", "cuda"):
        return unsupported(model.device) or f"its weights are on the {model.device} device"
    if state.hooked:
        return "its modules have hooks or another forward"
    if isinstance(tokenizer, str):
        return tokenizer
    if _changed(type(model)):
        return f"its class {type(model).__name__} has a forward or preprocess of its own"
    if model._compiled_call_impl is not None:
        return "it is compiled"
    if getattr(model, "_distributed_inference", None) is not None:
        return "its inference is distributed"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if why := unsupported(model.device):
        return why
    return ""


def _changed(kind: type) -> bool:
    from sentence_transformers import SentenceTransformer

    names = ("forward", "preprocess", "tokenize", "__call__", "_inference")
    return any(getattr(kind, n, None) is not getattr(SentenceTransformer, n, None) for n in names)


_ORIGINS = ("torch.", "transformers.", "sentence_transformers.", "tritern.")
_TRAINED = "tritern.distillation."
"""The package of layers in training. These keep values computed from weights that still change."""


def _family(model: Any, state: State) -> Family | str:
    """The family of a model that runs packed, or a string that says why it does not."""
    first, *others = modules_of(model)
    if model.device.type != "cuda":
        return "it is on a CPU"
    for kind in state.kinds:
        if not kind.__module__.startswith(_ORIGINS) or kind.__module__.startswith(_TRAINED):
            return f"no graph is captured of a {kind.__module__}.{kind.__name__}"
    if getattr(model, "module_kwargs", None):
        return "its modules take arguments"
    if first.modality_config["text"]["method_output_name"] != "last_hidden_state":
        return "its vectors are not made of the last hidden states"
    found = family_of(first.auto_model)
    if isinstance(found, str):
        return found
    config, dtype = first.auto_model.config, first.auto_model.dtype
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not 16 <= width <= widest_head(dtype):
        return f"its heads have {width} features, in {str(dtype).removeprefix('torch.')}"
    return pooling.why_not(others) or found
