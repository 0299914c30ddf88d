"""The SQLite file of an index: its tables, settings, transactions and errors."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, TriternError

FORMAT = 1
ROWS_FILE = "rows.sqlite"

COUNTS = "generation", "version", "width", "rows", "added"
"""Settings that are whole numbers."""

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value);
CREATE TABLE rows (row INTEGER PRIMARY KEY, id UNIQUE NOT NULL, text TEXT NOT NULL, crc32 INTEGER NOT NULL);
CREATE TABLE removed (row INTEGER PRIMARY KEY);
CREATE TABLE blocks (first INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL);
"""


class Database:
    """The connection to ``rows.sqlite`` in a folder. Threads may share it.

    Args:
        folder: the folder of the file.
        create: settings of a new index, written if the file has no tables; None: the file must exist.

    Raises:
        TriternError: the folder has no index, or cannot be made.
        CheckpointError: the file is not an index, is damaged or has another format.
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
                f"{path} is not an index of tritern, or its creation was interrupted: delete it"
            )
        if self["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {self['format']}, and this version of tritern reads {FORMAT}: update it"
            )

    def _tables(self) -> bool:
        with self._failures():
            return bool(self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone())

    def __getitem__(self, name: str) -> Any:
        """A setting by name, or None."""
        with self._lock, self._failures():
            found = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def _set(self, settings: dict[str, Any]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", settings.items())

    def _check_settings(self) -> None:
        """Refuse settings that tritern cannot have written; ``FaissIndex`` checks "kind" and "rescore"."""
        for name, types in {**dict.fromkeys(COUNTS, int), "similarity": str, "probes": bytes}.items():
            value = self[name]
            if type(value) is not types or (types is int and value < 0):
                raise CheckpointError(
                    f"{self.folder / ROWS_FILE}: its setting {name!r} is {str(value)[:40]!r} and must be "
                    f"{'a whole number' if types is int else types.__name__}: copy it again, or build anew"
                )

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
        """Turn errors of SQLite and the file system into tritern's; these say how to go on."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            raise TriternError(
                f"{self.folder} cannot be written or read ({error}; {free / 1e6:,.0f} MB are free there). "
                "Rows written before are kept: fix this and rerun"
            ) from error
        except sqlite3.ProgrammingError as error:
            raise TriternError(
                f"the index in {self.folder} cannot be used ({error}): open it again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CheckpointError(f"{self.folder / ROWS_FILE} cannot be read: {error}") from error
