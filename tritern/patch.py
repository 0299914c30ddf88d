"""``tritern.patch``: choose a model's linear layers and replace them by ternary ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from tritern_kernels.dispatch import FLOATS
from tritern_kernels.formats import check_shape

from . import hf
from .config import TernaryConfig
from .embedding import Int8Embedding
from .errors import TriternError
from .linear import TernaryLinear

Model = TypeVar("Model", bound=nn.Module)

_SMALL_AND_SENSITIVE = {
    "pooler": "pooler",
    "head": "head",
    "classifier": "head",
    "pre_classifier": "head",
    "lm_head": "head",
    "score": "head",
    "cls": "head",
    "qa_outputs": "head",
    "vocab_transform": "head",
    "vocab_projector": "head",
}
"""Parts of a model that are left alone, by the component of their name: few weights, directly at the
output.
"""


SMALLEST_TABLE = 1024
"""Rows from which an embedding is a word table; positions, types and T5's relative positions have fewer and
are worth little.
"""


@dataclass(frozen=True)
class Choice:
    """What happens to one linear layer or table: ``reason`` says why it is skipped, or is empty."""

    names: tuple[str, ...]
    module: nn.Module
    reason: str

    @property
    def name(self) -> str:
        """The layer's first name; shared layers have several."""
        return self.names[0]


def patch(
    model: Model,
    config: TernaryConfig | None = None,
    *,
    skip: Iterable[str] | None = None,
    rule: str | None = None,
    activation_bits: int | None = None,
    embedding_bits: int | None = None,
) -> Model:
    """Make a model's linear layers ternary, in place, and return it.

    Works on a SentenceTransformer or any ``nn.Module``. Left in full precision: poolers, heads, T5's ``wo``,
    sentence-transformers' Dense modules, weights shared with an embedding, subclasses of ``nn.Linear``, and
    what ``skip`` names; ``tritern.summary(model)`` lists them. Layers are converted one by one, so that
    memory stays near the model's own. Untrained, a ternary model loses quality: measure it with
    ``tritern.evaluate``.

    With ``embedding_bits=8`` every ``nn.Embedding`` of at least 1,024 rows becomes an ``Int8Embedding``,
    except subclasses, those with max_norm or in sentence-transformers' own modules, and weights shared with
    another module, as in T5 or with an lm_head.

    Args:
        model: the model; its weights must be loaded, finite, in float32, float16 or bfloat16.
        config: settings; the defaults of ``TernaryConfig`` if None.
        skip, rule, activation_bits, embedding_bits: replace the config's field of that name.

    Raises:
        TriternError: nothing to patch, already patched, already quantized otherwise, weights on the meta
            device, not finite or of an unsupported dtype. The model is then unchanged.
    """
    changes: dict[str, Any] = {"rule": rule, "activation_bits": activation_bits}
    changes["embedding_bits"] = embedding_bits
    changes["skip"] = None if skip is None else tuple([skip] if isinstance(skip, str) else skip)
    config = replace(config or TernaryConfig(), **{k: v for k, v in changes.items() if v is not None})
    if not isinstance(model, nn.Module):
        raise TriternError(
            f"model must be a torch.nn.Module or a SentenceTransformer; received {type(model).__name__}"
        )
    if isinstance(model, nn.Linear):
        raise TriternError(
            "a bare nn.Linear cannot be replaced in place; use tritern.TernaryLinear.from_linear(layer)"
        )
    chosen, tables = plan(model, config)

    first: dict[
        int, str
    ] = {}  # of several layers with the very same weight, the first is packed and the others share it
    linears = [(c.names, first.setdefault(id(c.module.weight), c.name)) for c in chosen]
    table_names = [c.names for c in tables]
    del chosen, tables  # so that each full-precision weight is freed as soon as its layer is replaced

    for names, source in tqdm(linears, desc="Ternarizing", unit="layer", delay=2, leave=False, disable=None):
        old = model.get_submodule(names[0])
        assert isinstance(old, nn.Linear)
        if source == names[0]:
            new = TernaryLinear.from_linear(old, rule=config.rule, activation_bits=config.activation_bits)
        else:
            twin = model.get_submodule(source)
            assert isinstance(twin, TernaryLinear)
            new = TernaryLinear.from_packed(twin.packed(), old.bias, activation_bits=config.activation_bits)
            new.train(old.training)
        new._forward_hooks, new._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
        for name in names:
            model.set_submodule(name, new)
        del old
    for names in table_names:
        table = model.get_submodule(names[0])
        assert isinstance(table, nn.Embedding)
        new = Int8Embedding.from_embedding(table)
        new._forward_hooks, new._forward_pre_hooks = table._forward_hooks, table._forward_pre_hooks
        for name in names:
            model.set_submodule(name, new)
    hf.attach(model, config)
    return model


def plan(model: nn.Module, config: TernaryConfig) -> tuple[list[Choice], list[Choice]]:
    """The linear layers and the embedding tables to convert, after every check that can be made beforehand.

    Raises:
        TriternError: as ``patch``.
    """
    linears = list(choose(model, config.skip))
    tables = list(choose_tables(model, config.skip))
    _check(model, config, linears, tables)
    chosen, chosen_tables = ([c for c in kind if not c.reason] for kind in (linears, tables))
    return chosen, chosen_tables if config.embedding_bits == 8 else []


