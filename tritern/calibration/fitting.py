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
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritern_kernels import PackedWeight
from tritern_kernels.formats import LARGEST_CODE, pack

from ..config import TernaryConfig
from ..errors import TriternError
from ..inputs import check_texts, many
from ..modes import evaluating, quick_products
from ..nn.embedding import embedding_of
from ..nn.linear import TernaryLinear, linear_of
from ..progress import bar
from .codes import search
from .store import Store
from .stream import Batch, Call, Group, Stream, trace

LEAST_TEXTS = 16
"""Fewer texts say too little about the inputs of a layer."""

DAMPING, SCARCITY = 0.2, 0.3
"""Share of the inputs' mean square to add to the diagonal of H, and a further share per in_features / tokens.
Directions that the texts hardly use then keep the original's weights.
"""


MOST_UNKNOWN = 0.1
"""Share of unknown tokens from which on the texts do not fit the model."""

_logger = logging.getLogger(__name__)
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
    store: Store | None = None,
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
        store: takes each group of layers when it is fitted, and gives those of an earlier run.

    Returns:
        The layers by their first names.

    Raises:
        TriternError: not a model that takes texts, or one that does not take these.
    """
    batches = batches_of(model, inputs)
    _warn_of_unknown_words(model, batches)
    student = copy_around(model)
    for names in tables:
        table = student.get_submodule(names[0])
        assert isinstance(table, nn.Embedding)
        put(student, names, embedding_of(config.embedding_bits).from_embedding(table))
    all_names = {names[0]: names for names in layers}
    fitted: dict[str, TernaryLinear] = {}
    with evaluating(model), quick_products():
        groups = trace(model, list(all_names), batches[0])
        original, ternary = Stream(model, batches), Stream(student.eval(), batches)
        with bar(total=len(groups), desc="Calibrating", unit="step", delay=2, leave=False) as progress:
            done, wanted, targets = 0, [], []
            for block in original.by_block(groups):
                numbers, bits = range(done, done + len(block)), config.activation_bits
                known = [None if store is None else store.layers(n, model, bits) for n in numbers]
                if None in known:
                    original.advance(block[0].names[0])
                    ternary.advance(block[0].names[0])
                    wanted = targets_of(original, block)
                for i, group in enumerate(block):
                    found = known[i]
                    if found is None:
                        targets = wanted[i]
                        # a shared layer's first runs change the inputs of its later ones: they do not count
                        given = targets if group.times > 1 else ternary.inputs(group)
                        found = dict(fit(model, group, measure(targets, given, batches), all_names, config))
                        if store is not None:
                            store.keep(done, found)
                    for name, layer in found.items():
                        fitted[name] = layer
                        put(student, all_names[name], layer)
                    done += 1
                    progress.update()
                wanted = targets = []  # before those of the next block are made
    return fitted


def _warn_of_unknown_words(model: Any, batches: Sequence[Batch]) -> None:
    """Say if the texts hold many words that the tokenizer does not know, as those of another language."""
    unknown = getattr(getattr(model, "tokenizer", None), "unk_token_id", None)
    tokenized = [b for b in batches if {"input_ids", "attention_mask"} <= {*b}]
    ids = [b["input_ids"][b["attention_mask"].bool()] for b in tokenized]
    if unknown is None or not ids:
        return
    share = sum(int((i == unknown).sum()) for i in ids) / max(1, sum(map(len, ids)))
    if share > MOST_UNKNOWN:
        _logger.warning(
            f"{share:.0%} of the calibration texts' tokens are unknown to the model's tokenizer: the texts "
            "may be in a language that it was not made for. Calibrate on texts like those that it will embed."
        )


def copy_around(model: nn.Module) -> Any:
    """A copy of the model with modules of its own around the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def targets_of(stream: Stream, groups: Sequence[Group]) -> list[list[list[Call]]]:
    """The runs of each group in the original, for each batch, ready to be fitted to.

    Outputs are those of tokens, not of padding, with what a residual stream adds. They are kept in half the
    memory: rounding to bf16 adds far less error than is left. Inputs of layers that run once are those of the
    ternary model; only their shape counts here. Layers that run several times are fitted to the original's
    own inputs, so nothing added differs.
    """
    found: list[list[list[Call]]] = [[] for _ in groups]
    for i, batch in enumerate(stream.batches):
        for group, calls, kept in zip(groups, stream.calls(i, groups), found):
            for call in calls:
                tokens = _token_weights(batch, call.input) > 0
                for name, y in call.outputs.items():
                    y = y if call.added is None or group.times > 1 else y + call.added
                    y = y.reshape(len(tokens), -1)[tokens]
                    call.outputs[name] = y.bfloat16() if y.dtype == torch.float32 else y
                call.added = None
                call.input = call.input.to("meta") if group.times == 1 else call.input
            kept.append(calls)
    return found


