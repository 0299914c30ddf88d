"""Add texts to a store: number, check, embed and write them, a window at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TriternError
from ..inputs import check_texts, check_vectors, many
from ..progress import bar
from .embed import embed_each
from .ids import Id, unique
from .store import Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WINDOW = {"cpu": 4096, "cuda": 32768}
"""Texts embedded and written at a time. A crash loses at most these."""

Write = Callable[[Sequence[Id], Sequence[str], Tensor], None]


def items_of(
    texts: Iterable[str], ids: Iterable[Any] | None, numbers: Iterable[int]
) -> Iterator[tuple[Any, str]]:
    """Ids and texts; without ids, numbers from ``numbers``. Lists are checked first.

    Raises:
        TriternError: not iterables of single things; a bad text or id in a list; another number of ids than
            of texts, if both numbers are known.
    """
    texts = many(texts, "texts")
    if isinstance(texts, (list, tuple)):
        check_texts(texts)
    if ids is None:
        return zip(numbers, texts)
    ids = many(ids, "ids")
    for name, values in (("texts", texts), ("ids", ids)):
        if isinstance(values, (set, frozenset)):
            raise TriternError(f"{name} must be in order, to go with the other; received a set: pass a list")
    if isinstance(ids, Sized) and isinstance(texts, Sized) and len(ids) != len(texts):
        raise _unequal(min(len(ids), len(texts)), len(ids) < len(texts))
    if isinstance(ids, (list, tuple)):
        unique(ids)
    return _pairs(texts, ids)


def _pairs(texts: Iterable[str], ids: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    end = object()
    for number, (id, text) in enumerate(itertools.zip_longest(ids, texts, fillvalue=end)):
        if id is end or text is end:
            raise _unequal(number, id is end)
        yield id, text  # pyright: ignore[reportReturnType]


def _unequal(number: int, more_texts: bool) -> TriternError:
    fewer, more = ("ids", "texts") if more_texts else ("texts", "ids")
    return TriternError(f"there must be one id for every text; after {number} {fewer} there are more {more}")


def rest(store: Store, items: Iterator[tuple[Any, str]]) -> Iterator[tuple[Any, str]]:
    """The part of a corpus that is not in the store yet. The store must hold the start of the corpus.

    Raises:
        TriternError: the store holds another corpus.
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
    first: int,
    tokens_per_batch: int | None,
    total: int | None,
    show_progress_bar: bool,
) -> None:
    """Embed texts and pass them to ``write``, in order. A window is written while the next is embedded.

    Args:
        store, model, tokens_per_batch, show_progress_bar: as in ``SearchIndex``.
        items: ids and texts.
        write: called with ids, texts and vectors.
        first: number of the first text in the corpus; the texts before it are done.
        total: number of texts in the corpus, if known.
    """
    under_way: deque[tuple[Sequence[Id], Sequence[str]]] = deque()
    windows = _windows(store, items, WINDOW.get(model.device.type, WINDOW["cuda"]), under_way, first)
    shown = bar(desc="Embedding", total=total, initial=first, unit=" texts", disable=not show_progress_bar)
    with shown, ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: None)
        for vectors in embed_each(
            model, windows, task="document", tokens_per_batch=tokens_per_batch, advance=shown.update
        ):
            writing.result()
            writing = writer.submit(_write_first, under_way, write, vectors)
        writing.result()


def _write_first(under_way: deque[tuple[Sequence[Id], Sequence[str]]], write: Write, vectors: Tensor) -> None:
    write(*under_way[0], vectors)
    under_way.popleft()


def add_vectors(
    store: Store, items: Iterator[tuple[Any, str]], vectors: np.ndarray | Tensor, write: Write
) -> None:
    """Pass texts and given vectors [texts, width] to ``write``. Vectors get length 1 if the model compares by
    cosine, as in ``embed``.
    """
    known, by_cosine = list(items), store["similarity"] == "cosine"
    if isinstance(vectors, Tensor):
        vectors = vectors.detach().float().cpu().numpy()
    if not isinstance(vectors, np.ndarray) or vectors.shape[:1] != (len(known),):
        check_vectors(vectors, "vectors", len(known))  # this raises
    for first in range(0, len(known), WINDOW["cpu"]):
        window = known[first : first + WINDOW["cpu"]]
        texts = [text for _, text in window]
        check_texts(texts, first)
        part = vectors[first : first + len(texts)]
        check_vectors(part, "vectors", len(texts), first, zeros=not by_cosine)
        part = np.array(part, np.float32)
        if by_cosine:
            lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
            part = np.where(np.abs(lengths - 1) < 1e-5, part, part / lengths).astype(np.float32)
        write(store.new_ids([id for id, _ in window]), texts, torch.from_numpy(part))


def _windows(
    store: Store,
    items: Iterator[tuple[Any, str]],
    size: int,
    under_way: deque[tuple[Sequence[Id], Sequence[str]]],
    first: int,
) -> Iterator[list[str]]:
    while window := list(itertools.islice(items, size)):
        texts = [text for _, text in window]
        check_texts(texts, first)
        # look here before the store: a window that has left by then is in the store
        waiting = {id for ids, _ in list(under_way) for id in ids}
        ids = store.new_ids([id for id, _ in window])
        if twice := waiting.intersection(ids):
            raise TriternError(f"ids must be unique; {twice.pop()!r} occurs twice")
        under_way.append((ids, texts))
        first += len(texts)
        yield texts
