"""A whole model made trainable, and packed again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..checkpoint import quantizer
from ..config import TernaryConfig
from ..conversion import selected
from ..errors import TriternError
from ..formats.dequantize import dequantize
from ..nn.embedding import QuantizedEmbedding, embedding_of
from ..nn.linear import TernaryLinear
from ..nn.replace import put
from ..selection import select_linears, select_tables
from .layers import TrainableQuantizedEmbedding, TrainableTernaryLinear


def make_trainable(
    model: nn.Module,
    config: TernaryConfig,
    *,
    scales: Mapping[str, Tensor] | None = None,
    through_tables: bool = True,
    **options: Any,
) -> list[str]:
    """Replace the layers that ``patch`` would convert by trainable forms, in place.

    Args:
        model: in full precision.
        config: as for ``patch``.
        scales: first scales, by the layer's name.
        through_tables: round embedding tables during training, not only at its end.
        **options: the remaining arguments of ``TrainableTernaryLinear``.

    Returns:
        The names of the modules for ``pack_trained`` to convert.

    Raises:
        TriternError: as ``patch``.
    """
    if config.weight_bits != 2:
        raise TriternError(f"training makes two-bit weights; received weight_bits={config.weight_bits!r}")
    linears, tables = selected(model, config)
    first: dict[int, TrainableTernaryLinear] = {}
    for choice in linears:
        old = choice.module
        assert isinstance(old, nn.Linear)
        options["scale"] = (scales or {}).get(choice.name)
        new = TrainableTernaryLinear(old, rule=config.rule, activation_bits=config.activation_bits, **options)
        new.weight_scale = first.setdefault(id(old.weight), new).weight_scale  # shared like the weight
        put(model, choice.names, new)
    for choice in tables:
        assert isinstance(choice.module, nn.Embedding)
        if through_tables:
            put(model, choice.names, TrainableQuantizedEmbedding.around(choice.module, config.embedding_bits))
    return [name for c in linears + tables for name in c.names]


def reopen(model: nn.Module, latent: float) -> tuple[TernaryConfig, dict[str, Tensor]]:
    """Turn a ternary float32 model into a plain one with its codes, in place, for further training.

    Args:
        model: the model.
        latent: nonzero weights become this multiple of their scales. Below 1 they stay clear of the clip; at
            1 the clip would cut them off as soon as a scale falls. Above 1/2 they keep their codes.

    Returns:
        Settings that make exactly the same layers ternary again, and the scales [out_features] by the layers'
        names.

    Raises:
        TriternError: as ``dequantize``; layers with different ``activation_bits``, tables of different
            ``bits``, or a layer that ``patch`` would not convert.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    layers = {name: m for name, m in named.items() if isinstance(m, TernaryLinear)}
    if wide := [name for name, m in layers.items() if m.weight_bits != 2]:
        raise TriternError(
            f"only two-bit weights can be trained on; {wide[0]} and {len(wide) - 1} more have 4 bits"
        )
    tables = {name: m.bits for name, m in named.items() if isinstance(m, QuantizedEmbedding)}
    names = {*layers, *tables}
    bits, table_bits = {m.activation_bits for m in layers.values()}, set(tables.values())
    if len(bits) > 1:
        raise TriternError(f"activation_bits must be the same in all ternary layers; they are {sorted(bits)}")
    if len(table_bits) > 1:
        raise TriternError(f"embedding tables must have the same bits; they have {sorted(table_bits)}")
    scales = {name: layer.weight_scale.detach().clone() for name, layer in layers.items()}
    dequantize(model)
    plain = [model.get_submodule(name) for name in layers]
    for weight in {id(m.weight): m.weight for m in plain if isinstance(m, nn.Linear)}.values():
        weight.data.mul_(latent)
    found = [c for c in (*select_linears(model), *(select_tables(model) if tables else ())) if not c.reason]
    if missing := names.difference(*(c.names for c in found)):
        raise TriternError(f"{sorted(missing)[0]} is ternary, and tritern.patch would not make it so again")
    return TernaryConfig(
        activation_bits=bits.pop() if bits else 8,
        embedding_bits=table_bits.pop() if tables else 16,
        skip=tuple(c.name for c in found if names.isdisjoint(c.names)),
    ), scales


def pack_trained(model: nn.Module, config: TernaryConfig, names: Iterable[str]) -> None:
    """Replace trainable modules by their packed forms, in place."""
    _swap(model, names, config.embedding_bits)
    quantizer.attach(model, config)


@contextmanager
def packed_form(model: nn.Module, config: TernaryConfig, names: Iterable[str]) -> Iterator[None]:
    """Pack the model while the context lasts, to save or score it."""
    trainable = _swap(model, names, config.embedding_bits)
    try:
        quantizer.attach(model, config)
        yield
    finally:
        quantizer.detach(model)
        for name, layer in trainable.items():
            model.set_submodule(name, layer)


def _swap(model: nn.Module, names: Iterable[str], embedding_bits: int) -> dict[str, nn.Module]:
    old = {name: model.get_submodule(name) for name in names}
    new: dict[int, nn.Module] = {}
    for layer in old.values():
        if isinstance(layer, TrainableTernaryLinear):
            new.setdefault(id(layer), layer.packed_layer())
        elif isinstance(layer, TrainableQuantizedEmbedding):
            new.setdefault(id(layer), layer.packed_table())
        elif isinstance(layer, nn.Embedding):
            new.setdefault(id(layer), embedding_of(embedding_bits).from_embedding(layer))
    for name, layer in old.items():
        put(model, [name], new[id(layer)])
    return old