def put(model: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    """Put a module in the place of the one with these names."""
    for name in names:
        model.set_submodule(name, module)


def batches_of(model: Any, inputs: Sequence[Any], size: int = 32) -> list[Batch]:
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


def measure(
    targets: Sequence[list[Call]], given: Iterable[list[Call]], batches: Sequence[Batch]
) -> Moments | None:
    """Moments of a group's wanted outputs and its inputs; None if runs do not match.

    Args:
        targets: from ``targets_of``.
        given: the runs in the model that the layers are fitted for, for each batch.
        batches: the batches.
    """
    found: Moments | None = None
    for batch, wanted, runs in zip(batches, targets, given):
        if [c.input.shape for c in wanted] != [c.input.shape for c in runs]:
            return None
        for target, call in zip(wanted, runs):
            weights = _token_weights(batch, call.input)
            keep = weights > 0
            weights = weights[keep]
            rows = call.input.reshape(len(keep), -1)[keep].float()
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            weighted = rows * weights[:, None]
            added = None if call.added is None else call.added.reshape(len(keep), -1)[keep].float()
            products: dict[str, Tensor] = {}
            for name, y in target.outputs.items():
                y = y.float() if added is None else y.float() - added
                products[name] = (y.T @ weighted).double()
            squares, tokens = (weighted.T @ rows).double(), len(rows)
            if found is None:
                found = Moments(squares, products, tokens)
            else:
                found.squares += squares
                for name, product in products.items():
                    found.products[name] += product
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


def fit(
    model: nn.Module,
    group: Group,
    moments: Moments | None,
    all_names: dict[str, tuple[str, ...]],
    config: TernaryConfig,
    quick: bool = False,
) -> Iterator[tuple[str, TernaryLinear]]:
    """The layers of a group, fitted to these moments, with their names; none if the moments say nothing.
    ``quick``: as of ``search``.
    """
    if moments is None:
        return
    alike: dict[tuple[int, bool], list[str]] = {}
    for name in group.names:
        layer: Any = model.get_submodule(name)
        alike.setdefault((config.bits_of(all_names[name]), layer.bias is not None), []).append(name)
    for (bits, _), names in alike.items():
        layers = [model.get_submodule(name) for name in names]
        products = [moments.products[n] for n in names]
        yield from zip(names, _fit_alike(layers, products, moments, bits, config, quick))


def _fit_alike(
    layers: list[Any], products: list[Tensor], moments: Moments, bits: int, config: TernaryConfig, quick: bool
) -> list[TernaryLinear]:
    """Layers with the same input, all with a bias or all without, fitted in one search."""
    total, squares, product = moments.squares[-1, -1], moments.squares, torch.cat(products)
    mean, given = squares[-1, :-1] / total, product[:, -1] / total
    H, C = squares[:-1, :-1] / total, product[:, :-1] / total
    if layers[0].bias is not None:
        H, C = H - torch.outer(mean, mean), C - torch.outer(given, mean)
    damping = (DAMPING + SCARCITY * len(H) / max(moments.tokens, 1)) * H.diagonal().mean()
    if not (damping > 0 and torch.isfinite(H).all() and torch.isfinite(C).all()):
        return []
    H = H + damping * torch.eye(len(H), dtype=H.dtype, device=H.device)
    C = C + damping * torch.cat([layer.weight for layer in layers]).double()
    kind = linear_of(bits)
    starts = [kind.from_linear(layer, rule=config.rule) for layer in layers]
    codes, scale = search(
        torch.cat([start.weight_scale for start in starts]), H, C, LARGEST_CODE[bits], quick
    )
    bias = given - scale * (codes.double() @ mean)
    if not (torch.isfinite(scale).all() and torch.isfinite(bias).all()):
        return []
    fitted, row = [], 0
    for layer in layers:
        rows = slice(row, row := row + layer.out_features)
        own = layer.bias
        if own is not None:
            own = nn.Parameter(bias[rows].to(own.dtype), own.requires_grad)
        shape = (layer.out_features, layer.in_features)
        packed = PackedWeight(pack(codes[rows].to(torch.int8), bits), scale[rows].clone(), shape)
        fitted.append(TernaryLinear.from_packed(packed, own, activation_bits=config.activation_bits))
    return fitted
