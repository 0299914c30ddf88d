"""Vectors of many texts: batches of one length, tokenized while earlier ones run through the model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import TriternError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Task = Literal["query", "document"]
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names that the prompt of a task may have, as in sentence-transformers' encode_query, encode_document."""

INLINE = 64
"""Up to so many texts are embedded on the calling thread: starting threads takes longer than a query."""


@dataclass(frozen=True)
class Batching:
    """How texts become batches on a kind of device.

    Attributes:
        tokens: most tokens in a batch, unless one text has more.
        round_to: texts share a batch if their numbers of tokens are equal once rounded up to a multiple.
            With 1 nothing is padded, and a text has the same vector whatever it is embedded with.
        chunk: texts tokenized at a time, similar in length.
        workers: threads that run the model.
    """

    tokens: int
    round_to: int
    chunk: int
    workers: int


def batching(device: torch.device, tokens: int | None = None) -> Batching:
    """On a CPU a thread per core, up to 8, with a batch each: small models gain nothing from several cores
    in one layer. On a GPU large batches and one thread, for the GPU takes them one after the other.
    """
    if tokens is not None and tokens < 1:
        raise TriternError(f"tokens_per_batch must be at least 1; received {tokens}")
    if device.type == "cpu":
        return Batching(tokens or 1024, round_to=1, chunk=1024, workers=min(8, torch.get_num_threads()))
    return Batching(tokens or 16384, round_to=8, chunk=8192, workers=1)


def embed(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    task: Task | None = None,
    tokens_per_batch: int | None = None,
    show_progress_bar: bool = False,
) -> Tensor:
    """Vectors of texts, as ``model.encode`` gives them, in less time.

    Args:
        model: any sentence-transformer for text.
        texts: strings; none may be empty.
        task: "query" or "document" for the prompts of ``encode_query`` and ``encode_document``.
        tokens_per_batch: default 1,024 on a CPU and 16,384 on a GPU.

    Returns:
        [len(texts), width], float32, on the model's device; of length 1 if the model compares by cosine.

    Raises:
        TriternError: a text is no string, empty or not encodable; a vector is not finite.
    """
    from tqdm import tqdm

    texts = [texts] if isinstance(texts, str) else list(texts)
    check_texts(texts)
    model.eval()
    if not texts:
        return torch.empty(0, model.get_embedding_dimension() or 0, device=model.device)
    if len(texts) <= INLINE:
        return _checked(_inline(model, texts, task, batching(model.device, tokens_per_batch)), texts)
    with tqdm(total=len(texts), unit=" texts", disable=not show_progress_bar) as bar:
        windows = embed_windows(
            model, [texts], task=task, tokens_per_batch=tokens_per_batch, advance=bar.update
        )
        return next(windows)


def check_texts(texts: Sequence[Any], first: int = 0) -> None:
    """Refuse what has no meaningful vector.

    Raises:
        TriternError: names the number of the text, counted from ``first``.
    """
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            hint = " (decode it, such as with text.decode('utf-8'))" if isinstance(text, bytes) else ""
            raise TriternError(f"texts must be strings; number {number} is {type(text).__name__}{hint}")
        if not text.strip():
            raise TriternError(f"text number {number} is empty: it has no meaningful vector; leave it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TriternError(
                f"text number {number} holds what is no character ({text[:40]!a}): read the file as UTF-8, "
                "with errors='replace' if it must be"
            ) from None


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
    pipeline = _Pipeline(model.eval(), windows, task, batching(model.device, tokens_per_batch))
    try:
        yield from pipeline.run(advance)
    finally:
        pipeline.stop()


class _Stopped(Exception):
    """The reader of the pipeline is gone."""


