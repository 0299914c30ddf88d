"""``tritern.patch``: choose a model's linear layers and replace them by ternary ones, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tritern_kernels.devices import check_device
from tritern_kernels.dispatch import FLOATS
from tritern_kernels.formats import check_shape

from . import hf
from .calibration import calibrate, checked
from .choice import Choice, choose, choose_tables, common_name, matrices_of, others, starred
from .config import EMBEDDING_BITS, TernaryConfig, bits
from .embedding import QuantizedEmbedding, embedding_of
from .engine.encoder import attach
from .errors import TriternError
from .fused import fuse_what_fits
from .inputs import check_model, many, true_or_false
from .linear import TernaryLinear
from .progress import bar
from .saving import is_ternary, model_card, settings_of

Model = TypeVar("Model", bound=nn.Module)

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""Where torch keeps a module's forward hooks, and which of them want keyword arguments."""


def patch(
    model: Model,
    config: TernaryConfig | None = None,
    *,
    skip: Iterable[str] | None = None,
    rule: str | None = None,
    activation_bits: int | None = None,
    embedding_bits: int | None = None,
    calibration_texts: Iterable[Any] | None = None,
    fuse: bool = True,
) -> Model:
    """Make a model's linear layers ternary, in place, and return it.

    Works on a SentenceTransformer, CrossEncoder or SparseEncoder and on any ``nn.Module``. Left in full
    precision: poolers, heads, projections at the output, patch embeddings, routers of experts, T5's ``wo``,
    sentence-transformers' Dense modules, weights shared with an embedding, subclasses of ``nn.Linear``,
    matrices that are no ``nn.Linear`` (``Conv1D``, fused experts, convolutions), and what ``skip`` names;
    ``tritern.summary(model)`` lists them. Layers are converted one by one, so that memory stays near the
    model's own. Untrained, a ternary model loses quality: measure it with ``tritern.evaluate``.

    With ``calibration_texts``, a few hundred texts of the kind that will be embedded, weights and biases are
    fitted to them, layer by layer (``tritern.calibration``): no training, minutes on a CPU for a small model,
    and far closer to the original. That takes a second copy of the model for as long as it lasts.

    ``embedding_bits=8`` makes every ``nn.Embedding`` of at least 1,024 rows an ``Int8Embedding``, 4 an
    ``Int4Embedding``. These stay: tables with max_norm, those in sentence-transformers' own modules, weights
    shared with another module, as in T5 or with an lm_head, and subclasses that do more than multiply the
    output, as Gemma's do.

    ``encode`` of a SentenceTransformer goes through tritern's engine from then on: the same arguments, the
    same results but for last bits, in less time; on a CUDA GPU blocks are fused (``tritern.fuse``).
    ``tritern.summary(model)`` says which path its texts take.

    ``patch(model, embedding_bits=N)`` of a model that is ternary already changes its tables only, and 16
    makes them plain. No other argument may be given then. (Of a model that is none of transformers' no
    ``skip`` is remembered.)

    Args:
        model: the model; its weights must be loaded, finite, in float32, float16 or bfloat16.
        config: settings; the defaults of ``TernaryConfig`` if None.
        skip, rule, activation_bits, embedding_bits: replace the config's field of that name.
        calibration_texts: at least 16 different texts, or other inputs of a sentence-transformers model, such
            as pairs, in any iterable; empty texts and repeated ones are left out. The model's prompts are put
            before them in turn.
        fuse: fuse blocks on a CUDA GPU.

    Raises:
        TriternError: nothing to patch, already patched (but for ``embedding_bits`` alone), already quantized
            otherwise, carrying adapters, weights on the meta device, not finite or of an unsupported dtype;
            too few texts, or a model that takes none. The model is then unchanged.

    Warns:
        UserWarning: most of the model's matrix weights are no ``nn.Linear``, as in mixtures of experts.
    """
    check_model(model)
    fuse = true_or_false(fuse, "fuse")
    if config is not None and not isinstance(config, TernaryConfig):
        raise TriternError(f"config must be a tritern.TernaryConfig; received {type(config).__name__}")
    others_given = (config, skip, rule, activation_bits, calibration_texts)
    ternary = any(isinstance(m, TernaryLinear) for m in model.modules())
    if ternary and embedding_bits is not None and others_given == (None,) * 5:
        return _with_tables(model, bits(embedding_bits, "embedding_bits", EMBEDDING_BITS))
    changes: dict[str, Any] = {"rule": rule, "activation_bits": activation_bits}
    changes["embedding_bits"] = embedding_bits
    changes["skip"] = None if skip is None else tuple([skip] if isinstance(skip, str) else many(skip, "skip"))
    config = replace(config or TernaryConfig(), **{k: v for k, v in changes.items() if v is not None})
    texts = None if calibration_texts is None else checked(calibration_texts)
    chosen, tables = plan(model, config)
    _warn_of_the_rest(model, chosen)

    first: dict[
        int, str
    ] = {}  # of several layers with the very same weight, the first is packed and the others share it
    linears = [(c.names, first.setdefault(id(c.module.weight), c.name)) for c in chosen]
    table_names = [c.names for c in tables]
    fitted: dict[str, TernaryLinear] = {}
    if texts is not None:
        own = [c.names for c in chosen if sum(c.module.weight is d.module.weight for d in chosen) == 1]
        fitted = calibrate(model, own, table_names, texts, config)
    del chosen, tables  # so that each full-precision weight is freed as soon as its layer is replaced

    for names, source in bar(linears, desc="Ternarizing", unit="layer", delay=2, leave=False):
        old = model.get_submodule(names[0])
        assert isinstance(old, nn.Linear)
        if names[0] in fitted:
            new = fitted.pop(names[0]).train(old.training)
        elif source == names[0]:
            new = TernaryLinear.from_linear(old, rule=config.rule, activation_bits=config.activation_bits)
        else:
            twin = model.get_submodule(source)
            assert isinstance(twin, TernaryLinear)
            new = TernaryLinear.from_packed(twin.packed(), old.bias, activation_bits=config.activation_bits)
            new.train(old.training)
        put(model, names, new)
        del old
    for names in table_names:
        table = model.get_submodule(names[0])
        assert isinstance(table, nn.Embedding)
        put(model, names, embedding_of(config.embedding_bits).from_embedding(table))
    hf.attach(model, config, len(texts or ()))
    attach(model, fuse=fuse)
    if fuse and any(p.is_cuda for p in model.parameters()):
        fuse_what_fits(model)
    return model


