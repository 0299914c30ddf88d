"""Ternary weights fitted to texts: layer by layer, each making up for the errors of those before it.

Nothing is trained: there are no gradients and no labels. For a layer y = W x of the original, whose inputs x'
now come from layers that are ternary already, the codes t and the scale s of a row w are chosen to minimise

    sum over tokens of (w x + b - s t x' - b')^2

(of every text the same weight), with b' free where the layer has a bias. Where a residual stream is added to
what the layer gives, it counts as part of both outputs, so that its errors so far are made up for too. With
H = sum of x' x'^T and c = sum of (w x) x', both about their means where there is a bias, this is
s^2 t H t^T - 2 s t c^T and a constant: a quadratic that is lowered one code at a time, over and over until no
code changes, with the best scale in between.

The objective is that of GPTQ (arXiv:2210.17323), with the original's outputs on its own inputs as the target
(as in GPTAQ, arXiv:2504.02692). GPTQ rounds each weight once; the descent revises codes until they rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

from tritern_kernels import PackedTernary
from tritern_kernels.formats import pack

from .choice import blocks_of
from .config import TernaryConfig
from .embedding import Int8Embedding
from .errors import TriternError
from .linear import TernaryLinear

LEAST_TEXTS = 16
"""Fewer say next to nothing about the inputs of a layer."""

DAMPING = 0.01
"""Share of the inputs' mean square added to all of them, independently: directions that the texts hardly use
keep the original's weights.
"""

FIRST_SCALE, KICKS = 0.8, (0.85, 1.15)
"""Of the rule's scales, by which the first codes are rounded, and of the best ones found, where the search
starts again: together a tenth less squared error than one descent from the rule's codes (MiniLM).
"""

SWEEPS = 20
COLUMNS = 128
"""Codes of so many inputs are revised before what follows from them is passed on to the rest of the row."""


def calibrate(
    model: Any, layers: Sequence[str], tables: Sequence[str], inputs: Sequence[Any], config: TernaryConfig
) -> dict[str, TernaryLinear]:
    """Ternary layers for linear ones, fitted to what the model makes of the inputs. It is left as it is.

    Layers that no input reaches, as those of a model's image half, are not among the results.

    Args:
        model: a sentence-transformers model, in full precision.
        layers: names of the ``nn.Linear``s.
        tables: names of the ``nn.Embedding``s that will be int8, so that layers make up for their errors too.
        inputs: texts, or what else ``model.preprocess`` takes.
        config: ``rule`` says from which codes the descent starts.

    Raises:
        TriternError: not a model that takes texts, or too few texts.
    """
    batches = _batches(model, inputs)
    student = copy.deepcopy(model).eval()
    for name in tables:
        table = student.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        student.set_submodule(name, Int8Embedding.from_embedding(table))
    fitted: dict[str, TernaryLinear] = {}
    with _evaluating(model), torch.inference_mode(False), torch.no_grad():
        groups = _trace(model, layers, batches[0])
        streams = _Stream(model, batches), _Stream(student, batches)
        bar = tqdm(groups, desc="Calibrating", unit="step", delay=2, leave=False, disable=None)
        for group in bar:
            for stream in streams:
                stream.advance(group.names[0])
            squares, products = _measure(*streams, group)
            for name, product in products.items():
                fitted[name] = _fit(model.get_submodule(name), squares, product, config)
                student.set_submodule(name, fitted[name])
    return fitted


# ---------------------------------------------------------------- inputs


def _batches(model: Any, inputs: Sequence[Any], size: int = 32) -> list[dict[str, Any]]:
    """Preprocessed batches, the shortest first; the model's prompts, if any, before the texts in turn."""
    if not hasattr(model, "preprocess"):
        raise TriternError(
            f"calibration_texts need a sentence-transformers model, which takes texts; received "
            f"{type(model).__name__}. Patch it inside a SentenceTransformer, or without calibration_texts."
        )
    if isinstance(inputs, str):
        raise TriternError("calibration_texts must be many texts, not one string")
    inputs = [i for i in inputs if not (isinstance(i, str) and not i.strip())]
    if len(inputs) < LEAST_TEXTS:
        raise TriternError(
            f"calibration_texts must be at least {LEAST_TEXTS} texts, a few hundred are better; "
            f"received {len(inputs)} that are not empty"
        )
    prompts = list(dict.fromkeys(p or "" for p in (getattr(model, "prompts", None) or {}).values())) or [""]
    inputs = [prompts[i % len(prompts)] + x if isinstance(x, str) else x for i, x in enumerate(inputs)]
    inputs = sorted(inputs, key=lambda x: len(x) if isinstance(x, str) else 0)
    batches = [model.preprocess(inputs[i : i + size]) for i in range(0, len(inputs), size)]
    device = next(model.parameters()).device
    return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]


