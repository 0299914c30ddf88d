"""Packed texts through a model on a GPU: a CUDA graph for each size of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import pooling
from .families import Family, hidden_states, positions_of
from .packing import LARGEST, Size, filled, runs
from .tokens import FastTokenizer, Tokens

CHUNK = 4096
"""Texts tokenized at a time. The next run is ready before the GPU has finished the last."""


class Run(NamedTuple):
    """Packed texts: the arrays of ``packing.filled`` in one tensor, and the number of texts."""

    size: Size
    arrays: Tensor
    texts: int


class Graph(NamedTuple):
    """A captured run: the tensor that takes its arrays, and the tensor that then holds its vectors."""

    replay: Callable[[], None]
    arrays: Tensor
    vectors: Tensor


class PackedModel:
    """A sentence-transformers model's runs on packed texts. It lives as long as the model, so it holds no
    reference to it: each call gets the model.

    Args:
        model: the model with its present modules.
        family: of the transformer.
        capture: makes the graph of a run; None: every run launches its kernels one by one.

    Attributes:
        places: addresses of the model's tensors; graphs read from these.
    """

    def __init__(self, model: Any, family: Family, capture: Callable[..., Graph] | None) -> None:
        self.family, self.capture, self.places = family, capture, state_of(model).places
        self.positions = positions_of(_transformer(model))
        self.graphs: dict[Size, Graph | None] = {}
        self.lock = threading.Lock()
        self.over: Any = None

    def packed(self, tokens: Tokens, most: int = LARGEST) -> Iterator[tuple[slice, Run]]:
        """Runs of at most ``most`` tokens each, in the order of the texts, each with a slice of the texts."""
        ends = np.concatenate(([0], np.cumsum(tokens.lengths)))
        for part in runs(tokens.lengths, most):
            ids = tokens.ids[ends[part.start] : ends[part.stop]]
            lengths = tokens.lengths[part]
            size = Size.holding(len(ids), len(lengths))
            arrays = torch.empty(size.length, dtype=torch.int32, pin_memory=self.capture is not None)
            filled(Tokens(ids, lengths), size, self.positions, arrays.numpy())
            yield part, Run(size, arrays, len(lengths))

    def __call__(self, model: Any, run: Run) -> Tensor:
        """Vectors [texts, width] of a run, on the model's device, in the model's dtype."""
        device = model.device
        with self.lock, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            graph = self._graph(model, run)
            if graph is None:
                found = self._vectors(model, run.arrays.to(device, non_blocking=True), run.size)
                return found[: run.texts]
            current = torch.cuda.current_stream(device)
            if self.over is not None:
                current.wait_event(self.over)  # the last run may be on another thread's stream
            graph.arrays.copy_(run.arrays, non_blocking=True)
            graph.replay()
            found = graph.vectors[: run.texts].clone()
            self.over = current.record_event()
            return found

    def warm(self, model: Any, size: Size) -> None:
        """Compile the kernels of a run of this size and capture its graph."""
        arrays = torch.empty(size.length, dtype=torch.int32)
        tokens = Tokens(np.zeros(size.tokens, np.int32), np.full(size.texts, size.tokens // size.texts))
        filled(tokens, size, self.positions, arrays.numpy())
        self(model, Run(size, arrays, size.texts))

    def _graph(self, model: Any, run: Run) -> Graph | None:
        size = run.size
        if self.capture is None or size.tokens > LARGEST:
            return None
        if size not in self.graphs:
            arrays = run.arrays.to(model.device)
            graph = self.capture(lambda: self._vectors(model, arrays, size), arrays)
            if (places := state_of(model).places) != self.places:  # a first run may merge layers' tensors
                self.places = places
                self.graphs.clear()
            self.graphs[size] = graph
        return self.graphs[size]

    def _vectors(self, model: Any, arrays: Tensor, size: Size) -> Tensor:
        ids, positions, starts, tiles = (arrays[part] for part in size.places())
        hidden = hidden_states(_transformer(model), self.family, ids, positions, tiles.view(-1, 3))
        return pooling.vectors(modules_of(model)[1:], hidden, starts)


class CudaGraphs:
    """Captures runs. Graphs share their memory, because a model's runs never overlap."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, run: Callable[[], Tensor], arrays: Tensor) -> Graph:
        """The graph of a run that reads ``arrays``.

        The run first goes twice on a stream of its own, to compile kernels and merge products.
        """
        device, current = arrays.device, torch.cuda.current_stream(arrays.device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        stream.synchronize()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # capture only this thread: others read and tokenize meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            vectors = run()
        current.wait_stream(stream)
        return Graph(graph.replay, arrays, vectors)


def modules_of(model: Any) -> list[Any]:
    """A sentence-transformers model's modules, in their order."""
    return list(model._modules.values())


def _transformer(model: Any) -> Any:
    return modules_of(model)[0].auto_model


class State(NamedTuple):
    """The present state of a model.

    Attributes:
        places: its modules and the addresses of their tensors; a captured graph depends on these.
        kinds: the modules' classes.
        hooked: a module has hooks; a graph would not run them.
        training: some module is in training mode.
    """

    places: tuple[int, ...]
    kinds: frozenset[type]
    hooked: bool
    training: bool


def state_of(model: nn.Module) -> State:
    """The state of a model. It takes about a microsecond per module, since every call looks it up."""
    places: list[int] = []
    kinds: set[type] = set()
    hooked, training, modules = False, False, [model]
    while modules:
        module = modules.pop()
        own = vars(module)
        places.append(id(own))
        kinds.add(type(module))
        training |= own["training"]
        for tensors in (own["_parameters"], own["_buffers"]):
            places += [t.data_ptr() for t in tensors.values() if t is not None]
        if own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own:
            hooked = hooked or _watched(module)
        modules += [m for m in own["_modules"].values() if m is not None]
    return State(tuple(places), frozenset(kinds), hooked, training)


def _watched(module: nn.Module) -> bool:
    """Whether a module has foreign hooks or a replaced forward.

    transformers' hooks that collect outputs on request do not count. accelerate replaces forward in training
    and later puts the class's own back; that one does not count either.
    """
    hooks = module._forward_hooks.values()
    known = all(getattr(h, "__module__", "").startswith("transformers.utils.output_capturing") for h in hooks)
    forward = vars(module).get("forward", type(module).forward)
    own = getattr(forward, "__func__", forward) is type(module).forward
    return bool(module._forward_pre_hooks) or not known or not own


class Packed:
    """Texts of one call as runs, and their vectors.

    Args:
        packed: the model's runs.
        model: the model.
        tokenizer: its Rust part.
        prompt: put before every text.
        tokens: most in a run.
    """

    workers = 1

    def __init__(
        self, packed: PackedModel, model: Any, tokenizer: FastTokenizer, prompt: str, tokens: int | None
    ) -> None:
        self.runs, self.model, self.tokenizer, self.prompt = packed, model, tokenizer, prompt
        self.tokens = LARGEST if tokens is None else tokens

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[Tensor, Run]]:
        """Numbers of texts, and their run."""
        for first in range(0, len(texts), CHUNK):
            chunk = [self.prompt + text for text in texts[first : first + CHUNK]]
            for part, run in self.runs.packed(self.tokenizer(chunk), self.tokens):
                yield torch.arange(first + part.start, first + part.stop), run

    def vectors(self, batch: Run) -> Tensor:
        """[texts, width]."""
        return self.runs(self.model, batch)