def _with_tables(model: Model, wanted: int) -> Model:
    """Round the embedding tables of a ternary model to so many bits, or with 16 make them plain, in place."""
    _refuse_adapters(model)
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedEmbedding):
            found.setdefault(id(module), (module, []))[1].append(name)
    if not found and wanted != 16:
        skipped = _skipped_tables(model)
        plain = (c for c in choose_tables(model) if not c.reason and id(c.module) not in skipped)
        found = {id(c.module): (c.module, list(c.names)) for c in plain}
        if not found:
            raise TriternError("the model has no embedding table to round; tritern.summary(model) says why")
    new: list[tuple[list[str], nn.Module]] = []
    for table, names in found.values():
        if getattr(table, "bits", 16) == wanted:
            continue
        try:
            whole: Any = table.to_embedding() if isinstance(table, QuantizedEmbedding) else table
            new.append((names, whole if wanted == 16 else embedding_of(wanted).from_embedding(whole)))
        except TriternError as error:
            raise TriternError(f"{names[0]}: {error}") from None
    for names, table in new:  # all of them are good
        put(model, names, table)
    if new:
        hf.attach(model)
        if hasattr(model, "_model_card_text"):
            vars(model)["_model_card_text"] = model_card(model, settings_of(model), tables_alone=True)
    return model


