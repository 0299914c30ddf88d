"""``SearchIndex``: texts in, neighbours out, on disk."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import TriternError
from ..inputs import check_texts, many
from ..pretrained import model_of
from . import adding, kinds
from .arguments import folder_path, gpu_count, length_of, progress_shown
from .database import ROWS_FILE
from .embed import tokens_of
from .faiss_index import FaissIndex
from .fingerprint import check_model, name_of, probes, similarity_of
from .ids import Id
from .searching import SearchableIndex
from .store import Busy, Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class SearchIndex(SearchableIndex):
    """Texts with ids in a folder, and search by meaning: a sentence-transformer and a faiss index.

    ``build`` and ``open`` make one. Several threads may search; one may write.

    Attributes:
        model: embeds queries and texts.
        tokens_per_batch: as in ``embed``.
    """

    def __init__(
        self, store: Store, model: SentenceTransformer, gpus: int | None, tokens_per_batch: int | None
    ) -> None:
        faiss = FaissIndex(store)
        faiss.gpus = gpu_count(gpus, faiss.name, model)
        super().__init__(store, faiss, model, tokens_of(tokens_per_batch))
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
        """Embed a corpus into a folder, or continue an interrupted call with the same corpus.

        Args:
            folder: a new one, or that of an interrupted call; None: a temporary one, deleted on ``close``.
            model: embeds the texts with its prompt for documents. Or the name or folder of a model, as for
                ``tritern.load``, ternary or not.
            texts: strings in a list or another iterable, none of them empty. They are read once, in windows,
                so they need not fit into memory.
            ids: unique ints or strings in a list or another iterable, one for each text; default 0, 1, 2 ...
            kind: one of ``KINDS`` or a string for ``faiss.index_factory``, such as "IVF256,PQ48".
            rescore: number of candidates from the index per hit, 1 to 1,000,000. Their stored vectors are
                compared. The default is that of the kind, 4 for factory strings.
            gpus: number of GPUs for the faiss index. The default is all if the model is on one and faiss has
                the kind for GPUs; otherwise, and for factory strings, 0.
            tokens_per_batch: as in ``embed``.
            show_progress_bar: default: if the log level of sentence-transformers is INFO or DEBUG, as in
                ``model.encode``.

        Raises:
            TriternError: no texts; bad or repeated ids; an invalid argument; a folder with another corpus,
                kind or model's vectors; a full disk. Written texts stay, and the next call continues.
        """
        show_progress_bar, tokens = progress_shown(show_progress_bar), tokens_of(tokens_per_batch)
        rescore, items = kinds.rescore_of(rescore), adding.items_of(texts, ids, itertools.count())
        path = None if folder is None else folder_path(folder)
        model = model_of(model, "model")
        kinds.check(kind, rescore, model.get_embedding_dimension(), similarity_of(model))
        gpus = gpu_count(gpus, kind, model)
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
                index._faiss.load(train=False)  # training waits until all texts are there
                items = adding.rest(store, itertools.chain(first, items))
                write = partial(index._write, numbered=ids is None)
                index._add(items, write, store.rows, length_of(texts), show_progress_bar)
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
            TriternError: no index there; an index of another model; damaged files; an invalid argument.
        """
        kinds.import_faiss()
        tokens, store = tokens_of(tokens_per_batch), Store(folder_path(folder))
        with _closed_if_it_raises(store):
            model = model_of(model, "model")
            check_model(store, model, probes(model))
            index = cls(store, model, gpus, tokens)
            try:
                with index._writing():
                    index._faiss.load(train=True)
            except Busy:  # search works without writing
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
        """Add texts. If it raises, the index has the texts of earlier windows and none of the others.

        Args:
            texts, ids: as in ``build``. Default ids continue from the number of texts ever added and skip ids
                in use.
            vectors: [texts, width], from ``embed(model, texts, task="document")``.
            show_progress_bar: as in ``build``.

        Raises:
            TriternError: as ``build``.
        """
        show_progress_bar = progress_shown(show_progress_bar)
        items = adding.items_of(texts, ids, self._store.free_ids())
        write = partial(self._write, numbered=ids is None)
        with self._writing():
            if vectors is None:
                self._add(items, write, 0, length_of(texts), show_progress_bar)
            else:
                adding.add_vectors(self._store, items, vectors, write)
                self._faiss.catch_up()

    def remove(self, ids: Iterable[Id]) -> None:
        """Remove texts from the results. ``compact`` frees their disk space.

        Args:
            ids: in a list or another iterable, even if it is only one.

        Raises:
            TriternError: an id is not in the index, or ``ids`` is not an iterable. Then nothing is removed.
        """
        ids = list(many(ids, "ids"))
        with self._writing():
            self._store.remove(ids)

    def compact(self) -> None:
        """Free the disk space of removed texts, and build the faiss index again."""
        with self._writing():
            self._faiss.compact()

    def reindex(self, kind: str, *, rescore: int | None = None) -> None:
        """Build the faiss index again, with another kind, from the same vectors.

        Args:
            kind, rescore: as in ``build``.

        Raises:
            TriternError: an invalid argument, and nothing changes; or a kind that cannot be trained on these
                vectors. All vectors are then compared until the next ``reindex``.
        """
        rescore = kinds.rescore_of(rescore)
        width = self._store.width or self.model.get_embedding_dimension()
        kinds.check(kind, rescore, width, self._faiss.similarity)
        gpu_count(self.gpus, kind, self.model)
        with self._writing():
            self._faiss.change_kind(kind, rescore)

    def verify(self) -> None:
        """Compare ids, texts and vectors with their checksums. (``reindex`` makes the faiss index from them.)

        Raises:
            CheckpointError: something is damaged.
        """
        self._store.verify()

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
