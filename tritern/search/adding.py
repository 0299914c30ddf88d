"""Texts on their way into a store: numbered, checked, embedded and written, a window at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import TriternError
from ..progress import bar
from .batches import check_texts
from .embed import embed_windows
from .store import Id, Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WINDOW = {"cpu": 4096, "cuda": 32768}
"""Texts embedded and written at a time: the most that a crash loses."""

Write = Callable[[Sequence[Id], Sequence[str], Tensor], None]


def items_of(texts: Iterable[str], ids: Iterable[Any] | None, first: int) -> Iterator[tuple[Any, str]]:
    """Ids and texts; without ids, numbers from ``first``."""
    if isinstance(texts, (str, bytes)):
        raise TriternError("texts must be strings in a list or another iterable; received one string")
    if ids is None:
        yield from zip(itertools.count(first), texts)
        return
    end = object()
    for number, (id, text) in enumerate(itertools.zip_longest(ids, texts, fillvalue=end)):
        if id is end or text is end:
            fewer, more = ("ids", "texts") if id is end else ("texts", "ids")
            raise TriternError(
                f"there must be one id for every text; after {number} {fewer} there are more {more}"
            )
        yield id, text  # pyright: ignore[reportReturnType]


def rest(store: Store, items: Iterator[tuple[Any, str]]) -> Iterator[tuple[Any, str]]:
    """What of a corpus is not in the store, which must hold the beginning of it.

    Raises:
        TriternError: the store holds something else.
    """
    for number, stored in enumerate(store.items()):
        given = next(items, None)
        if given != stored:
            what = (
                "the corpus ends" if given is None else f"the corpus has {given[0]!r}: {str(given[1])[:40]!r}"
            )
            raise TriternError(
                f"{store.folder} holds another corpus: its text number {number} is {stored[0]!r}: "
                f"{stored[1][:40]!r}, where {what}. Build it in a new folder, or open this one and add to it"
            )
    return items


def add(
    store: Store,
    model: SentenceTransformer,
    items: Iterator[tuple[Any, str]],
    write: Write,
    *,
    tokens_per_batch: int | None,
    total: int | None,
    show_progress_bar: bool,
) -> None:
    """Embed texts and hand them to ``write``, in order; a window is written while the next is embedded."""
    under_way: deque[tuple[Sequence[Id], Sequence[str]]] = deque()
    windows = _windows(store, items, WINDOW.get(model.device.type, WINDOW["cuda"]), under_way)
    start = store.rows if total is not None and total >= store.rows else 0
    shown = bar(desc="Embedding", total=total, initial=start, unit=" texts", disable=not show_progress_bar)
    with shown, ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: None)
        for vectors in embed_windows(
            model, windows, task="document", tokens_per_batch=tokens_per_batch, advance=shown.update
        ):
            writing.result()
            writing = writer.submit(_write_first, under_way, write, vectors)
        writing.result()


def _write_first(under_way: deque[tuple[Sequence[Id], Sequence[str]]], write: Write, vectors: Tensor) -> None:
    write(*under_way[0], vectors)
    under_way.popleft()


def add_vectors(store: Store, items: Iterator[tuple[Any, str]], vectors: np.ndarray, write: Write) -> None:
    """Hand texts with vectors made before to ``write``."""
    known = list(items)
    if len(known) != len(vectors):
        raise TriternError(
            f"vectors must be one for each text; received {len(vectors)} for {len(known)} texts"
        )
    for first in range(0, len(known), WINDOW["cpu"]):
        window = known[first : first + WINDOW["cpu"]]
        texts = [text for _, text in window]
        check_texts(texts, first)
        part = vectors[first : first + len(texts)]
        if not np.isfinite(part).all():
            raise TriternError(f"vectors must be finite; some of {first} to {first + len(texts) - 1} are not")
        ids = store.new_ids([id for id, _ in window])
        write(ids, texts, Tensor(np.asarray(part, np.float32)))


def _windows(
    store: Store,
    items: Iterator[tuple[Any, str]],
    size: int,
    under_way: deque[tuple[Sequence[Id], Sequence[str]]],
) -> Iterator[list[str]]:
    first = store.rows
    while window := list(itertools.islice(items, size)):
        texts = [text for _, text in window]
        check_texts(texts, first)
        # looked at before the store: what has left it by then is in the store
        waiting = {id for ids, _ in list(under_way) for id in ids}
        ids = store.new_ids([id for id, _ in window])
        if twice := waiting.intersection(ids):
            raise TriternError(f"ids must be unique; {twice.pop()!r} is there twice")
        under_way.append((ids, texts))
        first += len(texts)
        yield texts
