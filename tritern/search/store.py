"""Texts, ids and vectors in a folder. Written rows survive a crash."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from ..errors import TriternError
from .ids import Id, plain_id
from .locking import locked
from .reading import BLOCK, StoredRows, checksum


class Busy(TriternError):
    """Another writer holds the folder, or the folder cannot be written."""


class Store(StoredRows):
    """Rows 0, 1, 2 ... of an id, a text and a vector, in two files.

    ``rows.sqlite`` holds ids, texts and settings. ``vectors-G.f32`` holds the vectors: float32, row after
    row; G counts the compactions. Vectors are flushed to disk first; rows exist once their SQLite transaction
    is committed. Vectors after the last row come from a crash and are overwritten. A removed row keeps its
    number until ``compact``.

    Attributes:
        folder: the folder of the files.
        width: of the vectors; 0 while there are none.
        rows: number of written rows, including rows removed since the last compaction.
        removed: numbers of the removed rows, ascending.
        added: number of rows ever written, or the next number for a text without an id, if that is larger.
        version: counts changes that make a faiss index of the vectors useless: compactions and new kinds.
    """

    def set(self, **settings: Any) -> None:
        """Change settings, all at once."""
        with self._lock, self._failures(), self._transaction():
            self._set(settings)
        self.version = settings.get("version", self.version)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other writers out of the folder.

        Raises:
            Busy: there is a writer, or the folder cannot be written.
        """
        try:
            file = open(self.folder / "lock", "w")
        except OSError as error:
            raise Busy(f"{self.folder} cannot be written to: {error.strerror}") from None
        with file, ExitStack() as held:
            try:
                held.enter_context(locked(file))
            except OSError:
                raise Busy(f"another process is writing to {self.folder}: wait for it to end") from None
            yield

    def tidy(self) -> None:
        """Delete the files of killed writers and of older versions."""
        kept = {"vectors-*": self.vectors_file.name, "index-*": f"index-{self.version}.faiss"}
        for pattern, name in kept.items():
            for file in self.folder.glob(pattern):
                if file.name != name:
                    with suppress(PermissionError):  # on Windows another process may be reading it
                        file.unlink(missing_ok=True)

    def append(
        self, ids: Sequence[Id], texts: Sequence[str], vectors: np.ndarray, numbered: bool = False
    ) -> None:
        """Write rows. On return all of them are on disk; if it raises, none of them is.

        Args:
            ids: from ``new_ids``.
            texts: one per id.
            vectors: [rows, width], float32.
            numbered: the ids come from ``free_ids``. It never gives them again, even after their removal.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        width = self.width or vectors.shape[1]
        if vectors.shape != (len(texts), width):
            raise TriternError(f"vectors must be [{len(texts)}, {width}]; received {list(vectors.shape)}")
        content = _bytes(vectors)
        with self._lock, self._failures():
            with open(self.vectors_file, "r+b" if self.vectors_file.exists() else "x+b") as file:
                file.seek(self.rows * width * 4)
                file.truncate()
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with self._transaction():
                numbers = range(self.rows, self.rows + len(texts))
                crcs = map(checksum, ids, texts)
                self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", zip(numbers, ids, texts, crcs))
                self._db.execute("INSERT INTO blocks VALUES (?, ?)", (self.rows, zlib.crc32(content)))
                added = max(self.added + len(texts), int(ids[-1]) + 1 if numbered else 0)
                self._set({"rows": numbers.stop, "width": width, "added": added})
            self.rows, self.width, self.added = numbers.stop, width, added

    def remove(self, ids: Sequence[Any]) -> None:
        """Remove rows by id, all or none.

        Raises:
            TriternError: an id is not in the index.
        """
        plain = list(dict.fromkeys(plain_id(i) for i in ids))
        rows = self.rows_of(plain)
        if missing := [i for i in plain if i not in rows]:
            raise TriternError(f"{len(missing):,} of the ids are not in the index, such as {missing[0]!r}")
        with self._lock, self._failures():
            with self._transaction():
                numbers = [(row,) for row in rows.values()]
                self._db.executemany("DELETE FROM rows WHERE row = ?", numbers)
                self._db.executemany("INSERT INTO removed VALUES (?)", numbers)
            self.removed = np.union1d(self.removed, np.fromiter(rows.values(), np.int64, len(rows)))

    def compact(self) -> None:
        """Free the disk space of removed rows. The others get new numbers, in the same order."""
        kept = np.setdiff1d(np.arange(self.rows), self.removed)
        generation = self.generation + 1
        with self._lock, self._failures():
            checksums = []
            with open(self.folder / f"vectors-{generation}.f32", "wb") as file:
                for start in range(0, len(kept), BLOCK):
                    content = _bytes(np.ascontiguousarray(self.vectors[kept[start : start + BLOCK]]))
                    file.write(content)
                    checksums.append((start, zlib.crc32(content)))
                file.flush()
                os.fsync(file.fileno())
            with self._transaction():
                self._db.execute("CREATE TABLE live AS SELECT id, text, crc32 FROM rows ORDER BY row")
                for table in ("rows", "removed", "blocks"):
                    self._db.execute(f"DELETE FROM {table}")
                self._db.execute(
                    "INSERT INTO rows SELECT rowid - 1, id, text, crc32 FROM live ORDER BY rowid"
                )
                self._db.execute("DROP TABLE live")
                self._db.executemany("INSERT INTO blocks VALUES (?, ?)", checksums)
                self._set({"generation": generation, "version": self.version + 1, "rows": len(kept)})
            self.refresh()
            self.tidy()
            self._db.execute("VACUUM")


def _bytes(vectors: np.ndarray) -> memoryview:
    return memoryview(vectors).cast("B")  # pyright: ignore[reportArgumentType]
