"""Vectors of many texts: one thread tokenizes while others run the model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import TriternError
from ..inputs import many

INLINE = 64
"""Up to this many texts are embedded on the calling thread. Starting threads takes longer than a query."""


class Way(Protocol):
    """How texts become vectors; ``workers`` threads may run the model at once."""

    model: Any
    workers: int

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[Tensor, Any]]:
        """Numbers of texts, and their batch for ``vectors``."""
        ...

    def vectors(self, batch: Any) -> Tensor:
        """[texts, width], in the order of the numbers."""
        ...


Finish = Callable[[Tensor], Tensor]
"""A function of a batch of vectors, run on their device."""


def embed_windows(
    way: Way,
    windows: Iterable[Sequence[str]],
    finish: Finish,
    *,
    to_cpu: bool = False,
    advance: Callable[[int], object] = lambda texts: None,
) -> Iterator[Tensor]:
    """The vectors [len(window), width] of each window in turn. The next windows are computed meanwhile.

    Args:
        way: how texts become vectors.
        windows: lists of strings, none empty, read on another thread. If reading raises, the vectors of the
            earlier windows still come.
        finish: called on each batch of vectors.
        to_cpu: copy them to the CPU while the next are computed.
        advance: called with the number of texts done.
    """
    pipeline = _Pipeline(way, windows, finish, to_cpu)
    try:
        yield from pipeline.run(advance)
    finally:
        pipeline.stop()


def embed_here(way: Way, texts: Sequence[str], finish: Finish, *, to_cpu: bool = False) -> Tensor:
    """The vectors of at least one text, on the calling thread."""
    places: Tensor | None = None
    for rows, batch in way.batches(texts):
        with torch.inference_mode():
            found = finish(way.vectors(batch))
            found = found.cpu() if to_cpu else found
        if places is None:  # not an inference tensor
            places = torch.empty(len(texts), found.shape[1], dtype=found.dtype, device=found.device)
        _put_in_place(places, rows, found)
    assert places is not None
    return places


class _Done(NamedTuple):
    """Vectors, perhaps still being copied to the CPU."""

    vectors: Tensor
    arrived: torch.cuda.Event | None = None

    def tensor(self) -> Tensor:
        """The vectors, after waiting for the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.vectors


class _ToCpu:
    """Copies vectors to pinned memory on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def __call__(self, vectors: Tensor) -> _Done:
        self.stream.wait_stream(torch.cuda.current_stream(vectors.device))
        there = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        with torch.cuda.stream(self.stream):
            there.copy_(vectors, non_blocking=True)
            vectors.record_stream(self.stream)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Done(there, arrived)


_setting_up = threading.Lock()
"""Held while torch's number of threads is changed: threads that start meanwhile inherit the number."""


class _Stopped(Exception):
    """The reader of the pipeline is gone."""


class _Pipeline:
    """One thread tokenizes, some run the model, the caller's puts the vectors in their places."""

    def __init__(self, way: Way, windows: Iterable[Sequence[str]], finish: Finish, to_cpu: bool) -> None:
        self.way, self.windows, self.finish = way, windows, finish
        device = way.model.device
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.current_stream(device) if on_gpu else None  # the caller's
        self.to_cpu = _ToCpu(device) if on_gpu and to_cpu else _Done
        self.tokenized: queue.Queue[Any] = queue.Queue(2 * way.workers + 2)
        self.results: queue.Queue[Any] = queue.Queue(64)
        self.stopping = threading.Event()
        self.torch_threads = 1
        self.set_up = threading.Barrier(way.workers + 1)
        jobs = [self._tokenize, *[self._forward] * way.workers]
        self.threads = [threading.Thread(target=self._guarded, args=(job,), daemon=True) for job in jobs]

    def run(self, advance: Callable[[int], object]) -> Iterator[Tensor]:
        with _setting_up:
            self.torch_threads = torch.get_num_threads()
            try:
                for thread in self.threads:
                    thread.start()
                self.set_up.wait()
            except BaseException:
                self.stop()
                raise
            finally:
                torch.set_num_threads(self.torch_threads)
        places: dict[int, Tensor] = {}
        missing: dict[int, int] = {}
        ended, given, failure = 0, 0, None
        while ended < self.way.workers:
            match self.results.get():
                case BaseException() as error:
                    raise error
                case ("failure", failure):
                    pass
                case ("window", number, texts):
                    missing[number] = texts
                case (number, rows, done):
                    vectors = done.tensor()
                    if number not in places:
                        shape = missing[number], vectors.shape[1]
                        places[number] = torch.empty(shape, dtype=vectors.dtype, device=vectors.device)
                    _put_in_place(places[number], rows, vectors)
                    missing[number] -= len(rows)
                    advance(len(rows))
                    while missing.get(given) == 0:
                        del missing[given]
                        yield places.pop(given)
                        given += 1
                case None:
                    ended += 1
        if failure is not None:
            raise failure

    def stop(self) -> None:
        self.stopping.set()
        self.set_up.abort()  # frees threads that wait for one that could not start
        for thread in self.threads:
            if thread.ident is not None:  # the reader may wait for texts; it ends when the next come
                thread.join(timeout=1 if thread is self.threads[0] else None)

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except (_Stopped, threading.BrokenBarrierError):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            try:
                self._put(self.results, error)
            except _Stopped:
                pass

    def _put(self, where: queue.Queue[Any], item: Any) -> None:
        while not self.stopping.is_set():
            try:
                return where.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise _Stopped

    def _tokenize(self) -> None:
        try:
            for number, window in enumerate(many(self.windows, "windows")):
                if not many(window, f"windows: number {number}"):
                    raise TriternError(f"windows must hold texts; number {number} is empty")
                self._put(self.results, ("window", number, len(window)))
                for rows, batch in self.way.batches(window):
                    self._put(self.tokenized, (number, rows, batch))
        except Exception as error:
            if isinstance(error, _Stopped):
                raise
            self._put(self.results, ("failure", error))
        for _ in range(self.way.workers):
            self._put(self.tokenized, None)

    @torch.inference_mode()
    def _forward(self) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            self._forward_there()

    def _forward_there(self) -> None:
        torch.get_num_threads()  # torch sets a thread's number when first asked
        torch.set_num_threads(max(1, self.torch_threads // self.way.workers))
        self.set_up.wait()
        while not self.stopping.is_set():
            try:
                item = self.tokenized.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is None:
                return self._put(self.results, None)
            number, rows, batch = item
            self._put(self.results, (number, rows, self.to_cpu(self.finish(self.way.vectors(batch)))))


def _put_in_place(places: Tensor, rows: Tensor, vectors: Tensor) -> None:
    if places.device.type == "cpu" and places.dtype != torch.bfloat16:
        # by numpy: torch's threads would wait for cores that run the model
        places.numpy()[rows.numpy()] = vectors.numpy()
    else:
        places[rows.to(places.device, non_blocking=True)] = vectors