def _token_weights(batch: dict[str, Any], rows: int, device: torch.device) -> Tensor | None:
    """Weights [rows] that sum to 1 over the tokens of a text and leave padding out; None: all rows alike."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
    if rows == mask.numel():
        return weights.flatten().to(device)
    if rows == int(mask.sum()):  # padding was taken out
        return weights[mask.bool()].to(device)
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout for as long as the context lasts."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---------------------------------------------------------------- passes through a model


class _Done(Exception):
    """Thrown by a hook when a pass has gone far enough."""


class _Additions(TorchDispatchMode):
    """Calls ``seen(tensor, other)`` when ``other`` is added to a tensor that is watched: a residual stream to
    what a layer gives.
    """

    def __init__(self, seen: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.seen = seen
        self.watched: dict[int, Tensor] = {}  # by address; kept, so that no other tensor comes to lie there

    def watch(self, tensor: Tensor) -> None:
        """Look for additions to this tensor from now on."""
        self.watched[tensor.data_ptr()] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs:
            tensors = [a for a in args if isinstance(a, Tensor)]
            if len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
                for one, other in (tensors, tensors[::-1]):
                    if (known := self.watched.get(one.data_ptr())) is not None and known.shape == one.shape:
                        self.seen(known, other.clone())  # add_ may be about to change it
                        break
        return func(*args, **(kwargs or {}))


@dataclass
class _Group:
    """Layers with the same input, in the order in which they run, how often they do in one pass, and whether
    a residual stream is added to what they give.
    """

    names: list[str]
    times: int
    added: bool


def _trace(model: nn.Module, layers: Sequence[str], batch: dict[str, Any]) -> list[_Group]:
    """All layers that the batch reaches, in groups, in the order of their first run."""
    first: list[tuple[str, Tensor]] = []
    times: dict[str, int] = {}
    outputs: dict[int, str] = {}
    added: set[str] = set()

    def enter(name: str, module: nn.Module, args: Any) -> None:
        times[name] = times.get(name, 0) + 1
        if times[name] == 1:
            first.append((name, args[0]))  # kept, so that no later tensor comes to lie at its address

    def leave(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        additions.watch(output)
        outputs[id(output)] = name

    additions = _Additions(lambda output, _: added.add(outputs[id(output)]))
    with ExitStack() as stack:
        for name in layers:
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(partial(enter, name)).remove)
            stack.callback(layer.register_forward_hook(partial(leave, name)).remove)
        stack.enter_context(additions)
        model(dict(batch))
    groups: list[_Group] = []
    for i, (name, x) in enumerate(first):
        group = groups[-1] if i and x is first[i - 1][1] else None
        if group and (group.times, group.added) == (times[name], False) and name not in added:
            group.names.append(name)
        else:
            groups.append(_Group([name], times[name], name in added))
    return groups


@dataclass
class _Call:
    """One run of a group of layers: its input, what each layer gave and what was added to the last one's."""

    input: Tensor
    outputs: list[Tensor]
    added: Tensor | None = None


