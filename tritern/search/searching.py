"""Search an open index: queries in, hits out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import TriternError
from ..inputs import check_texts, check_vectors, many, true_or_false, whole_number
from .database import ROWS_FILE
from .embed import embed
from .faiss_index import FaissIndex
from .ids import Id
from .store import Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Hit:
    """A found text.

    Attributes:
        id: its id.
        score: the model's similarity (cosine, dot product or negative Euclidean distance), exact, from the
            stored vector.
        text: the text.
    """

    id: Id
    score: float
    text: str


class SearchableIndex:
    """The reading half of ``SearchIndex``: it searches and writes nothing.

    Args:
        store: rows of texts, ids and vectors.
        faiss: the faiss index over them.
        model: embeds queries.
        tokens_per_batch: as in ``embed``.
    """

    def __init__(
        self, store: Store, faiss: FaissIndex, model: SentenceTransformer, tokens_per_batch: int | None
    ) -> None:
        self._store, self._faiss, self.model = store, faiss, model
        self.tokens_per_batch = tokens_per_batch

    def search(self, queries: Iterable[str], k: int = 10, *, exact: bool = False) -> list[list[Hit]]:
        """The k most similar texts of each query, best first; all texts if there are fewer than k.

        Args:
            queries: strings in a list or another iterable. They are embedded with the model's prompt for
                queries. One string is one query.
            k: number of hits, 1 or more.
            exact: compare all vectors, whatever the kind of the index.

        Raises:
            TriternError: k is not a whole number or under 1; a query is empty or not a string; an argument
                of another type.
        """
        k, exact = whole_number(k, "k", 1), true_or_false(exact, "exact")
        queries = [queries] if isinstance(queries, str) else list(many(queries, "queries"))
        check_texts(queries, name="queries")
        vectors = embed(self.model, queries, task="query", tokens_per_batch=self.tokens_per_batch)
        with self._faiss.lock.reading():  # rows keep their numbers until they are looked up
            scores, rows = self._search(vectors, k, exact)
            return self.hits(scores, rows)

    def search_vectors(
        self, queries: torch.Tensor | np.ndarray, k: int = 10, *, exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores, float32, and numbers of rows, int64, each [queries, min(k, len(self))], best first.

        Args:
            queries: [queries, width] from ``embed``. On a GPU they stay there if the index is there, too.
            k, exact: as in ``search``.

        Returns:
            Rows are -1 and scores -inf if the index found fewer than k.

        Raises:
            TriternError: queries of another type, shape or width, or not finite; k or exact as in ``search``.
        """
        with self._faiss.lock.reading():
            return self._search(queries, k, exact)

    def _search(
        self, queries: torch.Tensor | np.ndarray, k: int, exact: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        k, exact = whole_number(k, "k", 1), true_or_false(exact, "exact")
        on_device = queries.detach().float() if isinstance(queries, torch.Tensor) else None
        host: Any = queries if on_device is None else on_device.cpu().numpy()
        shape = host.shape if isinstance(host, np.ndarray) else ()
        if len(shape) != 2 or (len(self) and shape[1] != self._store.width):
            raise TriternError(
                f"queries must be an array or tensor [queries, {self._store.width}]; received "
                f"{list(shape) or type(queries).__name__}"
            )
        check_vectors(host, "queries", len(host), zeros=True)
        host = np.ascontiguousarray(host, np.float32)
        wanted, removed = min(k, len(self)), self._store.removed
        most = self._store.rows
        if not wanted or not len(host):
            return np.empty((len(host), 0), np.float32), np.empty((len(host), 0), np.int64)
        take = wanted
        while True:  # usually once
            scores, rows = self._faiss.search(host, on_device, take, exact)
            gone = np.zeros_like(rows, bool)
            if len(removed):
                gone = removed[np.searchsorted(removed, rows).clip(max=len(removed) - 1)] == rows
            left = int((~gone).sum(1).min())
            if left >= wanted or take >= most:
                break
            take = min(most, wanted + 4 * (take - left) + 16)  # removed rows took places: ask for more
        if gone.any():
            scores[gone], rows[gone] = -np.inf, -1
            order = np.argsort(gone, axis=1, kind="stable")
            scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        return scores[:, :wanted], rows[:, :wanted]

    def hits(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        """Hits of ``search_vectors``, with ids and texts."""
        known = self._store.look_up(np.unique(rows[rows >= 0]).tolist())
        return [
            [Hit(known[r][0], float(s), known[r][1]) for s, r in zip(ss, rr.tolist()) if r in known]
            for ss, rr in zip(scores, rows)
        ]

    def set_search_parameters(self, parameters: str) -> None:
        """Trade speed for recall: "nprobe=16" for inverted lists, "efSearch=128" for graphs.

        Raises:
            TriternError: the index has no such parameters.
        """
        self._faiss.set_parameters(parameters)

    def items(self) -> Iterator[tuple[Id, str]]:
        """Ids and texts, in the order in which they were added."""
        return self._store.items()

    def __len__(self) -> int:
        return len(self._store)

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self._store.folder

    @property
    def kind(self) -> str:
        """Name of the kind of index, or the given faiss factory string."""
        return self._faiss.name

    @property
    def rescore(self) -> int:
        """Number of candidates from the index per hit."""
        return self._faiss.kind.rescore

    @property
    def gpus(self) -> int:
        """Number of GPUs that hold the faiss index; 0: the CPU searches it."""
        return self._faiss.gpus

    @property
    def vectors(self) -> np.ndarray:
        """[rows, width], float32, on disk; read-only. It still holds vectors of removed texts."""
        return self._store.vectors

    @property
    def factory(self) -> str:
        """The factory string of the faiss index; "Flat" if the stored vectors are compared."""
        return (self._faiss.kind.factory(1, 1) and self._store["factory"]) or "Flat"

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes on disk of texts and ids, of vectors, and of the faiss index (also in memory)."""
        store, faiss = self._store, self._faiss
        files = {"texts": self.folder / ROWS_FILE, "vectors": store.vectors_file, "faiss": faiss.file}
        return {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()}
