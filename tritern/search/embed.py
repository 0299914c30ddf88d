"""Vectors of many texts: tokenized on one thread while others run the model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import TriternError
from ..inputs import check_texts, many, true_or_false
from ..pretrained import model_of
from ..progress import bar
from .batches import Batching, Task, batches, batching, checked, vectors_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

INLINE = 64
"""Up to so many texts are embedded on the calling thread: starting threads takes longer than a query."""


def embed(
    model: SentenceTransformer | str | Path,
    texts: Iterable[str],
    *,
    task: Task | None = None,
    tokens_per_batch: int | None = None,
    show_progress_bar: bool = False,
) -> Tensor:
    """Vectors of texts, as ``model.encode`` gives them, in less time.

    Args:
        model: any sentence-transformer for text; or the name or folder of one, which is loaded anew in every
            call.
        texts: strings, none of them empty, in a list or another iterable; or one string.
        task: "query" or "document" for the prompts of ``encode_query`` and ``encode_document``.
        tokens_per_batch: default 1,024 on a CPU and 16,384 on a GPU.
        show_progress_bar: for more than 64 texts.

    Returns:
        [len(texts), width], float32, on the model's device; of length 1 if the model compares by cosine.

    Raises:
        TriternError: a text is no string, empty or not encodable; a vector is not finite; an argument is of
            another type, or there is no such model.
    """
    show_progress_bar = true_or_false(show_progress_bar, "show_progress_bar")
    texts = [texts] if isinstance(texts, str) else list(many(texts, "texts"))
    check_texts(texts)
    model = model_of(model, "model").eval()
    plan = batching(model.device, task, tokens_per_batch)
    if not texts:
        width = model.get_embedding_dimension() or 0
        return torch.empty(0, width, dtype=torch.float32, device=model.device)
    if len(texts) <= INLINE:
        return checked(_inline(model, texts, task, plan), texts)
    with bar(desc="Embedding", total=len(texts), unit=" texts", disable=not show_progress_bar) as shown:
        windows = embed_windows(
            model, [texts], task=task, tokens_per_batch=tokens_per_batch, advance=shown.update
        )
        return next(windows)


def embed_windows(
    model: SentenceTransformer,
    windows: Iterable[Sequence[str]],
    *,
    task: Task | None = None,
    tokens_per_batch: int | None = None,
    advance: Callable[[int], object] = lambda texts: None,
) -> Iterator[Tensor]:
    """The vectors [len(window), width] of each window in turn; the next ones are under way meanwhile.

    Args:
        windows: lists of non-empty strings, taken on another thread. If it raises, the vectors of what came
            before are still given.
        advance: called with the number of texts done.
        model, task, tokens_per_batch: as in ``embed``.
    """
    pipeline = _Pipeline(model.eval(), windows, task, batching(model.device, task, tokens_per_batch))
    try:
        yield from pipeline.run(advance)
    finally:
        pipeline.stop()


_setting_up = threading.Lock()
"""Held while the number of torch's threads is another: what one thread sets, later ones start with."""


class _Stopped(Exception):
    """The reader of the pipeline is gone."""


class _Pipeline:
    """A thread tokenizes, some run the model, the caller's puts vectors in their places."""

    def __init__(
        self, model: Any, windows: Iterable[Sequence[str]], task: Task | None, plan: Batching
    ) -> None:
        self.model, self.windows, self.task, self.plan = model, windows, task, plan
        self.tokenized: queue.Queue[Any] = queue.Queue(2 * plan.workers)
        self.results: queue.Queue[Any] = queue.Queue(64)
        self.stopping = threading.Event()
        self.torch_threads = 1
        self.set_up = threading.Barrier(plan.workers + 1)
        jobs = [self._tokenize, *[self._forward] * plan.workers]
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
        texts: dict[int, Sequence[str]] = {}
        places: dict[int, Tensor] = {}
        missing: dict[int, int] = {}
        ended, given, failure = 0, 0, None
        while ended < self.plan.workers:
            match self.results.get():
                case BaseException() as error:
                    raise error
                case ("failure", failure):
                    pass
                case ("window", number, window):
                    texts[number], missing[number] = window, len(window)
                case (number, rows, vectors):
                    if number not in places:
                        places[number] = vectors.new_empty(missing[number], vectors.shape[1])
                    _put_in_place(places[number], rows, vectors)
                    missing[number] -= len(rows)
                    advance(len(rows))
                    while missing.get(given) == 0:
                        del missing[given]
                        yield checked(places.pop(given), texts.pop(given))
                        given += 1
                case None:
                    ended += 1
        if failure is not None:
            raise failure

    def stop(self) -> None:
        self.stopping.set()
        self.set_up.abort()  # those that wait where another could not be started
        for thread in self.threads:
            if thread.ident is not None:  # the first may wait for texts; with the next it ends
                thread.join(timeout=1 if thread is self.threads[0] else None)

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except (_Stopped, threading.BrokenBarrierError):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the vectors are waited for
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
                self._put(self.results, ("window", number, window))
                for rows, features in batches(self.model, window, self.task, self.plan):
                    self._put(self.tokenized, (number, rows, features))
        except Exception as error:
            if isinstance(error, _Stopped):
                raise
            self._put(self.results, ("failure", error))
        for _ in range(self.plan.workers):
            self._put(self.tokenized, None)

    def _forward(self) -> None:
        torch.get_num_threads()  # which torch sets for a thread when it is first asked
        torch.set_num_threads(max(1, self.torch_threads // self.plan.workers))
        self.set_up.wait()
        while not self.stopping.is_set():
            try:
                item = self.tokenized.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is None:
                return self._put(self.results, None)
            number, rows, features = item
            self._put(self.results, (number, rows, vectors_of(self.model, features, self.task)))


def _inline(model: Any, texts: Sequence[str], task: Task | None, plan: Batching) -> Tensor:
    places: Tensor | None = None
    for rows, features in batches(model, texts, task, plan):
        vectors = vectors_of(model, features, task)
        if places is None:
            places = vectors.new_empty(len(texts), vectors.shape[1])
        _put_in_place(places, rows, vectors)
    assert places is not None
    return places


def _put_in_place(places: Tensor, rows: Tensor, vectors: Tensor) -> None:
    if places.device.type == "cpu":  # by numpy: torch's threads would wait for cores that the model is on
        places.numpy()[rows.numpy()] = vectors.numpy()
    else:
        places[rows.to(places.device, non_blocking=True)] = vectors