class _Stream:
    """A model's passes over the batches, each begun behind the last block that is finished.

    Finished blocks are not run again: each hands on what the last of them gave for the batch. Where that
    changes what arrives behind them, as the blocks do not form a chain, everything is run from the start.
    """

    def __init__(self, model: nn.Module, batches: list[dict[str, Any]]) -> None:
        self.model, self.batches = model, batches
        self.blocks = blocks_of(model)
        self.finished: list[nn.Module] = []
        self.kept: list[Any] = [None] * len(batches)

    def run(self, i: int) -> None:
        """One pass over batch ``i``, until a hook throws ``_Done``."""
        for block in self.finished:
            block.forward = lambda *_, out=self.kept[i], **__: out
        try:
            self.model(dict(self.batches[i]))
        except _Done:
            pass
        finally:
            for block in self.finished:
                del block.forward

    def advance(self, layer: str) -> None:
        """Finish the blocks before the one that holds ``layer``."""
        names = list(self.blocks)
        here = next((i for i, n in enumerate(names) if layer.startswith(f"{n}.")), 0)
        before = [self.blocks[n] for n in names[:here]]
        if len(before) <= len(self.finished) or len({id(b) for b in before}) < len(before):
            return
        outputs = [self._output(i, before[-1]) for i in range(len(self.batches))]
        expected = self._input(layer)
        self.finished, self.kept = before, outputs
        if not torch.equal(self._input(layer), expected):
            self.blocks, self.finished = {}, []

    def _output(self, i: int, block: nn.Module) -> Any:
        found: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise _Done

        with ExitStack() as hooks:
            hooks.callback(block.register_forward_hook(keep).remove)
            self.run(i)
        return found[0]

    def _input(self, layer: str) -> Tensor:
        """What arrives at a layer from the first, shortest batch."""
        return self.calls(0, _Group([layer], 1, added=False))[0].input

    def calls(self, i: int, group: _Group) -> list[_Call]:
        """The runs of a group of layers in one pass over batch ``i``."""
        found: list[_Call] = []

        def enter(module: nn.Module, args: Any) -> None:
            found.append(_Call(args[0], []))

        def leave(module: nn.Module, args: Any, output: Tensor) -> None:
            found[-1].outputs.append(output)
            if group.added:
                additions.watch(output)
            elif len(found) == group.times and len(found[-1].outputs) == len(group.names):
                raise _Done

        def seen(output: Tensor, other: Tensor) -> None:
            found[-1].added = other
            if len(found) == group.times:
                raise _Done

        additions = _Additions(seen)
        with ExitStack() as stack:
            layers = [self.model.get_submodule(name) for name in group.names]
            stack.callback(layers[0].register_forward_pre_hook(enter).remove)
            for layer in layers:
                stack.callback(layer.register_forward_hook(leave).remove)
            if group.added:
                stack.enter_context(additions)
            self.run(i)
        return found


# ---------------------------------------------------------------- what is minimised