def choose(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[Choice]:
    """Every ``nn.Linear`` (or subclass) of a model with the decision on it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = _owners(modules)
    for names, module in _named(modules, nn.Linear):
        yield Choice(names, module, _reason(names, module, modules, owners, skip))


def choose_tables(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[Choice]:
    """Every ``nn.Embedding`` (or subclass) of a model with the decision on it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = _owners(modules)
    for names, module in _named(modules, nn.Embedding):
        reason = _skipped(names, skip)
        parent = modules[names[0].rpartition(".")[0]]
        if type(module) is not nn.Embedding:
            reason = reason or f"subclass of nn.Embedding: {type(module).__name__}"
        if module.num_embeddings < SMALLEST_TABLE:
            reason = reason or f"fewer than {SMALLEST_TABLE:,} rows"
        reason = reason or _shared(module, owners)  # transformers ties parameters only, not buffers
        if module.max_norm is not None:
            reason = reason or "max_norm is set"
        if type(parent).__module__.startswith("sentence_transformers."):  # it would load codes as values
            reason = reason or f"sentence-transformers {type(parent).__name__}"
        yield Choice(names, module, reason)


def _named(modules: dict[str, nn.Module], kind: type) -> list[tuple[tuple[str, ...], Any]]:
    """Modules of a kind with all their names."""
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, kind):
            names.setdefault(id(module), []).append(name)
    return [(tuple(n), modules[n[0]]) for n in names.values()]


def _owners(modules: dict[str, nn.Module]) -> dict[int, list[nn.Module]]:
    """The modules that hold a parameter, by its id."""
    owners: dict[int, list[nn.Module]] = {}
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _shared(module: Any, owners: dict[int, list[nn.Module]], harmless: type | tuple[()] = ()) -> str:
    """The reason, if others than ``module`` and ``harmless`` ones hold its weight."""
    others = [o for o in owners.get(id(module.weight), ()) if o is not module and not isinstance(o, harmless)]
    return f"weight shared with {', '.join(sorted({type(o).__name__ for o in others}))}" if others else ""


def _skipped(names: tuple[str, ...], skip: tuple[str, ...]) -> str:
    for name in names:
        for pattern in skip:
            if fnmatchcase(name, pattern) or name.startswith(pattern + "."):
                return f"skip={pattern!r}"
    return ""


def _reason(
    names: tuple[str, ...],
    module: nn.Linear,
    modules: dict[str, nn.Module],
    owners: dict[int, list[nn.Module]],
    skip: tuple[str, ...],
) -> str:
    if reason := _skipped(names, skip):
        return reason
    if type(module) is not nn.Linear:
        return f"subclass of nn.Linear: {type(module).__name__}"
    if reason := _shared(module, owners, nn.Linear):
        return reason
    for name in names:
        parent_name, _, last = name.rpartition(".")
        parent = modules[parent_name]
        for component in name.split("."):
            if component in _SMALL_AND_SENSITIVE:
                return _SMALL_AND_SENSITIVE[component]
        if type(parent).__module__.startswith("sentence_transformers.") and type(parent).__name__ == "Dense":
            return "sentence-transformers Dense"
        if last == "wo" and "T5" in type(parent).__name__:
            return "T5 wo (kept in higher precision by transformers too)"
    return ""


def _check(model: nn.Module, config: TernaryConfig, linears: list[Choice], tables: list[Choice]) -> None:
    """Everything that can be wrong, before anything is changed."""
    method = hf.foreign_quantization(model)
    if method:
        raise TriternError(
            f"the model is already quantized ({method}); load it in full precision and patch that"
        )
    ternary = sum(isinstance(m, TernaryLinear) for m in model.modules())
    if ternary:
        raise TriternError(
            f"the model is already ternary ({ternary} TernaryLinear layers); patch a full-precision one"
        )
    for pattern in config.skip:
        if not any(c.reason == f"skip={pattern!r}" for c in linears + tables):
            raise TriternError(
                f"skip={pattern!r} matches no linear layer or table. Names look like {linears[0].name!r}."
                if linears
                else f"skip={pattern!r} matches nothing: the model has no linear layers"
            )
    if all(c.reason for c in linears):
        detail = "; ".join(f"{c.name}: {c.reason}" for c in linears[:5]) or "it has no nn.Linear at all"
        raise TriternError(f"no linear layer to make ternary in {type(model).__name__} ({detail})")
    for c in linears + (tables if config.embedding_bits == 8 else []):
        if c.reason:
            continue
        weight = c.module.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise TriternError(f"{c.name}.weight is on the meta device: load the weights before patching")
        if weight.dtype not in FLOATS:
            raise TriternError(
                f"{c.name}.weight is {weight.dtype}; float32, float16 or bfloat16 are supported: cast it"
            )
        if not torch.isfinite(weight).all():
            raise TriternError(
                f"{c.name}.weight holds NaN or infinity; repair the checkpoint or name it in skip="
            )
        try:
            if isinstance(c.module, nn.Linear):
                check_shape(*weight.shape)
        except ValueError as error:
            raise TriternError(f"{c.name}: {error} Or name it in skip=.") from None