class _Pipeline:
    """A thread tokenizes, some run the model, the caller's puts vectors in their places."""

    def __init__(
        self, model: Any, windows: Iterable[Sequence[str]], task: Task | None, plan: Batching
    ) -> None:
        self.model, self.windows, self.task, self.plan = model, windows, task, plan
        self.batches: queue.Queue[Any] = queue.Queue(2 * plan.workers)
        self.results: queue.Queue[Any] = queue.Queue(64)
        self.stopping = threading.Event()
        self.threads_before = torch.get_num_threads()
        jobs = [self._tokenize, *[self._forward] * plan.workers]
        self.threads = [threading.Thread(target=self._guarded, args=(job,), daemon=True) for job in jobs]

    def run(self, advance: Callable[[int], object]) -> Iterator[Tensor]:
        for thread in self.threads:
            thread.start()
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
                    places[number][rows.to(vectors.device, non_blocking=True)] = vectors
                    missing[number] -= len(rows)
                    advance(len(rows))
                    while missing.get(given) == 0:
                        del missing[given]
                        yield _checked(places.pop(given), texts.pop(given))
                        given += 1
                case None:
                    ended += 1
        if failure is not None:
            raise failure

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads[1:]:
            thread.join()
        self.threads[0].join(timeout=1)  # it may wait for texts; with the next it ends

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except _Stopped:
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
            for number, window in enumerate(self.windows):
                if not window:
                    raise TriternError(f"windows must hold texts; number {number} is empty")
                self._put(self.results, ("window", number, window))
                for rows, features in _batches(self.model, window, self.task, self.plan):
                    self._put(self.batches, (number, rows, features))
        except Exception as error:
            if isinstance(error, _Stopped):
                raise
            self._put(self.results, ("failure", error))
        for _ in range(self.plan.workers):
            self._put(self.batches, None)

    def _forward(self) -> None:
        if self.plan.workers > 1:  # of this thread only; torch takes it as the default of later threads too
            torch.set_num_threads(max(1, self.threads_before // self.plan.workers))
        try:
            while not self.stopping.is_set():
                try:
                    item = self.batches.get(timeout=0.1)
                except queue.Empty:
                    continue
                if item is None:
                    return self._put(self.results, None)
                number, rows, features = item
                self._put(self.results, (number, rows, _vectors(self.model, features, self.task)))
        finally:
            if self.plan.workers > 1:
                torch.set_num_threads(self.threads_before)


_tokenizers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""A lock for each model: Rust tokenizers used by two threads raise "Already borrowed"."""


def _inline(model: Any, texts: Sequence[str], task: Task | None, plan: Batching) -> Tensor:
    places: Tensor | None = None
    for rows, features in _batches(model, texts, task, plan):
        vectors = _vectors(model, features, task)
        if places is None:
            places = vectors.new_empty(len(texts), vectors.shape[1])
        places[rows.to(vectors.device)] = vectors
    assert places is not None
    return places


def _batches(
    model: Any, texts: Sequence[str], task: str | None, plan: Batching
) -> Iterator[tuple[Tensor, Any]]:
    """Numbers of texts and their features, longest texts first: a lack of memory shows at once."""
    names = [name for name in PROMPTS.get(task or "", ()) if name in model.prompts]
    prompt = model.prompts.get(names[0] if names else model.default_prompt_name)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), plan.chunk):
        numbers = torch.tensor(order[start : start + plan.chunk])
        chunk = [texts[i] for i in numbers.tolist()]
        with _tokenizers.setdefault(model, threading.Lock()):
            features = model.preprocess(chunk, prompt=prompt, **_task(task))
        mask = features.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(chunk):
            for part in torch.arange(len(chunk)).split(32):  # of a kind that cannot be cut: as encode does it
                with _tokenizers[model]:
                    some = model.preprocess([chunk[i] for i in part.tolist()], prompt=prompt, **_task(task))
                yield numbers[part], some
            continue
        lengths = mask.sum(1)
        rounded = (lengths + plan.round_to - 1) // plan.round_to
        for length in rounded.unique().flip(0):
            same = (rounded == length).nonzero()[:, 0]
            for part in same.split(max(1, plan.tokens // int(length * plan.round_to))):
                cut = _cut(features, part, int(lengths[part].max()))
                yield numbers[part], cut if model.device.type == "cpu" else _pinned(cut)


def _cut(features: dict[str, Any], rows: Tensor, length: int) -> dict[str, Any]:
    """The features of some texts without the padding that they share."""
    mask = features["attention_mask"]
    on_the_left = bool((mask[:, 0] == 0).any())
    columns = slice(mask.shape[1] - length, None) if on_the_left else slice(length)

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(mask):
            return value
        return value[rows][:, columns] if value.shape[1:2] == mask.shape[1:] else value[rows]

    return {name: part(value) for name, value in features.items()}


def _pinned(features: dict[str, Any]) -> dict[str, Any]:
    return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in features.items()}


def _task(task: str | None) -> dict[str, str]:
    return {} if task is None else {"task": task}


@torch.inference_mode()
def _vectors(model: Any, features: dict[str, Any], task: str | None) -> Tensor:
    device = model.device
    features = {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in features.items()
    }
    vectors = model(features, **_task(task))["sentence_embedding"][:, : model.truncate_dim].float()
    if model.similarity_fn_name != "cosine":
        return vectors
    of_length_1 = type(model[-1]).__name__ == "Normalize" and model.truncate_dim is None
    return vectors if of_length_1 else torch.nn.functional.normalize(vectors)


def _checked(vectors: Tensor, texts: Sequence[str]) -> Tensor:
    finite = vectors.isfinite().all(1)
    if not finite.all():
        number = int((~finite).nonzero()[0])
        raise TriternError(
            f"the vector of {texts[number][:60]!r} is not finite: the model overflows in its dtype, or its "
            "weights are damaged; load it in float32 or bfloat16"
        )
    return vectors
