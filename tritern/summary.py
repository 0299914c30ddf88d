"""``tritern.summary``: a model's ternary layers, its other layers with the reasons, and its size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritern_kernels import cpu, padded_k, ternarize_weight

from .config import TernaryConfig
from .conversion import selected
from .engine.encoder import is_sentence_transformer
from .engine.path import path_of
from .errors import TriternError
from .inputs import check_model
from .nn.embedding import QuantizedEmbedding, embedding_of
from .nn.linear import TernaryLinear
from .pretrained import model_of
from .progress import bar
from .selection import (
    SMALLEST_TABLE,
    matrices_of,
    others,
    select_linears,
    select_tables,
)
from .summary_types import LayerSummary, SkippedLayer, Summary, TableSummary, zero_fraction_of


def summary(model: nn.Module | str | Path) -> Summary:
    """Summarize a model; of a model that is not ternary, also what ``patch`` would make of it.

    The latter takes as long as patching does. Weights may be on the meta device. The model is not changed.

    Args:
        model: a SentenceTransformer or any ``nn.Module``, or the folder or name of a SentenceTransformer.

    Raises:
        TriternError: not a model, or no such model.
    """
    if isinstance(model, (str, Path)):
        model = model_of(model, "model")
    check_model(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    ternary = [(n, m) for n, m in model.named_modules() if isinstance(m, TernaryLinear)]
    layers = [_ternary(name, module, dtype) for name, module in _first(ternary)]
    tables = [_table(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedEmbedding)]
    found = _summary(model, layers, tables, dtype)
    if layers or tables:
        return replace(
            found, path=_path(model), **_products((m, m.activation_bits) for _, m in _first(ternary))
        )
    try:
        selected(model, TernaryConfig())
        refusal = ""
    except TriternError as error:
        refusal = str(error)
    return replace(found, planned=_planned(model, dtype, counted=not refusal), refusal=refusal)


def _summary(
    model: nn.Module, layers: list[LayerSummary], tables: list[TableSummary], dtype: torch.dtype
) -> Summary:
    """The summary of a model with these layers and tables."""
    skipped = [
        SkippedLayer(
            c.name, c.reason or ("named in skip" if layers else "not patched"), _bytes([c.module.weight])
        )
        for c in select_linears(model)
    ]
    skipped += [SkippedLayer(c.name, c.reason, _bytes(matrices_of(c.module).values())) for c in others(model)]
    skipped_tables = [  # a table that could be rounded is worth a line only beside one that is
        SkippedLayer(c.name, c.reason or "named in skip", _bytes([c.module.weight]))
        for c in select_tables(model)
        if isinstance(c.module, nn.Embedding) and c.module.num_embeddings >= SMALLEST_TABLE
        if c.reason or tables
    ]
    before, after = sum(la.bytes_before for la in layers), sum(la.bytes_after for la in layers)
    saved = sum(t.bytes_before - t.bytes_after for t in tables)
    total = _bytes({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    return Summary(
        layers=tuple(layers),
        skipped=tuple(skipped),
        linear_bytes_before=before,
        linear_bytes_after=after,
        model_bytes_before=total - after + before + saved,
        model_bytes_after=total,
        bits_per_weight=_bits_per_weight(layers),
        zero_fraction=zero_fraction_of(layers),
        dtype=dtype,
        tables=tuple(tables),
        skipped_tables=tuple(skipped_tables),
    )


def _planned(model: nn.Module, dtype: torch.dtype, counted: bool) -> Summary | None:
    """The summary of the model that ``patch`` would make; with shares of zeros if ``counted``."""
    linears = _first((c.name, c.module) for c in select_linears(model) if not c.reason)
    if not linears:
        return None
    layers = []
    for name, module in bar(linears, desc="Ternarizing", unit="layer", delay=2, leave=False):
        N, K = module.weight.shape
        zeros = _zeros_of(ternarize_weight(module.weight).codes()) if counted else None
        after = N * padded_k(K) // 4 + 4 * N
        layers.append(LayerSummary(name, (N, K), N * K * dtype.itemsize, after, zeros))
    config = TernaryConfig()
    rounded = embedding_of(config.embedding_bits)
    found: list[tuple[str, Any]] = [(c.name, c.module) for c in select_tables(model) if not c.reason]
    tables = [_table(name, rounded.like(table)) for name, table in found]
    plain = _summary(model, [], tables, dtype)
    before, after = sum(la.bytes_before for la in layers), sum(la.bytes_after for la in layers)
    saved = before - after + sum(t.bytes_before - t.bytes_after for t in tables)
    return replace(
        plain,
        layers=tuple(layers),
        skipped_tables=tuple(s for s in plain.skipped_tables if s.reason != "named in skip"),
        skipped=tuple(s for s in plain.skipped if s.reason != "not patched"),
        linear_bytes_before=before,
        linear_bytes_after=after,
        model_bytes_before=plain.model_bytes_after,
        model_bytes_after=plain.model_bytes_after - saved,
        bits_per_weight=_bits_per_weight(layers),
        zero_fraction=zero_fraction_of(layers),
        path=_path(model),
        **_products((module, config.activation_bits) for _, module in linears),
    )


def _path(model: nn.Module) -> str:
    return str(path_of(model)) if is_sentence_transformer(model) else ""


def _first(layers: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Names and layers without those that share the weight of an earlier one."""
    first: dict[int, tuple[str, Any]] = {}
    for name, layer in layers:
        first.setdefault(id(layer.weight), (name, layer))
    return list(first.values())


def _ternary(name: str, layer: TernaryLinear, dtype: torch.dtype) -> LayerSummary:
    N, K = layer.out_features, layer.in_features
    zeros = None if layer.weight.is_meta else _zeros_of(layer.packed().codes())
    after = layer.weight.numel() + 4 * layer.weight_scale.numel()
    return LayerSummary(name, (N, K), N * K * dtype.itemsize, after, zeros, layer.weight_bits)


def _products(layers: Iterable[tuple[Any, int]]) -> dict[str, Any]:
    """The products of layers with these bits of activations on their devices, and the bytes these keep."""
    lines: dict[str, None] = {}
    unpacked = 0
    for layer, bits in layers:
        device, kind = layer.weight.device, f"{'int8' if bits == 8 else '16-bit'} activations"
        if device.type == "cpu":
            name = cpu.product_for(bits, layer.in_features, getattr(layer, "weight_bits", 2))
            each = cpu.PRODUCTS[name].bytes
            unpacked += each * layer.in_features * layer.out_features
            lines[f"{name} on the CPU, {kind}: unpacked to {8 * each} bits a weight at the first use"] = None
        else:
            lines[f"{'Triton kernels' if device.type == 'cuda' else 'nothing'} on {device}, {kind}"] = None
    return {"products": tuple(lines), "unpacked_bytes": unpacked}


def _table(name: str, table: QuantizedEmbedding) -> TableSummary:
    shape, scale = (table.num_embeddings, table.embedding_dim), table.weight_scale
    before = shape[0] * shape[1] * scale.element_size()
    return TableSummary(name, shape, before, _bytes([table.weight, scale]), table.bits)


def _zeros_of(codes: Tensor) -> float:
    return 1 - int(codes.count_nonzero()) / codes.numel()


def _bits_per_weight(layers: Sequence[LayerSummary]) -> float:
    weights = sum(la.shape[0] * la.shape[1] for la in layers)
    return 8 * sum(la.bytes_after for la in layers) / max(weights, 1)


def _bytes(tensors) -> int:  # noqa: ANN001
    return sum(t.numel() * t.element_size() for t in tensors)
