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
"""Texts tokenized at a time: what a GPU does next is ready before it has done the last."""


class Run(NamedTuple):
    """Packed texts: the arrays of ``packing.filled`` in one tensor, and how many texts there are."""

    size: Size
    arrays: Tensor
    texts: int


class Graph(NamedTuple):
    """A captured run: where its arrays are copied to, and where its vectors are then."""

    replay: Callable[[], None]
    arrays: Tensor
    vectors: Tensor


class PackedModel:
    """A sentence-transformers model's runs on packed texts. The model itself comes with each call: what is
    kept here lives as long as the model.

    Args:
        model: its modules as they are now.
        family: of the transformer.
        capture: makes the graph of a run; None: every run is launched kernel by kernel.

    Attributes:
        places: of the model's tensors, as graphs read them.
    """

    def __init__(self, model: Any, family: Family, capture: Callable[..., Graph] | None) -> None:
        self.family, self.capture, self.places = family, capture, state_of(model).places
        self.positions = positions_of(_transformer(model))
        self.graphs: dict[Size, Graph | None] = {}
        self.lock = threading.Lock()
        self.over: Any = None

    def packed(self, tokens: Tokens, most: int = LARGEST) -> Iterator[tuple[slice, Run]]:
        """Runs of at most ``most`` tokens each, in the order of the texts, and which texts each has."""
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
                current.wait_event(self.over)  # the run before may be on another thread's stream
            graph.arrays.copy_(run.arrays, non_blocking=True)
            graph.replay()
            found = graph.vectors[: run.texts].clone()
            self.over = current.record_event()
            return found

    def warm(self, model: Any, size: Size) -> None:
        """Compile and capture what a run of this size needs."""
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
    """Captures runs. Graphs share their memory: one of a model's runs is over before the next begins."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, run: Callable[[], Tensor], arrays: Tensor) -> Graph:
        """The graph of a run that reads ``arrays``.

        The run goes twice beforehand, on a stream of its own: kernels are compiled and products merged then.
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
        # of other threads, which read and tokenize meanwhile, nothing is captured or forbidden
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
    """What a model is now.

    Attributes:
        places: which modules there are and where their tensors are: a captured graph depends on these.
        kinds: the modules' classes.
        hooked: somebody hooks into a module, which a graph would not run.
        training: some module is in training mode.
    """

    places: tuple[int, ...]
    kinds: frozenset[type]
    hooked: bool
    training: bool


def state_of(model: nn.Module) -> State:
    """The state of a model, in about a microsecond a module: it is looked up in every call."""
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
    """Whether anybody hooks in, but transformers, which collects outputs on request; or has put another
    forward in the place of the class's, as accelerate does in training, which later puts the class's there.
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
        """Numbers of texts, and the run that holds them."""
        for first in range(0, len(texts), CHUNK):
            chunk = [self.prompt + text for text in texts[first : first + CHUNK]]
            for part, run in self.runs.packed(self.tokenizer(chunk), self.tokens):
                yield torch.arange(first + part.start, first + part.stop), run

    def vectors(self, batch: Run) -> Tensor:
        """[texts, width]."""
        return self.runs(self.model, batch)
