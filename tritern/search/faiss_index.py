"""The faiss index over a store's vectors: build it, keep it up to date, save it beside them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
"""Least seconds between two saves while texts are added. Opening adds the rows that the file lacks."""
SAVING_SHARE = 0.1
"""Largest share of the time to spend on saving."""
GROWTH = 4
"""An index is trained again when it has grown by this factor since it was trained."""


class Shared:
    """A lock for any number of readers or one writer."""

    def __init__(self) -> None:
        self._free, self._readers = threading.Condition(threading.RLock()), 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wait for a writer; hold off writers."""
        with self._free:
            self._readers += 1
        try:
            yield
        finally:
            with self._free:
                self._readers -= 1
                self._free.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait for all readers; hold off readers and writers."""
        with self._free:
            self._free.wait_for(lambda: not self._readers)
            yield


class FaissIndex:
    """Finds rows of a store through a faiss index, or exactly if its kind has none.

    Attributes:
        name, kind: from the store's settings "kind" and "rescore"; "flat" if these are unusable.
        gpus: number of GPUs that hold it. One GPU builds it itself; for several it is built on the CPU and
            cloned in shards.
        saves: whether it is written to the folder.
        lock: held by readers while they search and look up the found rows; held by writers while they add or
            renumber rows.
    """

    def __init__(self, store: Store) -> None:
        self._store, self.gpus, self.saves = store, 0, True
        self.similarity: str = store["similarity"]
        self.lock = Shared()
        self._gpu_lock = threading.Lock()  # faiss: one search at a time on a GPU
        self._index: Any = None
        """Holds all rows; None: all vectors are compared."""
        self._clones: Any = None
        """The same in shards on several GPUs."""
        self._forget()

    def _forget(self) -> None:
        self.version = self._store.version
        self.name: str = self._store["kind"]
        try:
            self.kind = kinds.kind_of(self.name, self._store["rescore"])
        except TriternError as error:
            logger.warning(
                "%s: a stored setting is wrong: %s. All vectors are compared until "
                "index.reindex(kind, rescore=...) stores others",
                self._store.folder,
                error,
            )
            self.name, self.kind = "flat", kinds.KINDS["flat"]
        self._index = self._clones = None
        self._parameters = ""
        self._saved, self._saving, self._rows_saved = time.monotonic(), 0.0, 0

    @property
    def file(self) -> Path:
        """The file of the faiss index."""
        return self._store.folder / f"index-{self.version}.faiss"

    def load(self, train: bool) -> None:
        """Read the file, if it fits the store, and add missing rows. If that fails, search stays exact."""
        index = None
        if self.file.exists() and self.kind.factory(1, 1) is not None:
            try:
                index = kinds.import_faiss().read_index(str(self.file))
            except RuntimeError as error:
                logger.warning("%s cannot be read and is built again: %s", self.file, error)
        if index is not None and (index.d != self._store.width or index.ntotal > self._store.rows):
            logger.warning("%s belongs to other vectors and is built again", self.file)
            index = None
        if index is not None:
            self._rows_saved = index.ntotal
            kinds.set_parameters(index, kinds.default_parameters(index))
            index = kinds.to_gpus(index, 1) if self.gpus == 1 else index
        self._index = index
        try:
            self.catch_up(train)
        except TriternError as error:
            self._index = None
            logger.warning("there is no index of this kind, so every search compares all vectors: %s", error)

    def refresh(self) -> None:
        """Take over the changes of another writer."""
        with self.lock.writing():
            self._store.refresh()
            if self._store.version != self.version:
                self._forget()

    def compact(self) -> None:
        """Drop the removed rows, renumber the others and build the index from them."""
        with self.lock.writing():
            self._store.compact()
            self._forget()
        self.catch_up()

    def change_kind(self, kind: str, rescore: int | None) -> None:
        """Build an index of another kind. All vectors are compared until it is ready."""
        with self.lock.writing():
            self._store.set(kind=kind, rescore=rescore, factory=None, version=self._store.version + 1)
            self._forget()
        self.catch_up()
        self._store.tidy()

    def add(self, first: int, vectors: torch.Tensor) -> None:
        """Add the rows from ``first`` on, [rows, width], if the index has all rows before them."""
        if self._index is None and first == 0:
            self._index = self._new(train=False)
        if self._index is not None and self._index.ntotal == first:
            with self.lock.writing():
                kinds.add(self._index, vectors.contiguous() if self.gpus == 1 else vectors.cpu().numpy())
                self._clones = None
            self._save(self._index)

    def catch_up(self, train: bool = True) -> None:
        """Add missing rows and save. If ``train``, train first when due."""
        store, index = self._store, self._index
        outgrown = index is not None and store["factory"] != self.kind.factory(store.rows, store.width)
        outgrown = outgrown and train and store.rows > GROWTH * (store["trained_rows"] or store.rows)
        if index is None or outgrown:
            index = self._new(train)
            if index is None:
                return
        for _, block in store.blocks(index.ntotal):
            with self.lock.writing():
                kinds.add(index, block)
            self._save(index)
        with self.lock.writing():
            self._index, self._clones = index, None
        self._save(index, at_once=True)

    def search(
        self, host: np.ndarray, on_device: torch.Tensor | None, k: int, exact: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Like ``SearchIndex.search_vectors``, with removed rows; k is at most the number of rows.

        Args:
            host: queries [queries, width], float32.
            on_device: the same on the model's device.
            k, exact: as there.
        """
        if exact or self._index is None or (self.gpus and k > kinds.GPU_K):
            return exact_search(self._store.vectors, host, k, self.similarity)
        candidates = min(self._store.rows, k * self.kind.rescore)
        if not self.gpus:
            rows = self._index.search(host, candidates)[1]
        else:
            with self._gpu_lock:
                asked = on_device if self.gpus == 1 and on_device is not None else host
                found = self._gpu_index().search(asked, min(candidates, kinds.GPU_K))[1]
            rows = found.cpu().numpy() if isinstance(found, torch.Tensor) else found
        return rescored(self._store.vectors, host, rows, k, self.similarity)

    def _gpu_index(self) -> Any:
        if self.gpus == 1:
            return self._index
        if self._clones is None:
            self._clones = kinds.to_gpus(self._index, self.gpus)
            kinds.set_parameters(self._clones, self._parameters or kinds.default_parameters(self._index))
        return self._clones

    def set_parameters(self, parameters: str) -> None:
        """See ``SearchIndex.set_search_parameters``."""
        if not isinstance(parameters, str):
            raise TriternError(f"parameters must be a string such as 'nprobe=16'; received {parameters!r}")
        with self.lock.writing():
            if self._index is None:
                raise TriternError("all vectors are compared, without an index: there is nothing to set")
            kinds.set_parameters(self._index, parameters)
            self._parameters, self._clones = parameters, None

    def _new(self, train: bool) -> Any:
        """An empty index, trained if its kind needs training.

        None if the kind has no index, there are too few vectors to train on, or the index needs training and
        ``train`` is False.
        """
        store = self._store
        factory = self.kind.factory(store.rows, store.width) or ("Flat" if self.gpus else None)
        if factory is None or not store.rows:
            return None
        index = kinds.new_index(factory, store.width, self.similarity)
        if not index.is_trained and (not train or len(store) < kinds.MIN_ROWS):
            return None
        index = kinds.to_gpus(index, 1) if self.gpus == 1 else index
        if not index.is_trained:
            wanted = kinds.sample(index, store.rows, store.removed)
            kinds.train(index, store.read(wanted))
        if self.saves:
            store.set(factory=factory, trained_rows=store.rows)
        self._rows_saved = -1
        self._save(index, at_once=True)
        return index

    def _save(self, index: Any, at_once: bool = False) -> None:
        """Write the file, at once or if it is due."""
        due = at_once or time.monotonic() - self._saved > max(SAVE_SECONDS, self._saving / SAVING_SHARE)
        # a flat index exists on GPUs only and is read from the vectors' file
        if due and self.saves and index.ntotal != self._rows_saved and self.kind.factory(1, 1) is not None:
            start = time.monotonic()
            kinds.save(index, self.file, on_gpu=self.gpus == 1)
            self._saved, self._rows_saved = time.monotonic(), index.ntotal
            self._saving = self._saved - start
