"""Ids of texts: 64-bit ints and strings that SQLite stores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import TriternError

Id = int | str


def unique(ids: Iterable[Any]) -> list[Id]:
    """The ids as they are stored.

    Raises:
        TriternError: an id that is not an int or str, or a repeated id.
    """
    plain: dict[Id, None] = {}
    for id in map(plain_id, ids):
        if id in plain:
            raise TriternError(f"ids must be unique; {id!r} occurs twice")
        plain[id] = None
    return list(plain)


def plain_id(value: Any) -> Id:
    """An id in SQLite's form."""
    value = value.item() if isinstance(value, np.generic) else value
    good = isinstance(value, str) or (type(value) is int and -(2**63) <= value < 2**63)
    if good and isinstance(value, str):
        good = not any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)
    if not good:
        raise TriternError(
            f"ids must be 64-bit ints or strings without NUL; received {value!r}, {type(value).__name__}"
        )
    return value
