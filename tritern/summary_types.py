"""The parts of a summary, and its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .selection import (
    common_name,
    starred,
)


def zero_fraction_of(layers: Sequence[LayerSummary]) -> float | None:
    """Share of zeros among all codes of the layers; None if it is unknown for one of them."""
    weights = [la.shape[0] * la.shape[1] for la in layers]
    known = [la.zero_fraction * n for la, n in zip(layers, weights) if la.zero_fraction is not None]
    return sum(known) / max(sum(weights), 1) if len(known) == len(layers) else None


@dataclass(frozen=True)
class LayerSummary:
    """One ternary layer: shape (N, K), bytes before (in the model's dtype) and after (codes and scales), and
    the share of zeros (None if the weights are on the meta device), and bits of a code.
    """

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    zero_fraction: float | None
    bits: int = 2


@dataclass(frozen=True)
class TableSummary:
    """One rounded embedding table: shape (rows, width), bytes before and after, bits of a value."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    bits: int = 8


@dataclass(frozen=True)
class SkippedLayer:
    """A linear layer, other matrix or embedding table left in full precision."""

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Layers and sizes of a model; ``print`` shows it as a table.

    Sizes are bytes of parameters and buffers; those of linears leave out biases. ``before`` assumes the dtype
    of the model's remaining parameters. Shares of zeros are None if weights are on the meta device.

    Attributes:
        planned: the summary after ``patch`` with its defaults, of a model without ternary layers and rounded
            tables; None if there is nothing to patch.
        refusal: why ``patch`` would refuse such a model, or empty.
        products: the code that multiplies the ternary layers on their devices.
        unpacked_bytes: further memory of the layers on a CPU, from the first use on.
        path: how a SentenceTransformer embeds texts when it is ternary, and why.
    """

    layers: tuple[LayerSummary, ...]
    skipped: tuple[SkippedLayer, ...]
    linear_bytes_before: int
    linear_bytes_after: int
    model_bytes_before: int
    model_bytes_after: int
    bits_per_weight: float
    zero_fraction: float | None
    dtype: torch.dtype = field(default=torch.float32)
    tables: tuple[TableSummary, ...] = ()
    skipped_tables: tuple[SkippedLayer, ...] = ()
    planned: Summary | None = None
    refusal: str = ""
    products: tuple[str, ...] = ()
    unpacked_bytes: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.planned is not None:
            until = f", once this is fixed ({self.refusal})" if self.refusal else ""
            return f"Not ternary; tritern.patch would make this of it{until}:\n{self.planned}"
        rows = [("layers", "count", "shape", "before", "after", "zeros"), *self._rows()]
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
            for r in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-2, "-" * len(lines[0]))
        if self.refusal:
            lines.insert(0, f"Not ternary, and tritern.patch refuses it: {self.refusal}")
        else:
            linears = self.linear_bytes_before / max(self.linear_bytes_after, 1)
            whole = self.model_bytes_before / max(self.model_bytes_after, 1)
            lines.append(
                f"{self.bits_per_weight:.2f} bits per {self._kind} weight; "
                f"linears 1/{linears:.1f} and model 1/{whole:.1f} of {_name(self.dtype)}"
            )
        lines += [f"Multiplied by {product}" for product in self.products]
        lines += [f"Encoded by {self.path}"] if self.path else []
        lines += _skipped_lines("ternary", self.skipped)
        lines += _skipped_lines(f"int{self.tables[0].bits}" if self.tables else "int8", self.skipped_tables)
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__  # a session shows the table

    @property
    def _kind(self) -> str:
        return "ternary" if all(layer.bits == 2 for layer in self.layers) else "packed"

    def _rows(self) -> Iterator[tuple[str, str, str, str, str, str]]:
        """Rows for each kind of layers, each table and the whole."""
        groups: dict[tuple[str, tuple[int, int], int], list[LayerSummary]] = {}
        for layer in self.layers:
            groups.setdefault((starred(layer.name), layer.shape, layer.bits), []).append(layer)
        for (_, (N, K), bits), group in groups.items():
            before, after = sum(g.bytes_before for g in group), sum(g.bytes_after for g in group)
            name, zeros = common_name([g.name for g in group]), _percent(zero_fraction_of(group))
            name += " (4 bits)" if bits == 4 else ""
            yield name, str(len(group)), f"{N} x {K}", _size(before), _size(after), zeros
        before, after = _size(self.linear_bytes_before), _size(self.linear_bytes_after)
        yield (
            f"all {self._kind} layers",
            str(len(self.layers)),
            "",
            before,
            after,
            _percent(self.zero_fraction),
        )
        for t in self.tables:
            before, after = _size(t.bytes_before), _size(t.bytes_after)
            yield f"{t.name} (int{t.bits})", "1", f"{t.shape[0]} x {t.shape[1]}", before, after, ""
        yield "whole model", "", "", _size(self.model_bytes_before), _size(self.model_bytes_after), ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _skipped_lines(kind: str, skipped: tuple[SkippedLayer, ...]) -> list[str]:
    """A line for each name and reason; ``*`` in a name stands for the numbers of several layers."""
    groups: dict[tuple[str, str], list[SkippedLayer]] = {}
    for layer in skipped:
        groups.setdefault((starred(layer.name), layer.reason), []).append(layer)
    lines = []
    for (_, reason), group in groups.items():
        name = common_name([g.name for g in group])
        count = f"{len(group)} layers, " if len(group) > 1 else ""
        lines.append(f"not {kind}: {name} ({count}{_size(sum(s.bytes for s in group))}): {reason}")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
