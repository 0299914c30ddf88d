"""``tritern.summary``: what is ternary in a model, what is not and why, and what it weighs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .choice import SMALLEST_TABLE, choose, choose_tables, common_name, matrices_of, others, starred
from .embedding import Int8Embedding
from .linear import TernaryLinear


@dataclass(frozen=True)
class LayerSummary:
    """One ternary layer: shape (N, K), bytes before (in the model's dtype) and after (codes and scales),
    share of zeros.
    """

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    zero_fraction: float


@dataclass(frozen=True)
class TableSummary:
    """One int8 embedding table: shape (rows, width), bytes before and after."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SkippedLayer:
    """A linear layer, other matrix or embedding table left in full precision."""

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Layers and sizes of a model; ``print`` shows it as a table. Sizes are of parameters and buffers,
    without biases for the linears, in bytes; ``before`` assumes the dtype of the model's remaining
    parameters.
    """

    layers: tuple[LayerSummary, ...]
    skipped: tuple[SkippedLayer, ...]
    linear_bytes_before: int
    linear_bytes_after: int
    model_bytes_before: int
    model_bytes_after: int
    bits_per_weight: float
    zero_fraction: float
    dtype: torch.dtype = field(default=torch.float32)
    tables: tuple[TableSummary, ...] = ()
    skipped_tables: tuple[SkippedLayer, ...] = ()

    def __str__(self) -> str:
        rows = [("layers", "count", "shape", "before", "after", "zeros")]
        groups: dict[tuple[str, tuple[int, int]], list[LayerSummary]] = {}
        for layer in self.layers:
            groups.setdefault((starred(layer.name), layer.shape), []).append(layer)
        for (_, shape), group in groups.items():
            before, after = sum(g.bytes_before for g in group), sum(g.bytes_after for g in group)
            zeros = sum(g.zero_fraction for g in group) / len(group)
            rows.append(
                (
                    common_name([g.name for g in group]),
                    str(len(group)),
                    f"{shape[0]} x {shape[1]}",
                    _size(before),
                    _size(after),
                    f"{zeros:.1%}",
                )
            )
        before, after = self.linear_bytes_before, self.linear_bytes_after
        rows.append(
            (
                "all ternary layers",
                str(len(self.layers)),
                "",
                _size(before),
                _size(after),
                f"{self.zero_fraction:.1%}",
            )
        )
        for t in self.tables:
            shape = f"{t.shape[0]} x {t.shape[1]}"
            rows.append((f"{t.name} (int8)", "1", shape, _size(t.bytes_before), _size(t.bytes_after), ""))
        rows.append(
            ("whole model", "", "", _size(self.model_bytes_before), _size(self.model_bytes_after), "")
        )
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
            for r in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-2, "-" * len(lines[0]))
        dtype = str(self.dtype).removeprefix("torch.")
        lines.append(
            f"{self.bits_per_weight:.2f} bits per ternary weight; linears 1/{before / max(after, 1):.1f} "
            f"and model 1/{self.model_bytes_before / max(self.model_bytes_after, 1):.1f} of {dtype}"
        )
        lines += _skipped_lines("ternary", self.skipped) + _skipped_lines("int8", self.skipped_tables)
        return "\n".join(line.rstrip() for line in lines)


def summary(model: nn.Module) -> Summary:
    """Summarize a patched (or loaded) model; an unpatched one has no layers and names what would be patched.

    Args:
        model: a SentenceTransformer or any ``nn.Module``.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layers, zeros = [], 0.0
    shared: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear) and module.weight.data_ptr() not in shared:
            shared.add(module.weight.data_ptr())
            codes = module.packed().codes()
            fraction = float((codes == 0).float().mean())
            zeros += fraction * codes.numel()
            after = module.weight.numel() + 4 * module.weight_scale.numel()
            shape = (module.out_features, module.in_features)
            layers.append(LayerSummary(name, shape, codes.numel() * dtype.itemsize, after, fraction))
    ternary = bool(layers)
    skipped = [
        SkippedLayer(
            c.name, c.reason or ("named in skip" if ternary else "not patched"), _bytes([c.module.weight])
        )
        for c in choose(model)
    ]
    skipped += [SkippedLayer(c.name, c.reason, _bytes(matrices_of(c.module).values())) for c in others(model)]
    tables = [_table(n, m) for n, m in model.named_modules() if isinstance(m, Int8Embedding)]
    skipped_tables = [  # a table that could be int8 is worth a line only beside one that is
        SkippedLayer(c.name, c.reason or "named in skip", _bytes([c.module.weight]))
        for c in choose_tables(model)
        if isinstance(c.module, nn.Embedding) and c.module.num_embeddings >= SMALLEST_TABLE
        if c.reason or tables
    ]
    before, after = sum(la.bytes_before for la in layers), sum(la.bytes_after for la in layers)
    saved = sum(t.bytes_before - t.bytes_after for t in tables)
    total = _bytes({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    weights = sum(la.shape[0] * la.shape[1] for la in layers)
    return Summary(
        layers=tuple(layers),
        skipped=tuple(skipped),
        linear_bytes_before=before,
        linear_bytes_after=after,
        model_bytes_before=total - after + before + saved,
        model_bytes_after=total,
        bits_per_weight=8 * after / weights if weights else 0.0,
        zero_fraction=zeros / weights if weights else 0.0,
        dtype=dtype,
        tables=tuple(tables),
        skipped_tables=tuple(skipped_tables),
    )


def _table(name: str, table: Int8Embedding) -> TableSummary:
    scale = table.weight_scale
    before = table.weight.numel() * scale.element_size()
    return TableSummary(
        name, (table.num_embeddings, table.embedding_dim), before, _bytes([table.weight, scale])
    )


def _skipped_lines(kind: str, skipped: tuple[SkippedLayer, ...]) -> list[str]:
    """A line for each name and reason, ``*`` standing for the numbers of several."""
    groups: dict[tuple[str, str], list[SkippedLayer]] = {}
    for layer in skipped:
        groups.setdefault((starred(layer.name), layer.reason), []).append(layer)
    lines = []
    for (_, reason), group in groups.items():
        name = common_name([g.name for g in group])
        count = f"{len(group)} layers, " if len(group) > 1 else ""
        lines.append(f"not {kind}: {name} ({count}{_size(sum(s.bytes for s in group))}): {reason}")
    return lines


def _bytes(tensors) -> int:  # noqa: ANN001
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
