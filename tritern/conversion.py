"""The conversion of a model: select its layers, check them, replace them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tritern_kernels.devices import check_device
from tritern_kernels.formats import check_shape
from tritern_kernels.ops import FLOATS

from .calibration.fitting import calibrate
from .calibration.sensitivity import layers_to_widen
from .calibration.store import Store
from .config import TernaryConfig, covers
from .errors import TriternError
from .nn.embedding import embedding_of
from .nn.linear import TernaryLinear, linear_of
from .nn.replace import put
from .progress import bar
from .selection import Selection, common_name, matrices_of, others, select_linears, select_tables, starred

_logger = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    config: TernaryConfig,
    texts: Sequence[Any] | None = None,
    bits: float | None = None,
    folder: Path | None = None,
) -> TernaryConfig:
    """Replace a model's linear layers by ternary ones and round its tables, in place, layer by layer.

    Args:
        model: the model.
        config: settings.
        texts: from ``calibration.fitting.checked``; None: weights are not fitted.
        bits: from ``calibration.sensitivity.budget``: choose ``weight_bits`` within it; needs texts.
        folder: where the calibration keeps what it has, and goes on from.

    Returns:
        The settings, with the ``weight_bits`` chosen.

    Raises:
        TriternError: as ``patch``. The model is then unchanged.

    Warns:
        UserWarning: as ``patch``.
    """
    linears, tables = selected(model, config)
    _warn_of_the_rest(model, linears)

    first: dict[int, str] = {}  # layers with the very same weight share the packed weight of the first
    sources = [(c.names, first.setdefault(id(c.module.weight), c.name)) for c in linears]
    table_names = [c.names for c in tables]
    fitted: dict[str, TernaryLinear] = {}
    if texts is not None:
        own = [c.names for c in linears if sum(c.module.weight is d.module.weight for d in linears) == 1]
        store = None if folder is None else Store(folder, model, texts, config, bits)
        if bits is not None:
            chosen = store and store.bits()
            if chosen is None:
                chosen = layers_to_widen(model, own, texts, config, bits)
                if store is not None:
                    store.keep_bits(chosen)
            config = replace(config, weight_bits=chosen)
        fitted = calibrate(model, own, table_names, texts, config, store)
        if left := [names[0] for names in own if names[0] not in fitted]:
            names = ", ".join(left[:5]) + (" ..." if len(left) > 5 else "")
            _logger.warning(
                f"{len(left)} of {len(own)} layers could not be fitted to the calibration texts: texts do "
                f"not reach them, or inputs are zero, NaN or infinite. The rule rounds them: {names}"
            )
    del linears, tables  # each full-precision weight is freed when its layer is replaced

    for names, source in bar(sources, desc="Ternarizing", unit="layer", delay=2, leave=False):
        old = model.get_submodule(names[0])
        assert isinstance(old, nn.Linear)
        if names[0] in fitted:
            new = fitted.pop(names[0]).train(old.training)
        elif source == names[0]:
            kind = linear_of(config.bits_of(names))
            new = kind.from_linear(old, rule=config.rule, activation_bits=config.activation_bits)
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
    return config


def selected(model: nn.Module, config: TernaryConfig) -> tuple[list[Selection], list[Selection]]:
    """The linear layers and the embedding tables to convert, after all checks.

    Raises:
        TriternError: as ``patch``.
    """
    if isinstance(model, nn.Linear):
        raise TriternError(
            "a bare nn.Linear cannot be replaced in place; use tritern.TernaryLinear.from_linear(layer)"
        )
    linears = list(select_linears(model, config.skip))
    tables = list(select_tables(model, config.skip))
    _check(model, config, linears, tables)
    linears, tables = ([c for c in kind if not c.reason] for kind in (linears, tables))
    return linears, [] if config.embedding_bits == 16 else tables


def _warn_of_the_rest(model: nn.Module, linears: list[Selection]) -> None:
    """Warn if most of the model's matrix weights do not become ternary."""
    ternary = sum({id(w): w.numel() for c in linears if isinstance(w := c.module.weight, Tensor)}.values())
    matrices = [c for c in others(model) if not isinstance(c.module, nn.EmbeddingBag)]  # that is a table
    sizes = [sum(p.numel() for p in matrices_of(c.module).values()) for c in matrices]
    if sum(sizes) > ternary:
        largest = matrices[sizes.index(max(sizes))]
        name = common_name(
            [largest.name, *(c.name for c in matrices if starred(c.name) == starred(largest.name))]
        )
        warnings.warn(
            f"{sum(sizes):,} weights are in matrices that are not nn.Linear and stay in full precision; "
            f"{ternary:,} become ternary. The largest: {name}: {largest.reason}. "
            "tritern.summary(model) lists them all.",
            stacklevel=4,
        )


def _check(
    model: nn.Module, config: TernaryConfig, linears: list[Selection], tables: list[Selection]
) -> None:
    """Raise for everything that can be wrong, before anything is changed."""
    method = _foreign_quantization(model)
    if method:
        raise TriternError(
            f"the model is already quantized ({method}); load it in full precision and patch that"
        )
    ternary = sum(isinstance(m, TernaryLinear) for m in model.modules())
    if ternary:
        raise TriternError(
            f"the model is already ternary ({ternary} TernaryLinear layers); patch a full-precision one "
            "(patch with embedding_bits alone changes the tables of a ternary model)"
        )
    for pattern in config.skip:
        if not any(c.reason == f"skip={pattern!r}" for c in linears + tables):
            raise TriternError(
                f"skip={pattern!r} matches no linear layer or table. Names look like {linears[0].name!r}."
                if linears
                else f"skip={pattern!r} matches nothing: the model has no linear layers"
            )
    for pattern in config.weight_bits if isinstance(config.weight_bits, Mapping) else ():
        if not any(covers(pattern, name) for c in linears if not c.reason for name in c.names):
            known = next((c.name for c in linears if not c.reason), "")
            raise TriternError(
                f"weight_bits={{{pattern!r}: ...}} matches no ternary layer. Names look like {known!r}."
            )
    refuse_adapters(model)
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
                N, K = weight.shape
                check_shape(N, K, config.bits_of(c.names))
        except ValueError as error:
            raise TriternError(f"{c.name}: {error} Or name it in skip=.") from None


def refuse_adapters(model: nn.Module) -> None:
    """Raise ``TriternError`` for a model with PEFT adapters."""
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


def _reasons(choices: list[Selection]) -> str:
    """Why layers stay in full precision, for the first five kinds of them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for c in choices:
        groups.setdefault((starred(c.name), c.reason), []).append(c.name)
    return "; ".join([f"{common_name(names)}: {reason}" for (_, reason), names in groups.items()][:5])


def _foreign_quantization(model: nn.Module) -> str | None:
    """Name of another quantization method in the config of a transformers model inside, or None."""
    for module in model.modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        if config is not None and isinstance(module, PreTrainedModel):
            method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
            if method != TernaryConfig.quant_method:
                return str(getattr(method, "value", method))
    return None
