"""Which parts of a model become ternary or rounded, and why the others do not."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .config import covers
from .nn.embedding import multiplier
from .nn.linear import TernaryLinear

_SMALL_AND_SENSITIVE = {
    "pooler": "pooler",
    "head": "head",
    "classifier": "head",
    "lm_head": "head",
    "score": "head",
    "cls": "head",
    "text_projection": "projection at the output",
    "visual_projection": "projection at the output",
    "vision_projection": "projection at the output",
    "audio_projection": "projection at the output",
    "patch_embed": "patch embedding",
    "patch_embedding": "patch embedding",
    "patch_embeddings": "patch embedding",
    "router": "router of experts",
    "shared_expert_gate": "router of experts",
}
"""Parts of a model to leave alone, by a component of their name. They have few weights and lie at the input,
at the output, or decide which weights are used. Heads of transformers models are found under any name.
"""

SMALLEST_TABLE = 1024
"""An embedding with at least this many rows is a word table. Tables of positions, types and T5's relative
positions have fewer; rounding them would save little.
"""


@dataclass(frozen=True)
class Selection:
    """The decision on one layer or table: ``reason`` says why it is skipped; empty if it is not."""

    names: tuple[str, ...]
    module: nn.Module
    reason: str

    @property
    def name(self) -> str:
        """The layer's first name; shared layers have several."""
        return self.names[0]


