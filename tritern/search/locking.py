"""A lock on an open file against other processes and other handles of this process; on Windows, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl: Any = None
    import msvcrt

PLACE = 2**30
"""Position of the locked byte on Windows. It lies after all data: others cannot read a locked byte."""


@contextmanager
def locked(file: IO[Any], *, shared: bool = False) -> Iterator[None]:
    """Lock a file, without waiting.

    Args:
        file: open; its position and content do not change.
        shared: hold off exclusive locks only. Python has no shared lock on Windows: there this only checks
            that the file is not locked now.

    Raises:
        OSError: another holds the lock.
    """
    number = file.fileno()
    if fcntl:
        fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    else:
        _on_windows(number, "LK_NBLCK")
        if shared:
            _on_windows(number, "LK_UNLCK")
    try:
        yield
    finally:
        if fcntl:
            fcntl.flock(number, fcntl.LOCK_UN)
        elif not shared:
            _on_windows(number, "LK_UNLCK")


def _on_windows(number: int, mode: str) -> None:
    module: Any = msvcrt
    before = os.lseek(number, 0, os.SEEK_CUR)
    os.lseek(number, PLACE, os.SEEK_SET)
    try:
        module.locking(number, getattr(module, mode), 1)
    finally:
        os.lseek(number, before, os.SEEK_SET)
