"""Ternary weights fitted to texts, layer by layer. Each layer compensates the errors of those before it.

Nothing is trained: there are no gradients and no labels. Let y = W x be a layer of the original, and x' its
inputs in the ternary model, where earlier layers are ternary. The codes t and the scale s of a row w minimise

    sum over tokens of (w x + b - s t x' - b')^2

Every text has the same weight; b' is free if the layer has a bias. If a residual stream is added to the
layer's output, it counts as part of both outputs, so its errors are compensated, too. Let H = sum of x' x'^T
and c = sum of (w x) x', both about their means if there is a bias. The objective is then
s^2 t H t^T - 2 s t c^T plus a constant. The descent lowers it one code at a time, with the best scale in
between, until no code changes.

The objective is that of GPTQ (arXiv:2210.17323). The target is the original's output on its own inputs, as in
GPTAQ (arXiv:2504.02692). GPTQ rounds each weight once; this descent revises codes until they rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritern_kernels import PackedTernary
from tritern_kernels.formats import pack

from ..config import TernaryConfig
from ..errors import TriternError
from ..inputs import check_texts, many
from ..modes import evaluating
from ..nn.embedding import embedding_of
from ..nn.linear import TernaryLinear
from ..progress import bar
from .codes import search
from .stream import Batch, Group, Stream, trace

LEAST_TEXTS = 16
"""Fewer texts say too little about the inputs of a layer."""

DAMPING, SCARCITY = 0.01, 0.3
"""Share of the inputs' mean square to add to the diagonal of H, and a further share per in_features / tokens.
Directions that the texts hardly use then keep the original's weights.
"""


_NO_INPUTS = (bytes, bytearray, int, float, type(None))
"""Types that no model takes as an input: a text is missing or was not decoded."""


def checked(inputs: Iterable[Any]) -> list[Any]:
    """The inputs to calibrate on: the different texts that are not empty, then all other inputs.

    Args:
        inputs: texts or other inputs of ``model.preprocess``, such as pairs of texts, images or dicts. They
            are read once.

    Raises:
        TriternError: not an iterable of inputs; a value that is not an input; an invalid character; too few
            inputs.
    """
    found = list(many(inputs, "calibration_texts"))
    for number, value in enumerate(found):
        for text in [value] if isinstance(value, _NO_INPUTS) else _strings(value):
            check_texts([text], number, name="calibration_texts", empty=True)
    texts = dict.fromkeys(value for value in found if isinstance(value, str) and value.strip())
    found = [*texts, *(value for value in found if not isinstance(value, str))]
    if len(found) < LEAST_TEXTS:
        raise TriternError(
            f"calibration_texts must be at least {LEAST_TEXTS} different texts, a few hundred are better; "
            f"received {len(found)} that are not empty"
        )
    return found


def _strings(value: Any) -> Iterator[str]:
    """The texts in an input: the input itself, or the parts of a pair, a dict or a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def calibrate(
    model: Any,
    layers: Sequence[tuple[str, ...]],
    tables: Sequence[tuple[str, ...]],
    inputs: Sequence[Any],
    config: TernaryConfig,
) -> dict[str, TernaryLinear]:
    """Ternary layers fitted to the outputs of a model's linear layers. The model is not changed.

    Some layers are left out: those that no input reaches, such as a model's image half, and those whose runs
    cannot be compared or fitted (experts that see other tokens than before, inputs that are all zero).

    Args:
        model: a sentence-transformers model, in full precision.
        layers: all names of each ``nn.Linear``.
        tables: all names of each ``nn.Embedding`` to be rounded; layers compensate that error, too.
        inputs: from ``checked``.
        config: its ``rule`` gives the scales by which the first codes are rounded.

    Returns:
        The layers by their first names.

    Raises:
        TriternError: not a model that takes texts, or one that does not take these.
    """
    batches = _batches(model, inputs)
    student = copy.deepcopy(model).eval()
    for names in tables:
        table = student.get_submodule(names[0])
        assert isinstance(table, nn.Embedding)
        _put(student, names, embedding_of(config.embedding_bits).from_embedding(table))
    all_names = {names[0]: names for names in layers}
    fitted: dict[str, TernaryLinear] = {}
    with evaluating(model):
        groups = trace(model, list(all_names), batches[0])
        original, ternary = Stream(model, batches), Stream(student, batches)
        for group in bar(groups, desc="Calibrating", unit="step", delay=2, leave=False):
            original.advance(group.names[0])
            ternary.advance(group.names[0])
            # a shared layer's own first runs change the inputs of its later runs, so those are not fitted
            moments = _measure(original, original if group.times > 1 else ternary, group)
            if moments is None:
                continue
            for name in group.names:
                layer = _fit(model.get_submodule(name), name, moments, config)
                if layer is not None:
                    fitted[name] = layer
                    _put(student, all_names[name], layer)
    return fitted