def _skipped_tables(model: nn.Module) -> set[int]:
    """ids of the tables that ``skip`` left plain when the transformers models inside were patched."""
    return {
        id(c.module)
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and is_ternary(part)
        for c in choose_tables(part, tuple(settings_of(part).skip))
        if c.reason.startswith("skip=")
    }


def put(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Replace what has these names by ``module``, which takes over its forward hooks."""
    for name in names:
        old = model.get_submodule(name)
        for hooks in _HOOKS:
            setattr(module, hooks, getattr(old, hooks))
        model.set_submodule(name, module)


def plan(model: nn.Module, config: TernaryConfig) -> tuple[list[Choice], list[Choice]]:
    """The linear layers and the embedding tables to convert, after every check that can be made beforehand.

    Raises:
        TriternError: as ``patch``.
    """
    if isinstance(model, nn.Linear):
        raise TriternError(
            "a bare nn.Linear cannot be replaced in place; use tritern.TernaryLinear.from_linear(layer)"
        )
    linears = list(choose(model, config.skip))
    tables = list(choose_tables(model, config.skip))
    _check(model, config, linears, tables)
    chosen, chosen_tables = ([c for c in kind if not c.reason] for kind in (linears, tables))
    return chosen, [] if config.embedding_bits == 16 else chosen_tables


def _warn_of_the_rest(model: nn.Module, chosen: list[Choice]) -> None:
    """Say so if the layers that become ternary are the smaller part of a model's matrices."""
    ternary = sum({id(w): w.numel() for c in chosen if isinstance(w := c.module.weight, Tensor)}.values())
    matrices = [c for c in others(model) if not isinstance(c.module, nn.EmbeddingBag)]  # that is a table
    sizes = [sum(p.numel() for p in matrices_of(c.module).values()) for c in matrices]
    if sum(sizes) > ternary:
        largest = matrices[sizes.index(max(sizes))]
        name = common_name(
            [largest.name, *(c.name for c in matrices if starred(c.name) == starred(largest.name))]
        )
        warnings.warn(
            f"{sum(sizes):,} weights are in matrices that are no nn.Linear and stay in full precision; "
            f"{ternary:,} become ternary. The largest: {name}: {largest.reason}. "
            "tritern.summary(model) lists them all.",
            stacklevel=3,
        )


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
            f"the model is already ternary ({ternary} TernaryLinear layers); patch a full-precision one "
            "(with embedding_bits alone its tables can be changed)"
        )
    for pattern in config.skip:
        if not any(c.reason == f"skip={pattern!r}" for c in linears + tables):
            raise TriternError(
                f"skip={pattern!r} matches no linear layer or table. Names look like {linears[0].name!r}."
                if linears
                else f"skip={pattern!r} matches nothing: the model has no linear layers"
            )
    _refuse_adapters(model)
    if all(c.reason for c in linears):
        detail = _reasons([*linears, *others(model)]) or "it has no nn.Linear at all"
        raise TriternError(f"no linear layer to make ternary in {type(model).__name__} ({detail})")
    for c in linears + ([] if config.embedding_bits == 16 else tables):
        if c.reason:
            continue
        weight = c.module.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise TriternError(f"{c.name}.weight is on the meta device: load the weights before patching")
        try:
            check_device(weight.device)
        except ValueError as error:
            raise TriternError(f"{c.name}.weight: {error}") from None
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


def _refuse_adapters(model: nn.Module) -> None:
    adapters = [
        name
        for name, module in model.named_modules()
        if any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__)
    ]
    if adapters:
        raise TriternError(
            f"the model carries PEFT adapters ({len(adapters)} modules, such as {adapters[-1]}). Merge them "
            "into its weights first (merge_and_unload of peft), or patch the plain model and adapt that"
        )


def _reasons(choices: list[Choice]) -> str:
    """Why layers are left, for the first five kinds of them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for c in choices:
        groups.setdefault((starred(c.name), c.reason), []).append(c.name)
    return "; ".join([f"{common_name(names)}: {reason}" for (_, reason), names in groups.items()][:5])
