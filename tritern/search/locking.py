"""A lock on an open file, against other processes and other handles of this one; on Windows too."""

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
"""Of the byte that is locked on Windows: behind all that is read, for others cannot read a locked one."""


@contextmanager
def locked(file: IO[Any], *, shared: bool = False) -> Iterator[None]:
    """Hold a file; it is not waited for.

    Args:
        file: open; its position and its content stay as they are.
        shared: hold it against those who want it for themselves alone. Windows has no such lock in Python:
            there it is only seen that nobody holds the file now.

    Raises:
        OSError: another holds it.
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
