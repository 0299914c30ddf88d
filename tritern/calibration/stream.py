"""Passes of texts through a model up to one group of layers, to record its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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

    def run(self, i: int) -> Any:
        """One pass over batch ``i`` and the model's output; None if a hook throws ``_Done`` before."""
        with ExitStack() as stack:
            for block in self.finished:
                stack.enter_context(_own_forward(block, lambda *_, **__: _copy(self.kept[i])))
            with suppress(_Done):
                return self.model(dict(self.batches[i]))
        return None

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

    def by_block(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups, those of one block together; each alone where blocks do not form a chain."""
        found: list[list[Group]] = []
        last = ""
        for group in groups:
            block = next((n for n in self.blocks if group.names[0].startswith(f"{n}.")), "")
            if block and block == last:
                found[-1].append(group)
            else:
                found.append([group])
            last = block
        return found

    def inputs(self, group: Group) -> Iterator[list[Call]]:
        """The runs of a group for each batch, without outputs."""
        return (self.calls(i, [group], inputs_alone=True)[0] for i in range(len(self.batches)))

    def calls(self, i: int, groups: Sequence[Group], inputs_alone: bool = False) -> list[list[Call]]:
        """The runs of each of these groups of layers in one pass over batch ``i``, which ends with the last.

        With ``inputs_alone`` no layer's output is kept, and layers that a residual stream is added to are not
        computed: they give zeros.
        """
        found: list[list[Call]] = [[] for _ in groups]
        open_groups = set(range(len(groups)))

        def ended(number: int) -> None:
            open_groups.discard(number)
            if not open_groups:
                raise _Done

        def enter(number: int, module: nn.Module, args: Any, kwargs: Any) -> None:
            group, calls = groups[number], found[number]
            calls.append(Call(_input_of(args, kwargs)))
            if inputs_alone and not group.added and len(calls) == group.times:
                ended(number)

        def leave(number: int, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            group, calls = groups[number], found[number]
            if not inputs_alone:
                calls[-1].outputs[name] = output
            if group.added:
                additions.watch(output)
                watched[output.data_ptr()] = number
            elif len(calls) == group.times and len(calls[-1].outputs) == len(group.names):
                ended(number)

        def seen(output: Tensor, other: Tensor) -> None:
            number = watched[output.data_ptr()]
            found[number][-1].added = other
            if len(found[number]) == groups[number].times:
                ended(number)

        additions, watched = _Additions(seen), {}
        with ExitStack() as stack:
            for number, group in enumerate(groups):
                first = self.model.get_submodule(group.names[0])
                hook = first.register_forward_pre_hook(partial(enter, number), with_kwargs=True)
                stack.callback(hook.remove)
                for name in group.names:
                    layer: Any = self.model.get_submodule(name)
                    if inputs_alone and group.added:
                        stack.enter_context(_own_forward(layer, partial(_zeros, layer)))
                    stack.callback(layer.register_forward_hook(partial(leave, number, name)).remove)
            if any(group.added for group in groups):
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


@contextmanager
def _own_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another ``forward`` for one module while the context lasts."""
    before = vars(module).get("forward")  # for example a hook of accelerate
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:
            module.forward = before


def _zeros(layer: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002, nn.Linear's name
    return input.new_zeros((*input.shape[:-1], layer.out_features))


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _copy(output: Any) -> Any:
    """Copies of tensors, because models may add to them in place."""
    return tree_map_only(Tensor, Tensor.clone, output)


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))