def _measure(teacher: _Stream, student: _Stream, group: _Group) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums over tokens, float64: of x' x'^T [K + 1, K + 1], where a 1 is put behind every x', and for each
    layer of y x'^T [N, K + 1], y being what the layer should give.
    """
    squares, products = torch.zeros(()), dict.fromkeys(group.names, torch.zeros(()))
    for i, batch in enumerate(teacher.batches):
        for wanted, given in zip(teacher.calls(i, group), student.calls(i, group)):
            rows = given.input.reshape(-1, given.input.shape[-1]).float()
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            weights = _token_weights(batch, len(rows), rows.device)
            weighted = rows if weights is None else rows * weights[:, None]
            squares = (weighted.T @ rows).double() + squares.to(rows.device)
            for name, y in zip(group.names, wanted.outputs):
                if wanted.added is not None and given.added is not None:
                    y = y + (wanted.added - given.added)
                product = y.reshape(len(rows), -1).float().T @ weighted
                products[name] = product.double() + products[name].to(rows.device)
    return squares, products


def _fit(linear: nn.Linear, squares: Tensor, product: Tensor, config: TernaryConfig) -> TernaryLinear:
    """The ternary layer for the sums of ``_measure``."""
    start = TernaryLinear.from_linear(linear, rule=config.rule, activation_bits=config.activation_bits)
    total, mean = squares[-1, -1], squares[-1, :-1] / squares[-1, -1]
    H, C = squares[:-1, :-1] / total, product[:, :-1] / total
    if linear.bias is not None:
        given = product[:, -1] / total
        H, C = H - torch.outer(mean, mean), C - torch.outer(given, mean)
    damping = DAMPING * H.diagonal().mean()
    H, C = H + damping * torch.eye(len(H), device=H.device), C + damping * linear.weight
    codes, scale = search(start.weight_scale, H, C)
    bias = linear.bias
    if bias is not None:
        bias = nn.Parameter((given - scale * (codes.double() @ mean)).to(bias.dtype), bias.requires_grad)
    packed = PackedTernary(pack(codes.to(torch.int8)), scale, start.packed().shape)
    return TernaryLinear.from_packed(packed, bias, activation_bits=config.activation_bits)


def search(scale: Tensor, H: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float32 [N, K] in {-1, 0, +1} and positive scales float32 [N] with, in every row, a low
    ``scale^2 codes H codes^T - 2 scale codes C^T``.

    A descent from the best real-valued weights, rounded; then others from there, with scales too small or too
    large for one sweep, of which each row keeps what is lower.

    Args:
        scale: float32 [N], about as large as the result.
        H: float64 [K, K], symmetric and positive definite.
        C: float64 [N, K].
    """
    weight = torch.linalg.solve(H, C.T).T.float()
    H, C, scale = H.float(), C.float(), FIRST_SCALE * scale
    codes = (weight / scale[:, None]).round().clamp(-1, 1)
    codes, scale = descend(codes, _best_scale(codes, scale, H, C), H, C)
    for factor in KICKS:
        others, other_scale = descend(codes, factor * scale, H, C)
        lower = _objective(others, other_scale, H, C) < _objective(codes, scale, H, C)
        codes, scale = torch.where(lower[:, None], others, codes), torch.where(lower, other_scale, scale)
    return codes, scale


def descend(codes: Tensor, scale: Tensor, H: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales that no change of one code or of the scale makes better, from those given; shapes and
    objective as in ``search``, all float32.
    """
    codes, diagonal = codes.clone(), H.diagonal()
    for _ in range(SWEEPS):
        slope = C / scale[:, None] - codes @ H
        changed = 0
        for begin in range(0, codes.shape[1], COLUMNS):
            part = slice(begin, begin + COLUMNS)
            inner, here = H[part, part], diagonal[part]
            now, g = codes[:, part].T.contiguous(), slope[:, part].T.contiguous()  # a row an input
            old = now.clone()
            for k in range(len(now)):
                best = (g[k] / here[k] + now[k]).round_().clamp_(-1, 1)
                g[k + 1 :] -= inner[k, k + 1 :, None] * (best - now[k])
                now[k] = best
            moved = (now - old).T
            changed += int(moved.count_nonzero())
            codes[:, part] = now.T
            slope[:, part.stop :] -= moved @ H[part, part.stop :]
        scale = _best_scale(codes, scale, H, C)
        if changed <= 1e-4 * codes.numel():
            break
    return codes, scale


def _best_scale(codes: Tensor, scale: Tensor, H: Tensor, C: Tensor) -> Tensor:
    """Scales [N] that minimise the objective for these codes; the given ones where that is not positive."""
    along, length = (codes * C).sum(1), ((codes @ H) * codes).sum(1)
    return torch.where((along > 0) & (length > 0), along / length.clamp(min=1e-30), scale)


def _objective(codes: Tensor, scale: Tensor, H: Tensor, C: Tensor) -> Tensor:
    """What ``search`` minimises, [N]."""
    return scale**2 * ((codes @ H) * codes).sum(1) - 2 * scale * (codes * C).sum(1)
