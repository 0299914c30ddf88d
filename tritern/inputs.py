"""Checks of what users pass in: texts, other iterables, whole numbers. Every entrance uses these."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import TriternError

Item = TypeVar("Item")


def many(values: Iterable[Item], name: str) -> Iterable[Item]:
    """``values``, if they are an iterable of single things: no string, no bytes, no mapping, no table.

    Args:
        values: an argument of the user's.
        name: of that argument, for the error.

    Raises:
        TriternError: iterating would give characters, numbers of bytes, keys, columns, or is not possible.
    """
    if isinstance(values, (str, bytes, bytearray, memoryview)):
        kind = "string" if isinstance(values, str) else type(values).__name__
        raise TriternError(
            f"{name} must be a list or another iterable; received one {kind}: put it in a list"
        )
    if isinstance(values, Mapping):
        raise TriternError(
            f"{name} must be a list or another iterable; received a {type(values).__name__}: pass a list of "
            "its keys or of its values"
        )
    if hasattr(values, "columns"):  # as of pandas, Polars or PyArrow
        raise TriternError(
            f"{name} must be a list or another iterable; received a {type(values).__name__}: pass one of its "
            "columns"
        )
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TriternError(f"{name} must be a list or another iterable; received {type(values).__name__}")
    return values


def check_texts(texts: Sequence[Any], first: int = 0, *, name: str = "texts", empty: bool = False) -> None:
    """Refuse what has no meaningful vector.

    Args:
        texts: what should be strings.
        first: number of the first of them, for the error.
        name: of the argument that they came in, a plural.
        empty: accept empty strings and white space.

    Raises:
        TriternError: a text is no string, is empty, or holds lone surrogates. The error names its number.
    """
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            hint = " (decode it, such as with text.decode('utf-8'))" if isinstance(text, bytes) else ""
            raise TriternError(f"{name} must be strings; number {number} is {type(text).__name__}{hint}")
        if not empty and not text.strip():
            raise TriternError(f"{name}: number {number} is empty: it has no meaningful vector; leave it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TriternError(
                f"{name}: number {number} holds what is no character ({text[:40]!a}): read the file as "
                "UTF-8, with errors='replace' if it must be"
            ) from None


def whole_number(value: Any, name: str, least: int, most: int | None = None) -> int:
    """``value`` as an int.

    Args:
        value: an int, or what stands for one exactly, such as a NumPy integer.
        name: of the argument, for the error.
        least, most: the range allowed, both ends included.

    Raises:
        TriternError: it is a bool, a float, a string or another type; or it lies outside the range.
    """
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TriternError(
            f"{name} must be a whole number, {allowed}; received {value!r} ({type(value).__name__})"
        ) from None
    if number < least or (most is not None and number > most):
        raise TriternError(f"{name} must be {allowed}; received {number}")
    return number