def _put(model: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, module)


def _batches(model: Any, inputs: Sequence[Any], size: int = 32) -> list[Batch]:
    """Preprocessed batches, the shortest first. The model's prompts, if any, are put before texts in turn."""
    if not hasattr(model, "preprocess"):
        raise TriternError(
            f"calibration_texts need a sentence-transformers model; received "
            f"{type(model).__name__}. Patch it inside a SentenceTransformer, or without calibration_texts."
        )
    prompts = list(dict.fromkeys(p or "" for p in (getattr(model, "prompts", None) or {}).values())) or [""]
    inputs = [prompts[i % len(prompts)] + x if isinstance(x, str) else x for i, x in enumerate(inputs)]
    inputs = sorted(inputs, key=lambda x: len(x) if isinstance(x, str) else 0)
    try:
        batches = [model.preprocess(inputs[i : i + size]) for i in range(0, len(inputs), size)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TriternError(f"calibration_texts: the model does not take them: {error}") from error
    device = next(model.parameters()).device
    return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]


# ---------------------------------------------------------------- the objective


@dataclass
class Moments:
    """Sums over tokens, float64, and the number of tokens.

    The sums are x' x'^T [K + 1, K + 1], with a 1 after every x', and for each layer y x'^T [N, K + 1], where
    y is the wanted output of the layer.
    """

    squares: Tensor
    products: dict[str, Tensor]
    tokens: int


def _measure(original: Stream, ternary: Stream, group: Group) -> Moments | None:
    """Moments of a group's outputs in one stream and its inputs in the other; None if runs do not match."""
    found: Moments | None = None
    for i, batch in enumerate(original.batches):
        wanted, given = original.calls(i, group), ternary.calls(i, group)
        if [c.input.shape for c in wanted] != [c.input.shape for c in given]:
            return None
        for target, call in zip(wanted, given):
            weights = _token_weights(batch, call.input)
            rows = call.input.reshape(len(weights), -1).float()
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            weighted = rows * weights[:, None]
            products: dict[str, Tensor] = {}
            for name, y in target.outputs.items():
                y = y.float()
                if target.added is not None and call.added is not None:
                    y = y + (target.added.float() - call.added.float())
                products[name] = (y.reshape(len(rows), -1).T @ weighted).double()
            squares, tokens = (weighted.T @ rows).double(), int(weights.count_nonzero())
            if found is None:
                found = Moments(squares, products, tokens)
            else:
                found.squares += squares
                found.products = {name: found.products[name] + p for name, p in products.items()}
                found.tokens += tokens
    return found


def _token_weights(batch: Batch, x: Tensor) -> Tensor:
    """Weights for the rows of x [..., K]: the tokens of a text share a weight of 1, padding has 0. Rows that
    are not tokens share the weight of all texts.
    """
    rows = x.shape[:-1].numel()
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.ones(rows, dtype=torch.float32, device=x.device)
    weights = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)  # of integers: the default dtype
    if x.shape[:-1] == mask.shape:
        return weights.flatten().to(x.device)
    if rows == int(mask.sum()):  # padding was taken out
        return weights[mask.bool()].to(x.device)
    return torch.full((rows,), len(mask) / rows, dtype=torch.float32, device=x.device)


def _fit(layer: Any, name: str, moments: Moments, config: TernaryConfig) -> TernaryLinear | None:
    """The ternary layer for these moments; None if they say nothing."""
    total, squares, product = moments.squares[-1, -1], moments.squares, moments.products[name]
    mean, given = squares[-1, :-1] / total, product[:, -1] / total
    H, C = squares[:-1, :-1] / total, product[:, :-1] / total
    if layer.bias is not None:
        H, C = H - torch.outer(mean, mean), C - torch.outer(given, mean)
    damping = (DAMPING + SCARCITY * len(H) / max(moments.tokens, 1)) * H.diagonal().mean()
    if not (damping > 0 and torch.isfinite(H).all() and torch.isfinite(C).all()):
        return None
    H = H + damping * torch.eye(len(H), dtype=H.dtype, device=H.device)
    C = C + damping * layer.weight.double()
    start = TernaryLinear.from_linear(layer, rule=config.rule, activation_bits=config.activation_bits)
    codes, scale = search(start.weight_scale, H, C)
    bias = layer.bias
    if bias is not None:
        bias = nn.Parameter((given - scale * (codes.double() @ mean)).to(bias.dtype), bias.requires_grad)
    if not (torch.isfinite(scale).all() and (bias is None or torch.isfinite(bias).all())):
        return None
    packed = PackedTernary(pack(codes.to(torch.int8)), scale, start.packed().shape)
    return TernaryLinear.from_packed(packed, bias, activation_bits=config.activation_bits)
