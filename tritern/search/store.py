"""Texts, ids and vectors in a folder: what was written before a crash is there after it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, TriternError
from .locking import locked

FORMAT = 1
ROWS_FILE = "rows.sqlite"
BLOCK = 16384
"""Rows read at a time: 25 MB at a width of 384."""

COUNTS = "generation", "version", "width", "rows", "added"
"""Settings that are whole numbers."""

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value);
CREATE TABLE rows (row INTEGER PRIMARY KEY, id UNIQUE NOT NULL, text TEXT NOT NULL, crc32 INTEGER NOT NULL);
CREATE TABLE removed (row INTEGER PRIMARY KEY);
CREATE TABLE blocks (first INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL);
"""

Id = int | str


class Busy(TriternError):
    """Another writer holds the folder, or it cannot be written to."""


class Store:
    """Rows 0, 1, 2 ... of an id, a text and a vector, in two files.

    ``rows.sqlite`` holds ids, texts and settings, ``vectors-G.f32`` the vectors: float32, row after row, G
    counting the compactions. Rows exist once their SQLite transaction is committed, after their vectors have
    been flushed to disk; what lies behind them in the file is left from a crash and is overwritten. A removed
    row keeps its number until ``compact``.

    Attributes:
        folder: where the files are.
        width: of the vectors; 0 while there are none.
        rows: rows written, those removed since the last compaction among them.
        removed: numbers of the removed rows, ascending.
        added: rows ever written; more where the numbers given to texts without ids are further.
        version: counts what makes a faiss index of the vectors useless: compactions and changes of its kind.
    """

    def __init__(self, folder: Path, create: dict[str, Any] | None = None) -> None:
        self.folder = folder
        path = folder / ROWS_FILE
        if create is None and not path.is_file():
            raise TriternError(f"{folder} holds no index ({ROWS_FILE} is missing): build one first")
        if create is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TriternError(f"folder {folder} cannot be made: {error.strerror}") from None
        self._lock = threading.RLock()
        with self._failures():
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=60)
            if create is not None and not self._tables():
                with self._transaction():
                    for statement in SCHEMA.strip().splitlines():
                        self._db.execute(statement)
                    self._set({"format": FORMAT, **dict.fromkeys(COUNTS, 0), **create})
        if not self._tables():
            raise CheckpointError(
                f"{path} is not an index of tritern, or its making was interrupted: delete it"
            )
        if self["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {self['format']}, and this version of tritern reads {FORMAT}: update it"
            )
        self.refresh()

    def _tables(self) -> bool:
        with self._failures():
            return bool(self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone())

    def __getitem__(self, name: str) -> Any:
        """A setting, None where there is none of that name."""
        with self._lock, self._failures():
            found = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def set(self, **settings: Any) -> None:
        """Change settings, all at once."""
        with self._lock, self._failures(), self._transaction():
            self._set(settings)
        self.version = settings.get("version", self.version)

    def __len__(self) -> int:
        return self.rows - len(self.removed)

    def _set(self, settings: dict[str, Any]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", settings.items())

    def _check_settings(self) -> None:
        """Refuse what was not written here; "kind" and "rescore" are seen to where they are used."""
        for name, types in {**dict.fromkeys(COUNTS, int), "similarity": str, "probes": bytes}.items():
            value = self[name]
            if type(value) is not types or (types is int and value < 0):
                raise CheckpointError(
                    f"{self.folder / ROWS_FILE}: its setting {name!r} is {str(value)[:40]!r} and must be "
                    f"{'a whole number' if types is int else types.__name__}: copy it again, or build anew"
                )

    @property
    def vectors_file(self) -> Path:
        """The file of the vectors since the last compaction."""
        return self.folder / f"vectors-{self.generation}.f32"

    @property
    def vectors(self) -> np.ndarray:
        """[rows, width], float32, read from the file where it is looked at; read-only."""
        with self._lock:
            if len(self._mapped) != self.rows:
                with self._failures():
                    self._mapped = self._map()
            return self._mapped

    def _map(self) -> np.ndarray:
        shape = (self.rows, self.width)
        return (
            np.memmap(self.vectors_file, np.float32, "r", shape=shape) if self.rows else np.empty(shape, "f")
        )

    def blocks(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, vectors) of up to ``BLOCK`` rows each, read into memory."""
        with open(self.vectors_file, "rb") if self.rows else open(os.devnull, "rb") as file:
            file.seek(start * self.width * 4)
            for first in range(start, self.rows, BLOCK):
                count = min(BLOCK, self.rows - first)
                block = np.fromfile(file, np.float32, count * self.width).reshape(count, self.width)
                yield first, block

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows, in ascending order, read by blocks: a map would keep the whole file in memory."""
        vectors = np.empty((len(rows), self.width), np.float32)
        for first, block in self.blocks():
            start, end = np.searchsorted(rows, (first, first + len(block)))
            vectors[start:end] = block[rows[start:end] - first]
        return vectors

    def refresh(self) -> None:
        """Take in what another process may have written."""
        with self._lock, self._failures():
            with self._transaction("DEFERRED"):  # so that all is of one state
                self._check_settings()
                self.generation, self.version = self["generation"], self["version"]
                self.rows, self.width, self.added = self["rows"], self["width"], self["added"]
                removed = self._db.execute("SELECT row FROM removed ORDER BY row")
                self.removed = np.fromiter((row for (row,) in removed), np.int64)
                size = self.vectors_file.stat().st_size if self.vectors_file.exists() else 0
                if size < self.rows * self.width * 4:
                    raise CheckpointError(
                        f"{self.vectors_file} holds {size:,} bytes and must hold "
                        f"{self.rows * self.width * 4:,}: it is truncated. Copy it again, or build anew"
                    )
                self._mapped = self._map()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder against other writers.

        Raises:
            Busy: there is one, or the folder cannot be written to.
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
        """Delete what killed writers have left, and what is of older versions."""
        kept = {"vectors-*": self.vectors_file.name, "index-*": f"index-{self.version}.faiss"}
        for pattern, name in kept.items():
            for file in self.folder.glob(pattern):
                if file.name != name:
                    with suppress(PermissionError):  # on Windows while another process reads it
                        file.unlink(missing_ok=True)

    def free_ids(self) -> Iterator[int]:
        """Numbers for texts without ids, from ``added`` on; those that are ids in the index are left out."""
        for first in itertools.count(self.added, 1024):
            numbers = range(first, first + 1024)
            used = self.rows_of(numbers)
            yield from (number for number in numbers if number not in used)

    def new_ids(self, ids: Sequence[Any]) -> list[Id]:
        """The ids as they are stored.

        Raises:
            TriternError: one is no int or str, twice among them or in the index already.
        """
        plain = unique(ids)
        if there := self.rows_of(plain):
            raise TriternError(
                f"id {next(iter(there))!r} is in the index already: remove it first to replace its text"
            )
        return plain

    def append(
        self, ids: Sequence[Id], texts: Sequence[str], vectors: np.ndarray, numbered: bool = False
    ) -> None:
        """Write rows; when this returns they are on disk, and if it raises there is none of them.

        Args:
            ids: as of ``new_ids``.
            texts: one for each.
            vectors: [rows, width], float32.
            numbered: the ids are of ``free_ids``, which gives none of them again, also when they are removed.
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
                crcs = map(_crc32, ids, texts)
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
        plain = list(dict.fromkeys(_plain(i) for i in ids))
        rows = self.rows_of(plain)
        if missing := [i for i in plain if i not in rows]:
            raise TriternError(f"{len(missing):,} of the ids are not in the index, such as {missing[0]!r}")
        with self._lock, self._failures():
            with self._transaction():
                numbers = [(row,) for row in rows.values()]
                self._db.executemany("DELETE FROM rows WHERE row = ?", numbers)
                self._db.executemany("INSERT INTO removed VALUES (?)", numbers)
            self.removed = np.union1d(self.removed, np.fromiter(rows.values(), np.int64, len(rows)))

    def rows_of(self, ids: Sequence[Id]) -> dict[Id, int]:
        """The rows of those of the ids that are in the index."""
        query = "SELECT id, row FROM rows WHERE id IN (SELECT value FROM json_each(?))"
        with self._lock, self._failures():
            return dict(self._db.execute(query, (json.dumps(list(ids)),)).fetchall())

    def look_up(self, rows: Sequence[int]) -> dict[int, tuple[Id, str]]:
        """Id and text of rows; those removed are left out.

        Raises:
            TriternError: another process has compacted the folder, so that the numbers are of other rows now.
        """
        query = "SELECT row, id, text FROM rows WHERE row IN (SELECT value FROM json_each(?))"
        with self._lock, self._failures(), self._transaction("DEFERRED"):  # both are read of one state
            same = self["generation"] == self.generation
            found = self._db.execute(query, (json.dumps(list(rows)),)).fetchall()
        if not same:
            raise TriternError(f"{self.folder} was compacted by another process: open it again")
        return {row: (id, text) for row, id, text in found}

    def items(self) -> Iterator[tuple[Id, str]]:
        """Ids and texts in the order of their rows."""
        after = -1
        query = "SELECT row, id, text FROM rows WHERE row > ? ORDER BY row LIMIT 4096"
        while True:  # a page at a time: an open cursor would be in the way of writing
            with self._lock, self._failures():
                page = self._db.execute(query, (after,)).fetchall()
            if not page:
                return
            yield from ((id, text) for _, id, text in page)
            after = page[-1][0]

    def compact(self) -> None:
        """Give back the room of removed rows; the others are numbered anew, in the same order."""
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

    def verify(self) -> None:
        """Read ids, texts and vectors and compare them with their checksums.

        Raises:
            CheckpointError: a file is not what was written.
        """
        with self._lock, self._failures():
            found = self._db.execute("PRAGMA integrity_check").fetchone()[0]
            blocks = self._db.execute("SELECT first, crc32 FROM blocks ORDER BY first").fetchall()
            wrong = [
                id
                for id, text, crc in self._db.execute("SELECT id, text, crc32 FROM rows")
                if crc != _crc32(id, text)
            ]
        if found != "ok":
            raise CheckpointError(f"{self.folder / ROWS_FILE} is damaged ({found}): copy it again")
        if wrong:
            raise CheckpointError(
                f"{self.folder / ROWS_FILE}: {len(wrong):,} texts are not what was written, such as that of "
                f"id {wrong[0]!r}: copy it again"
            )
        ends = [first for first, _ in blocks[1:]] + [self.rows]
        with open(self.vectors_file, "rb") if blocks else open(os.devnull, "rb") as file:
            for (first, crc), end in zip(blocks, ends):
                if zlib.crc32(file.read((end - first) * self.width * 4)) != crc:
                    raise CheckpointError(
                        f"{self.vectors_file}: rows {first} to {end - 1} are not what was written: copy it"
                    )

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._mapped = np.empty((0, 0), np.float32)
            self._db.close()

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        self._db.execute(f"BEGIN {kind}")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Say of a full disk or a damaged file what is lost (nothing) and what to do."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            raise TriternError(
                f"{self.folder} cannot be written or read ({error}; {free / 1e6:,.0f} MB are free there). "
                "What was written before is kept: mend that and run the same again"
            ) from error
        except sqlite3.ProgrammingError as error:
            raise TriternError(
                f"the index in {self.folder} cannot be used ({error}): open it again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CheckpointError(f"{self.folder / ROWS_FILE} cannot be read: {error}") from error


def unique(ids: Iterable[Any]) -> list[Id]:
    """The ids as they are stored.

    Raises:
        TriternError: one is no int or str, or twice among them.
    """
    plain: dict[Id, None] = {}
    for id in map(_plain, ids):
        if id in plain:
            raise TriternError(f"ids must be unique; {id!r} is there twice")
        plain[id] = None
    return list(plain)


def _plain(value: Any) -> Id:
    """An id as SQLite takes it."""
    value = value.item() if isinstance(value, np.generic) else value
    good = isinstance(value, str) or (type(value) is int and -(2**63) <= value < 2**63)
    if good and isinstance(value, str):
        good = not any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)
    if not good:
        raise TriternError(
            f"ids must be 64-bit ints or strings without NUL; received {value!r}, {type(value).__name__}"
        )
    return value


def _crc32(id: Id, text: str) -> int:
    return zlib.crc32(f"{id!r} {text}".encode())


def _bytes(vectors: np.ndarray) -> memoryview:
    return memoryview(vectors).cast("B")  # pyright: ignore[reportArgumentType]
