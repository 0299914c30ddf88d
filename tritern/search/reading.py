"""Rows of an index on disk: read ids, texts and vectors, and check them for damage."""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, TriternError
from .database import ROWS_FILE, Database
from .ids import Id, unique

BLOCK = 16384
"""Rows read at a time: 25 MB at a width of 384."""


class StoredRows(Database):
    """The reading half of ``Store``. The files and attributes are described there."""

    width: int
    rows: int
    added: int
    generation: int
    version: int
    removed: np.ndarray

    def __init__(self, folder: Path, create: dict[str, Any] | None = None) -> None:
        super().__init__(folder, create)
        self.refresh()

    def __len__(self) -> int:
        return self.rows - len(self.removed)

    @property
    def vectors_file(self) -> Path:
        """The file of the vectors since the last compaction."""
        return self.folder / f"vectors-{self.generation}.f32"

    @property
    def vectors(self) -> np.ndarray:
        """[rows, width], float32, mapped from the file; read-only."""
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
        """Blocks of up to ``BLOCK`` rows in memory: (number of the first row, vectors)."""
        with open(self.vectors_file, "rb") if self.rows else open(os.devnull, "rb") as file:
            file.seek(start * self.width * 4)
            for first in range(start, self.rows, BLOCK):
                count = min(BLOCK, self.rows - first)
                block = np.fromfile(file, np.float32, count * self.width).reshape(count, self.width)
                yield first, block

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows, in ascending order. Read by blocks: a map would keep the whole file in memory."""
        vectors = np.empty((len(rows), self.width), np.float32)
        for first, block in self.blocks():
            start, end = np.searchsorted(rows, (first, first + len(block)))
            vectors[start:end] = block[rows[start:end] - first]
        return vectors

    def refresh(self) -> None:
        """Read the rows that other processes have written."""
        with self._lock, self._failures():
            with self._transaction("DEFERRED"):  # one consistent state
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

    def free_ids(self) -> Iterator[int]:
        """Numbers for texts without ids, from ``added`` on, without ids that are in the index."""
        for first in itertools.count(self.added, 1024):
            numbers = range(first, first + 1024)
            used = self.rows_of(numbers)
            yield from (number for number in numbers if number not in used)

    def new_ids(self, ids: Sequence[Any]) -> list[Id]:
        """The ids as they are stored.

        Raises:
            TriternError: an id that is not an int or str, is repeated, or is in the index already.
        """
        plain = unique(ids)
        if there := self.rows_of(plain):
            raise TriternError(
                f"id {next(iter(there))!r} is in the index already: remove it first to replace its text"
            )
        return plain

    def rows_of(self, ids: Sequence[Id]) -> dict[Id, int]:
        """The rows of the ids that are in the index."""
        query = "SELECT id, row FROM rows WHERE id IN (SELECT value FROM json_each(?))"
        with self._lock, self._failures():
            return dict(self._db.execute(query, (json.dumps(list(ids)),)).fetchall())

    def look_up(self, rows: Sequence[int]) -> dict[int, tuple[Id, str]]:
        """Ids and texts of rows, without removed ones.

        Raises:
            TriternError: another process has compacted the folder, and the numbers mean other rows now.
        """
        query = "SELECT row, id, text FROM rows WHERE row IN (SELECT value FROM json_each(?))"
        with self._lock, self._failures(), self._transaction("DEFERRED"):  # one consistent state
            same = self["generation"] == self.generation
            found = self._db.execute(query, (json.dumps(list(rows)),)).fetchall()
        if not same:
            raise TriternError(f"{self.folder} was compacted by another process: open it again")
        return {row: (id, text) for row, id, text in found}

    def items(self) -> Iterator[tuple[Id, str]]:
        """Ids and texts in the order of their rows."""
        after = -1
        query = "SELECT row, id, text FROM rows WHERE row > ? ORDER BY row LIMIT 4096"
        while True:  # a page at a time: an open cursor would block writing
            with self._lock, self._failures():
                page = self._db.execute(query, (after,)).fetchall()
            if not page:
                return
            yield from ((id, text) for _, id, text in page)
            after = page[-1][0]

    def verify(self) -> None:
        """Read ids, texts and vectors and compare them with their checksums.

        Raises:
            CheckpointError: a file has changed since it was written.
        """
        with self._lock, self._failures():
            found = self._db.execute("PRAGMA integrity_check").fetchone()[0]
            blocks = self._db.execute("SELECT first, crc32 FROM blocks ORDER BY first").fetchall()
            wrong = [
                id
                for id, text, crc in self._db.execute("SELECT id, text, crc32 FROM rows")
                if crc != checksum(id, text)
            ]
        if found != "ok":
            raise CheckpointError(f"{self.folder / ROWS_FILE} is damaged ({found}): copy it again")
        if wrong:
            raise CheckpointError(
                f"{self.folder / ROWS_FILE}: {len(wrong):,} texts are damaged, such as that of "
                f"id {wrong[0]!r}: copy it again"
            )
        ends = [first for first, _ in blocks[1:]] + [self.rows]
        with open(self.vectors_file, "rb") if blocks else open(os.devnull, "rb") as file:
            for (first, crc), end in zip(blocks, ends):
                if zlib.crc32(file.read((end - first) * self.width * 4)) != crc:
                    raise CheckpointError(
                        f"{self.vectors_file}: rows {first} to {end - 1} are damaged: copy it"
                    )

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._mapped = np.empty((0, 0), np.float32)
            self._db.close()


def checksum(id: Id, text: str) -> int:
    """CRC-32 of an id and its text."""
    return zlib.crc32(f"{id!r} {text}".encode())
