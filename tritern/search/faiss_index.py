"""The faiss index over a store's vectors: made from them, kept up with them, saved beside them."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import TriternError
from . import kinds
from .nearest import exact as exact_search
from .nearest import rescored
from .store import Store

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60
"""Between savings while texts are added. What the file lacks after a crash is added again on opening."""
GROWTH = 4
"""A trained index is trained anew once it holds so many times the rows that it was trained for."""


class FaissIndex:
    """Rows of a store, found through an index of its kind, or exactly where the kind has none.

    Attributes:
        kind: what the store's settings "kind" and "rescore" say.
        gpus: that it is on. On one it is made there; for several it is made on the CPU and cloned in shards.
    """

    def __init__(self, store: Store, gpus: int) -> None:
        self._store, self.gpus = store, gpus
        self.kind = kinds.kind_of(store["kind"], store["rescore"])
        self.similarity: str = store["similarity"]
        self._index: Any = None
        """Holds all rows, or is None."""
        self._searched: Any = None
        """The same, or its shards on several GPUs."""
        self._parameters = ""
        self._saved, self._rows_saved = time.monotonic(), 0
        self._lock = threading.Lock()  # nobody may search while rows are added, nor two at once on a GPU

    @property
    def file(self) -> Path:
        """Where it is saved."""
        return self._store.folder / f"index-{self._store.generation}.faiss"

    def load(self, train: bool) -> None:
        """Read the file, if there is one that fits, and catch up."""
        index = None
        if self.file.exists():
            try:
                index = kinds.import_faiss().read_index(str(self.file))
            except RuntimeError as error:
                logger.warning("%s cannot be read and is made anew: %s", self.file, error)
        if index is not None and (index.d != self._store.width or index.ntotal > self._store.rows):
            logger.warning("%s is not of these vectors and is made anew", self.file)
            index = None
        if index is not None:
            self._rows_saved = index.ntotal
            kinds.set_parameters(index, kinds.default_parameters(index))
            index = kinds.to_gpus(index, 1) if self.gpus == 1 else index
        self._index = index
        self.catch_up(train)

    def forget(self) -> None:
        """Delete the file: the vectors or the kind are others now."""
        with self._lock:
            self.file.unlink(missing_ok=True)
            self._index = self._searched = None
            self._parameters, self._rows_saved = "", 0
            self.kind = kinds.kind_of(self._store["kind"], self._store["rescore"])

    def add(self, first: int, vectors: torch.Tensor) -> None:
        """Add the rows from ``first`` on, [rows, width], if all before them are there."""
        if self._index is None:
            self._index = self._new(train=False)
        if self._index is not None and self._index.ntotal == first:
            with self._lock:
                self._index.add(vectors.contiguous() if self.gpus == 1 else vectors.cpu().numpy())
                self._searched = None
            self._save(every=SAVE_SECONDS)

    def catch_up(self, train: bool = True) -> None:
        """Add the rows that are missing, and save; if wanted, train before that where it is time."""
        store, index = self._store, self._index
        outgrown = index is not None and store["factory"] != self.kind.factory(store.rows, store.width)
        outgrown = outgrown and train and store.rows > GROWTH * (store["trained_rows"] or store.rows)
        if index is None or outgrown:
            index = self._new(train)
            if index is None:
                return
        self._index = index
        for _, block in store.blocks(index.ntotal):
            with self._lock:
                index.add(block)
                self._searched = None
            self._save(every=SAVE_SECONDS)
        self._save(every=0)

    def search(
        self, queries: torch.Tensor | np.ndarray, k: int, exact: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``SearchIndex.search_vectors``, removed rows among them; k is at most the number of rows."""
        host = queries.cpu().numpy() if isinstance(queries, torch.Tensor) else queries
        host = np.ascontiguousarray(host, np.float32)
        if exact or self._index is None:
            return exact_search(self._store.vectors, host, k, self.similarity)
        candidates = min(self._store.rows, k * self.kind.rescore)
        if self.gpus:
            candidates = max(k, min(candidates, kinds.GPU_K))
        with self._lock:
            if self._searched is None:
                self._searched = kinds.to_gpus(self._index, self.gpus) if self.gpus > 1 else self._index
                parameters = self._parameters or kinds.default_parameters(self._index)
                kinds.set_parameters(self._searched, parameters)
            asked = queries.contiguous() if self.gpus and isinstance(queries, torch.Tensor) else host
            found = self._searched.search(asked, candidates)[1]
        rows = found.cpu().numpy() if isinstance(found, torch.Tensor) else found
        return rescored(self._store.vectors, host, rows, k, self.similarity)

    def set_parameters(self, parameters: str) -> None:
        """As ``SearchIndex.set_search_parameters``."""
        with self._lock:
            if self._index is None:
                raise TriternError("all vectors are compared, without an index: there is nothing to set")
            kinds.set_parameters(self._index, parameters)
            self._parameters, self._searched = parameters, None

    def _new(self, train: bool) -> Any:
        """An empty index, trained if it is of a kind that is.

        None where there is none: the vectors are compared as they are stored, there are too few to train on,
        or training is needed and not wanted now.
        """
        rows, width = self._store.rows, self._store.width
        factory = self.kind.factory(rows, width) or ("Flat" if self.gpus else None)
        if factory is None or not rows:
            return None
        index = kinds.new_index(factory, width, self.similarity)
        if self.gpus == 1:
            index = kinds.to_gpus(index, 1)
        if not index.is_trained:
            if not train or rows < kinds.MIN_ROWS:
                return None
            kinds.train(index, self._store.vectors[kinds.sample(rows, self._store.removed)])
        self._store["factory"], self._store["trained_rows"] = factory, rows
        self._rows_saved = -1
        self._index = index
        self._save(every=0)
        return index

    def _save(self, every: float) -> None:
        if self.kind.factory(1, 1) is None:  # a flat index, on GPUs only, is made of the vectors' file
            return
        if self._index.ntotal != self._rows_saved and time.monotonic() - self._saved >= every:
            kinds.save(self._index, self.file, on_gpu=self.gpus == 1)
            self._saved, self._rows_saved = time.monotonic(), self._index.ntotal
