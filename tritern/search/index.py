"""``SearchIndex``: texts in, neighbours out, on disk."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import TriternError
from ..inputs import check_texts, check_vectors, many, true_or_false, whole_number
from ..pretrained import model_of
from . import adding, kinds
from .embed import embed, tokens_of
from .faiss_index import FaissIndex
from .fingerprint import check_model, name_of, probes, similarity_of
from .store import ROWS_FILE, Busy, Id, Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Hit:
    """A text found.

    Attributes:
        id: as given when it was added.
        score: the model's similarity: cosine, dot product or negative Euclidean distance; exact, of the
            stored vector.
        text: as given.
    """

    id: Id
    score: float
    text: str


class SearchIndex:
    """Texts with ids in a folder, found by meaning: a sentence-transformer and a faiss index.

    Made by ``build`` and ``open``. Searching may be done from several threads, writing from one.

    Attributes:
        model: embeds queries and texts.
        tokens_per_batch: as in ``embed``.
    """

    def __init__(
        self, store: Store, model: SentenceTransformer, gpus: int | None, tokens_per_batch: int | None
    ) -> None:
        self._store, self.model, self.tokens_per_batch = store, model, tokens_of(tokens_per_batch)
        self._faiss = FaissIndex(store)
        self._faiss.gpus = _gpus(gpus, self._faiss.name, model)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def build(
        cls,
        folder: str | Path | None,
        model: SentenceTransformer | str | Path,
        texts: Iterable[str],
        ids: Iterable[Id] | None = None,
        *,
        kind: str = "flat",
        rescore: int | None = None,
        gpus: int | None = None,
        tokens_per_batch: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> SearchIndex:
        """Embed a corpus into a folder, or go on where a call with the same corpus was interrupted.

        Args:
            folder: a new one, or that of an interrupted call; None: a temporary one, deleted on ``close``.
            model: embeds the texts, with the prompt it has for documents; or the name or folder of one, as of
                ``tritern.load``, ternary or not.
            texts: strings in a list or another iterable, none of them empty; taken once, in windows: they may
                be more than fit into memory.
            ids: unique ints or strings in a list or another iterable, one for each text; default 0, 1, 2 ...
            kind: one of ``KINDS`` or a string for ``faiss.index_factory``, such as "IVF256,PQ48".
            rescore: candidates taken from the index for every hit, compared by their stored vectors, 1 to
                1,000,000; default that of the kind, 4 for factory strings.
            gpus: to put the faiss index on; default all when the model is on one and faiss has the kind for
                GPUs, 0 for factory strings.
            tokens_per_batch: as in ``embed``.
            show_progress_bar: default: as ``model.encode`` does, if the log level of sentence-transformers is
                INFO or DEBUG.

        Raises:
            TriternError: there are no texts; bad or repeated ids; an argument is not as above; the folder
                holds another corpus, kind or model's vectors; the disk is full. What was written stays, and
                the next call goes on from it.
        """
        show_progress_bar, tokens = _shown(show_progress_bar), tokens_of(tokens_per_batch)
        rescore, items = kinds.rescore_of(rescore), adding.items_of(texts, ids, itertools.count())
        path = None if folder is None else _path(folder)
        model = model_of(model, "model")
        kinds.check(kind, rescore, model.get_embedding_dimension(), similarity_of(model))
        gpus = _gpus(gpus, kind, model)
        temporary = tempfile.TemporaryDirectory(prefix="tritern-search-") if path is None else None
        path = path or Path(temporary.name if temporary else "")
        first = list(itertools.islice(items, 1))
        if not first and not (path / ROWS_FILE).exists():
            raise TriternError("texts is empty: an index needs at least one text")
        check_texts([text for _, text in first])
        now = probes(model)
        settings = {"kind": kind, "rescore": rescore, "similarity": similarity_of(model)}
        settings |= {"model": name_of(model), "probes": now.tobytes()}
        store = Store(path, create=settings)
        with _closed_if_it_raises(store):
            check_model(store, model, now)
            if (store["kind"], store["rescore"]) != (kind, rescore):
                raise TriternError(
                    f"{path} was built with kind {store['kind']!r} and rescore {store['rescore']}; received "
                    f"{kind!r} and {rescore}: name a new folder, or open this one and reindex it"
                )
            index = cls(store, model, gpus, tokens)
            index._temporary = temporary
            with index._writing():
                index._faiss.load(train=False)  # once all texts are there, however often it was interrupted
                items = adding.rest(store, itertools.chain(first, items))
                write = partial(index._write, numbered=ids is None)
                index._add(items, write, store.rows, _length(texts), show_progress_bar)
        return index

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: SentenceTransformer | str | Path,
        *,
        gpus: int | None = None,
        tokens_per_batch: int | None = None,
    ) -> SearchIndex:
        """Open an index to search in it or to add to it.

        Args:
            folder: of ``build``.
            model, gpus, tokens_per_batch: as in ``build``.

        Raises:
            TriternError: there is none, it was built with another model, or its files are damaged; an
                argument is not as in ``build``.
        """
        kinds.import_faiss()
        tokens, store = tokens_of(tokens_per_batch), Store(_path(folder))
        with _closed_if_it_raises(store):
            model = model_of(model, "model")
            check_model(store, model, probes(model))
            index = cls(store, model, gpus, tokens)
            try:
                with index._writing():
                    index._faiss.load(train=True)
            except Busy:  # to search, nothing must be written
                index._faiss.saves = False
                index._faiss.load(train=True)
        return index

    def add(
        self,
        texts: Iterable[str],
        ids: Iterable[Id] | None = None,
        *,
        vectors: np.ndarray | torch.Tensor | None = None,
        show_progress_bar: bool | None = None,
    ) -> None:
        """Add texts. When it raises, those of the windows before are in the index, and none of the others.

        Args:
            texts, ids: as in ``build``; default ids go on from the number of texts ever added, and leave out
                those in use.
            vectors: [texts, width], made before with ``embed(model, texts, task="document")``.
            show_progress_bar: as in ``build``.

        Raises:
            TriternError: as ``build``.
        """
        show_progress_bar = _shown(show_progress_bar)
        items = adding.items_of(texts, ids, self._store.free_ids())
        write = partial(self._write, numbered=ids is None)
        with self._writing():
            if vectors is None:
                self._add(items, write, 0, _length(texts), show_progress_bar)
            else:
                adding.add_vectors(self._store, items, vectors, write)
                self._faiss.catch_up()

    def remove(self, ids: Iterable[Id]) -> None:
        """Remove texts: they are found no more. Their room is given back by ``compact``.

        Args:
            ids: in a list or another iterable, also a single one.

        Raises:
            TriternError: an id is not in the index, or ``ids`` is no iterable of ids; nothing is removed.
        """
        ids = list(many(ids, "ids"))
        with self._writing():
            self._store.remove(ids)

    def compact(self) -> None:
        """Give back the room of removed texts, and make the faiss index anew."""
        with self._writing():
            self._faiss.compact()

    def reindex(self, kind: str, *, rescore: int | None = None) -> None:
        """Make the faiss index anew, of another kind, from the same vectors.

        Args:
            kind, rescore: as in ``build``.

        Raises:
            TriternError: an argument is not as in ``build``, and nothing is changed; or the kind cannot be
                trained on these vectors: all of them are compared then, until it is given another kind.
        """
        rescore = kinds.rescore_of(rescore)
        width = self._store.width or self.model.get_embedding_dimension()
        kinds.check(kind, rescore, width, self._faiss.similarity)
        _gpus(self.gpus, kind, self.model)
        with self._writing():
            self._faiss.change_kind(kind, rescore)

    def verify(self) -> None:
        """Compare ids, texts and vectors with their checksums. The faiss index is made of them: ``reindex``.

        Raises:
            CheckpointError: something is damaged.
        """
        self._store.verify()

    def search(self, queries: Iterable[str], k: int = 10, *, exact: bool = False) -> list[list[Hit]]:
        """The k most similar texts of each query, best first; all there are, if that is fewer.

        Args:
            queries: strings in a list or another iterable, embedded with the prompt the model has for
                queries; one string is one query.
            k: hits wanted, 1 or more.
            exact: compare all vectors, whatever the kind of the index.

        Raises:
            TriternError: k is no whole number or under 1; a query is no string or empty; an argument is of
                another type.
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
            queries: [queries, width] as ``embed`` gives them; on a GPU they stay there if the index is there.
            k, exact: as in ``search``.

        Returns:
            Where the index found fewer than k, rows are -1 and scores -inf.

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
        while True:  # most often once
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
        """What ``search_vectors`` found, with ids and texts."""
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

    def __repr__(self) -> str:
        return (
            f"SearchIndex(folder={str(self.folder)!r}, kind={self.kind!r}, texts={len(self)}, "
            f"model={name_of(self.model)!r})"
        )

    def __enter__(self) -> SearchIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._store.close()
        if self._temporary:
            self._temporary.cleanup()

    @property
    def folder(self) -> Path:
        """Where all is kept."""
        return self._store.folder

    @property
    def kind(self) -> str:
        """Name of the kind of index, or the faiss factory string given."""
        return self._faiss.name

    @property
    def rescore(self) -> int:
        """Candidates taken from the index for every hit."""
        return self._faiss.kind.rescore

    @property
    def gpus(self) -> int:
        """GPUs that the faiss index is on; 0: it is searched on the CPU."""
        return self._faiss.gpus

    @property
    def vectors(self) -> np.ndarray:
        """[rows, width], float32, on disk; read-only. Those of removed texts are still among them."""
        return self._store.vectors

    @property
    def factory(self) -> str:
        """The string that faiss made the index of; "Flat" where vectors are compared as they are stored."""
        return (self._faiss.kind.factory(1, 1) and self._store["factory"]) or "Flat"

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes on disk: of texts and ids, vectors, and the faiss index, which is in memory too."""
        store, faiss = self._store, self._faiss
        files = {"texts": self.folder / ROWS_FILE, "vectors": store.vectors_file, "faiss": faiss.file}
        return {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._store.writing():
            self._faiss.refresh()
            self._store.tidy()
            yield

    def _add(
        self, items: Iterator[tuple[Id, str]], write: adding.Write, first: int, total: int | None, show: bool
    ) -> None:
        adding.add(
            self._store,
            self.model,
            items,
            write,
            first=first,
            tokens_per_batch=self.tokens_per_batch,
            total=total,
            show_progress_bar=show,
        )
        self._faiss.catch_up()

    def _write(self, ids: Sequence[Id], texts: Sequence[str], vectors: torch.Tensor, numbered: bool) -> None:
        first = self._store.rows
        self._store.append(ids, texts, vectors.cpu().numpy(), numbered)
        self._faiss.add(first, vectors)


@contextmanager
def _closed_if_it_raises(store: Store) -> Iterator[None]:
    try:
        yield
    except BaseException:
        store.close()
        raise


def _length(texts: Iterable[str]) -> int | None:
    return len(texts) if isinstance(texts, Sized) else None


def _path(folder: str | Path) -> Path:
    if not isinstance(folder, (str, Path)):
        raise TriternError(f"folder must be a string or a Path; received {type(folder).__name__}")
    if not str(folder):
        raise TriternError("folder must be the name of a folder; received '': name '.' for the working one")
    return Path(folder)


def _shown(show_progress_bar: bool | None) -> bool:
    """Whether there is a bar: by default where ``encode`` shows one."""
    if show_progress_bar is not None:
        return true_or_false(show_progress_bar, "show_progress_bar")
    from sentence_transformers import SentenceTransformer

    of_encode = logging.getLogger(SentenceTransformer.__module__)
    return of_encode.getEffectiveLevel() in (logging.INFO, logging.DEBUG)


def _gpus(gpus: int | None, kind: str, model: SentenceTransformer) -> int:
    """How many to use: of those asked for, or all if the model is on one."""
    faiss, on_gpu = kinds.import_faiss(), kinds.kind_of(kind, None).on_gpu
    found = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if gpus is None:  # of factory strings nobody knows before whether faiss can
        return found if model.device.type == "cuda" and on_gpu and kind in kinds.KINDS else 0
    gpus = whole_number(gpus, "gpus", 0)
    if gpus > found:
        raise TriternError(f"gpus must be 0 to {found}, all that faiss sees; received {gpus}")
    if gpus and not on_gpu:
        names = ", ".join(name for name, other in kinds.KINDS.items() if other.on_gpu)
        raise TriternError(f"gpus must be 0 for kind {kind!r}, for faiss has {names} only; received {gpus}")
    return gpus
