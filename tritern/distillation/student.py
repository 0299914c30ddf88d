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
    """Replace, in place, what ``patch`` would convert by trainable forms.

    Args:
        model: in full precision.
        config: as for ``patch``.
        scales: by name of the layer, to start from.
        through_tables: round embedding tables in training too, and not only at its end.
        **options: the remaining arguments of ``TrainableTernaryLinear``.

    Returns:
        The names of all that ``pack_trained`` shall convert.

    Raises:
        TriternError: as ``patch``.
    """
    linears, tables = selected(model, config)
    first: dict[int, TrainableTernaryLinear] = {}
    for choice in linears:
        old = choice.module
        assert isinstance(old, nn.Linear)
        options["scale"] = (scales or {}).get(choice.name)
        new = TrainableTernaryLinear(old, rule=config.rule, activation_bits=config.activation_bits, **options)
        new.weight_scale = first.setdefault(id(old.weight), new).weight_scale  # shared as the weight is
        put(model, choice.names, new)
    for choice in tables:
        assert isinstance(choice.module, nn.Embedding)
        if through_tables:
            put(model, choice.names, TrainableQuantizedEmbedding.around(choice.module, config.embedding_bits))
    return [name for c in linears + tables for name in c.names]


def reopen(model: nn.Module, latent: float) -> tuple[TernaryConfig, dict[str, Tensor]]:
    """Give a ternary float32 model plain layers with its codes, in place, to be trained on.

    Args:
        model: the model.
        latent: weights are left at this multiple of their scales. Below 1 they are clear of the clip, which
            at 1 would cut them off as soon as a scale falls, and still ternary by the same codes above 1/2.

    Returns:
        The settings by which just what was ternary becomes ternary again, and the scales [out_features] by
        the layers' names.

    Raises:
        TriternError: as ``dequantize``; layers with different ``activation_bits``, tables of different
            ``bits``, or what ``patch`` would not convert.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    layers = {name: m for name, m in named.items() if isinstance(m, TernaryLinear)}
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
    """Replace what is trainable by its packed form, in place."""
    _swap(model, names, config.embedding_bits)
    quantizer.attach(model, config)


@contextmanager
def packed_form(model: nn.Module, config: TernaryConfig, names: Iterable[str]) -> Iterator[None]:
    """The packed model for as long as the context lasts, to be saved or scored."""
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