def select_linears(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[Selection]:
    """Every ``nn.Linear`` (or subclass) of a model with the decision on it. Weights may be on the meta
    device.
    """
    context = _Context(model, skip)
    for names, module in _named(context.modules, nn.Linear):
        yield Selection(names, module, _linear_reason(names, module, context))


def select_tables(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[Selection]:
    """Every ``nn.Embedding`` (or subclass) of a model with the decision on it."""
    context = _Context(model, skip)
    for names, module in _named(context.modules, nn.Embedding):
        reason = context.skipped(names)
        if multiplier(module) is None:
            reason = reason or f"subclass of nn.Embedding: {type(module).__name__}"
        if module.num_embeddings < SMALLEST_TABLE:
            reason = reason or f"fewer than {SMALLEST_TABLE:,} rows"
        reason = reason or context.shared(module)  # transformers ties parameters only, not buffers
        if module.max_norm is not None:
            reason = reason or "max_norm is set"
        yield Selection(names, module, reason or context.saved_elsewhere(names, module))


def others(model: nn.Module) -> Iterator[Selection]:
    """Every module with its own floating-point matrix, except linear layers, embedding tables and norms:
    GPT-2's ``Conv1D``, fused experts, attention with ``in_proj_weight``, convolutions and unknown kinds.
    """
    for names, module in _named(dict(model.named_modules(remove_duplicate=False)), nn.Module):
        kind = type(module)
        if isinstance(module, (nn.Linear, nn.Embedding)) or "norm" in kind.__name__.lower():
            continue
        matrices = matrices_of(module)
        if matrices and not kind.__module__.startswith("tritern."):
            shapes = ", ".join(f"{n} {' x '.join(map(str, p.shape))}" for n, p in matrices.items())
            yield Selection(names, module, f"not a linear layer: {kind.__name__} ({shapes})")


def matrices_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own floating-point parameters with at least two dimensions larger than one."""
    own = module.named_parameters(recurse=False)
    return {n: p for n, p in own if p.is_floating_point() and sum(s > 1 for s in p.shape) >= 2}


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's transformer blocks by name: the members of its outermost ModuleLists. A list counts if every
    member holds linear layers.
    """
    found: dict[str, nn.Module] = {}
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(p) for p in prefixes):
            children = {f"{name}.{n}" if name else n: c for n, c in module.named_children()}
            if children and all(
                any(isinstance(m, (nn.Linear, TernaryLinear)) for m in c.modules()) for c in children.values()
            ):
                prefixes.append(f"{name}." if name else "")
                found |= children
    return found


def starred(name: str) -> str:
    """The name with ``*`` for numbers: one name for a layer of all blocks."""
    return re.sub(r"\b\d+\b", "*", name)


def common_name(names: Sequence[str]) -> str:
    """A name for layers that differ in numbers only: ``starred``; a single layer's own name."""
    return names[0] if len(set(names)) == 1 else starred(names[0])


class _Context:
    """Facts about the model that decide on its layers."""

    def __init__(self, model: nn.Module, skip: tuple[str, ...]) -> None:
        self.skip = skip
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.owners: dict[int, list[nn.Module]] = {}
        self.in_transformers: set[int] = set()
        self.heads: set[int] = set()
        self.adapters: set[int] = set()
        for module in self.modules.values():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append(module)
            if isinstance(module, PreTrainedModel):
                inside = {id(m) for m in module.modules()}
                self.in_transformers |= inside
                if module.base_model is not module:  # a layer outside the model inside it is a head
                    nested = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
                    self.heads |= inside - {id(m) for n in nested if n is not module for m in n.modules()}
            if isinstance(base := getattr(module, "base_layer", None), nn.Module) and of_peft(module):
                self.adapters |= {id(m) for m in module.modules()} - {id(m) for m in base.modules()}
        self.sentence_transformer = hasattr(model, "_get_model_config")

    def skipped(self, names: tuple[str, ...]) -> str:
        """The reason, if ``skip`` names the layer."""
        for name in names:
            for pattern in self.skip:
                if covers(pattern, name):
                    return f"skip={pattern!r}"
        return ""

    def shared(self, module: Any, harmless: type | tuple[()] = ()) -> str:
        """The reason, if modules other than ``module`` and ``harmless`` ones hold its weight."""
        holders = self.owners.get(id(module.weight), ())
        others = [o for o in holders if o is not module and not isinstance(o, harmless)]
        return f"weight shared with {', '.join(sorted({type(o).__name__ for o in others}))}" if others else ""

    def saved_elsewhere(self, names: tuple[str, ...], module: nn.Module) -> str:
        """The reason, if the weight is not loaded by a transformers model: only those load codes."""
        parent = type(self.modules[names[0].rpartition(".")[0]])
        if parent.__module__.startswith("sentence_transformers."):
            return f"sentence-transformers {parent.__name__}"
        if self.sentence_transformer and id(module) not in self.in_transformers:
            return f"{parent.__name__} is not part of a transformers model"
        return ""


def of_peft(module: nn.Module) -> bool:
    """Whether the module comes from peft; peft need not be installed."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _named(modules: dict[str, nn.Module], kind: type) -> list[tuple[tuple[str, ...], Any]]:
    """Modules of a kind with all their names."""
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, kind):
            names.setdefault(id(module), []).append(name)
    return [(tuple(n), modules[n[0]]) for n in names.values()]


def _linear_reason(names: tuple[str, ...], module: nn.Linear, context: _Context) -> str:
    if reason := context.skipped(names):
        return reason
    if type(module) is not nn.Linear:
        return f"subclass of nn.Linear: {type(module).__name__}"
    if id(module) in context.adapters:
        return "adapter"
    if "weight" not in module._parameters:
        return "its weight is computed anew at each call (weight_norm, spectral_norm or the like)"
    if reason := context.shared(module, nn.Linear) or context.saved_elsewhere(names, module):
        return reason
    if id(module) in context.heads:
        return "head"
    for name in names:
        for component in name.split("."):
            if component in _SMALL_AND_SENSITIVE:
                return _SMALL_AND_SENSITIVE[component]
        parent_name, _, last = name.rpartition(".")
        parent = context.modules[parent_name]
        if last == "gate" and hasattr(parent, "experts"):
            return "router of experts"
        if last == "wo" and (hasattr(parent, "wi") or hasattr(parent, "wi_0")):
            return "T5 wo (kept in higher precision by transformers too)"
        if last in _weights_read(type(parent)):
            return f"{type(parent).__name__} reads its weight itself"
    return ""


@cache
def _weights_read(kind: type) -> frozenset[str]:
    """Attributes whose ``.weight`` a module's methods read, except to initialize it. Those methods expect
    values there, not packed codes.
    """
    found: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, PreTrainedModel):
            break
        for name, member in vars(base).items():
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, FunctionType) and "init" not in name and "reset" not in name:
                found |= _weights_read_by(function.__code__)
    return frozenset(found)


def _weights_read_by(code: CodeType) -> set[str]:
    loaded = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    found = {
        owner
        for (first, owner), (second, attribute) in zip(loaded, loaded[1:])
        if first == second == "LOAD_ATTR" and attribute == "weight"
    }
    return found.union(*(_weights_read_by(c) for c in code.co_consts if isinstance(c, CodeType)))
