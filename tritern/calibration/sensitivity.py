"""Which layers lose most in two bits: the choice of those that get four within a budget.

Each group of layers with the same input is made ternary alone, fitted to a few texts, and the change of the
model's output is measured. The groups with the largest change per weight get four bits, as many as the budget
holds. A group's own change is taken for what it adds to that of the others, and four bits for free of loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import TernaryConfig
from ..errors import TriternError
from ..inputs import number
from ..modes import evaluating, quick_products
from ..nn.linear import TernaryLinear
from ..progress import bar
from .fitting import batches_of, copy_around, fit, measure, put, targets_of
from .stream import Group, Stream, trace

TEXTS = 48
"""Inputs that the changes are measured on. The order of the groups needs no more."""


def budget(bits: float) -> float:
    """A budget in bits per weight, checked.

    Raises:
        TriternError: not a number from 2 to 4.
    """
    value = number(bits, "bits")
    if not 2 <= value <= 4:
        raise TriternError(
            f"bits per weight must be from 2 (all ternary) to 4 (all in 4 bits); received {bits!r}"
        )
    return value


def layers_to_widen(
    model: Any, layers: Sequence[tuple[str, ...]], inputs: Sequence[Any], config: TernaryConfig, bits: float
) -> dict[str, int]:
    """The layers that get four bits so that all weights take at most ``bits`` bits on average, as a mapping
    for ``TernaryConfig.weight_bits``. Scales are not counted.

    Args:
        model: a sentence-transformers model in full precision; it is not changed.
        layers: all names of each ``nn.Linear``.
        inputs: as of ``fitting.calibrate``.
        config: the conversion's settings.
        bits: from ``budget``.
    """
    sizes = {names[0]: model.get_submodule(names[0]).weight.numel() for names in layers}
    left = (bits - 2) / 2 * sum(sizes.values())
    if bits == 4:
        return dict.fromkeys(sizes, 4)
    if left < min(sizes.values()):
        return {}
    changes = _changes(model, layers, inputs, config)
    chosen: list[str] = []
    weights = {names: sum(sizes[n] for n in names) for names in changes}
    for names in sorted(changes, key=lambda names: changes[names] / weights[names], reverse=True):
        if weights[names] <= left:
            left -= weights[names]
            chosen.extend(names)
    return dict.fromkeys(chosen, 4)


def _changes(
    model: Any, layers: Sequence[tuple[str, ...]], inputs: Sequence[Any], config: TernaryConfig
) -> dict[tuple[str, ...], float]:
    """For each group of layers with the same input: the squared change of the output when they alone are
    ternary, as a share of the output's variance.
    """
    few = inputs[:: max(1, len(inputs) // TEXTS)][:TEXTS]
    batches = batches_of(model, few)
    all_names = {names[0]: names for names in layers}
    changes: dict[tuple[str, ...], float] = {}
    student = copy_around(model).eval()
    with evaluating(model), quick_products():
        groups = trace(model, list(all_names), batches[0])
        stream = Stream(student, batches)
        whole = [_output(stream, i) for i in range(len(batches))]
        variance = sum(_variance(y) for y in whole)
        with bar(
            total=len(groups), desc="Measuring sensitivity", unit="step", delay=2, leave=False
        ) as progress:
            for block in stream.by_block(groups):
                stream.advance(block[0].names[0])
                for group in block:
                    fitted = _fitted(model, stream, group, all_names, config)
                    if fitted:
                        for name, layer in fitted.items():
                            put(student, all_names[name], layer)
                        change = sum(_squared(_output(stream, i), y) for i, y in enumerate(whole))
                        changes[tuple(group.names)] = change / variance
                        for name in fitted:
                            put(student, all_names[name], model.get_submodule(name))
                    progress.update()
    return changes


def _fitted(
    model: Any, stream: Stream, group: Group, all_names: dict[str, tuple[str, ...]], config: TernaryConfig
) -> dict[str, TernaryLinear]:
    (targets,) = targets_of(stream, [group])
    given = targets if group.times > 1 else stream.inputs(group)
    return dict(fit(model, group, measure(targets, given, stream.batches), all_names, config, quick=True))


def _output(stream: Stream, i: int) -> Tensor:
    """What the model makes of batch ``i``, float32 [texts, ...]: its embeddings, or else its floating-point
    outputs side by side.
    """
    found = stream.run(i)
    if isinstance(found, dict) and isinstance(found.get("sentence_embedding"), Tensor):
        return torch.nn.functional.normalize(found["sentence_embedding"].float(), dim=-1)
    given = {id(t) for t in stream.batches[i].values()}
    values = found.values() if isinstance(found, dict) else [found]
    new = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and id(v) not in given]
    return torch.cat([v.float().flatten(1) for v in new], 1)


def _variance(y: Tensor) -> float:
    return float((y - y.mean(0)).square().sum())


def _squared(y: Tensor, wanted: Tensor) -> float:
    return float((y - wanted).square().sum())
