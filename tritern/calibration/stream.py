"""Passes of texts through a model up to one group of layers, to record its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from ..selection import blocks_of

Batch = dict[str, Any]


@dataclass
class Group:
    """Layers with the same input, in the order in which they run; their runs in one pass; whether a residual
    stream is added to their output.
    """

    names: list[str]
    times: int
    added: bool


@dataclass
class Call:
    """One run of a group of layers: its input, each layer's output, and the addition to the last output."""

    input: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)
    added: Tensor | None = None


def trace(model: nn.Module, layers: Sequence[str], batch: Batch) -> list[Group]:
    """All layers that the batch reaches, in groups, in the order of their first run."""
    first: list[tuple[str, Tensor]] = []
    times: dict[str, int] = {}
    outputs: dict[int, str] = {}
    added: set[str] = set()

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        times[name] = times.get(name, 0) + 1
        if times[name] == 1:
            first.append((name, _input_of(args, kwargs)))  # kept alive: no later tensor gets its address

    def leave(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        additions.watch(output)
        outputs[id(output)] = name

    additions = _Additions(lambda output, _: added.add(outputs[id(output)]))
    with ExitStack() as stack:
        for name in layers:
            layer = model.get_submodule(name)
            before = layer.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(layer.register_forward_hook(partial(leave, name)).remove)
        stack.enter_context(additions)
        model(dict(batch))
    groups: list[Group] = []
    for i, (name, x) in enumerate(first):
        group = groups[-1] if i and x is first[i - 1][1] else None
        if group and (group.times, group.added) == (times[name], False) and name not in added:
            group.names.append(name)
        else:
            groups.append(Group([name], times[name], name in added))
    return groups


class Stream:
    """A model's passes over the batches, each starting after the last finished block.

    Finished blocks do not run again; they pass on the kept output of the last of them. If this changes later
    outputs, because the blocks do not form a chain, every pass runs from the start.
    """

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        self.model, self.batches = model, batches
        self.finished: list[nn.Module] = []
        self.kept: list[Any] = [None] * len(batches)
        self.blocks: dict[str, nn.Module] = {}
        known = blocks_of(model)
        ran: list[str] = []
        with ExitStack() as stack:
            for name, block in known.items():
                hook = block.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
                stack.callback(hook.remove)
            self.run(0)
        if len(set(ran)) == len(ran):  # in the order in which they run, and each once
            self.blocks = {name: known[name] for name in ran}

    def run(self, i: int) -> None:
        """One pass over batch ``i``, until a hook throws ``_Done``."""
        before = [(block, vars(block).get("forward")) for block in self.finished]
        try:
            for block in self.finished:
                block.forward = lambda *_, **__: _copy(self.kept[i])
            self.model(dict(self.batches[i]))
        except _Done:
            pass
        finally:
            for block, forward in before:
                vars(block).pop("forward", None)
                if forward is not None:  # for example a hook of accelerate
                    block.forward = forward

    def advance(self, layer: str) -> None:
        """Finish the blocks before the block with ``layer``."""
        names = list(self.blocks)
        here = next((i for i, n in enumerate(names) if layer.startswith(f"{n}.")), 0)
        if here <= len(self.finished):
            return
        blocks = list(self.blocks.values())
        outputs = [self._output(i, blocks[here - 1]) for i in range(len(self.batches))]
        expected = self._output(0, blocks[here])
        self.finished, self.kept = blocks[:here], outputs
        if not _equal(self._output(0, blocks[here]), expected):
            self.blocks, self.finished = {}, []

    def calls(self, i: int, group: Group) -> list[Call]:
        """The runs of a group of layers in one pass over batch ``i``."""
        found: list[Call] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(Call(_input_of(args, kwargs)))

        def leave(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            found[-1].outputs[name] = output
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
            first = self.model.get_submodule(group.names[0])
            stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for name in group.names:
                hook = self.model.get_submodule(name).register_forward_hook(partial(leave, name))
                stack.callback(hook.remove)
            if group.added:
                stack.enter_context(additions)
            self.run(i)
        return found

    def _output(self, i: int, block: nn.Module) -> Any:
        found: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(_copy(output))
            raise _Done

        with ExitStack() as stack:
            stack.callback(block.register_forward_hook(keep).remove)
            self.run(i)
        return found[0]


class _Done(Exception):
    """Thrown by a hook when a pass has gone far enough."""


class _Additions(TorchDispatchMode):
    """Calls ``seen(tensor, other)`` when ``other`` is added to a watched tensor, such as a residual stream to
    a layer's output.
    """

    def __init__(self, seen: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.seen = seen
        self.watched: dict[int, Tensor] = {}  # by address; kept alive: no other tensor gets the address

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


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _copy(output: Any) -> Any:
    """Copies of tensors, because models may add to them in place."""
    return tree_map_only(Tensor, Tensor.clone, output)


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))
