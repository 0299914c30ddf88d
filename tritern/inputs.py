"""Checks of users' arguments: texts, other iterables, numbers, vectors, folders. All public functions
use these.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import numpy as np
from torch import nn

from .errors import TriternError

Item = TypeVar("Item")


def many(values: Iterable[Item], name: str) -> Iterable[Item]:
    """``values``, if they are an iterable of single things.

    Args:
        values: a user's argument.
        name: of that argument, for the error.

    Raises:
        TriternError: a string, bytes, a mapping, a table, or not an iterable.
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
    """Refuse texts that have no meaningful vector.

    Args:
        texts: they should be strings.
        first: number of the first text, for the error.
        name: of the argument, a plural.
        empty: accept empty strings and white space.

    Raises:
        TriternError: a text is not a string, is empty, or holds lone surrogates. The error names its number.
    """
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            hint = " (decode it, such as with text.decode('utf-8'))" if isinstance(text, bytes) else ""
            raise TriternError(f"{name} must be strings; number {number} is {type(text).__name__}{hint}")
        if not empty and not text.strip():
            raise TriternError(f"{name}: number {number} is empty and has no meaningful vector; leave it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TriternError(
                f"{name}: number {number} holds an invalid character ({text[:40]!a}): read the file as "
                "UTF-8, if necessary with errors='replace'"
            ) from None


def check_model(model: Any, name: str = "model") -> None:
    """Refuse anything but a model.

    Args:
        model: it should be an ``nn.Module``.
        name: of the argument, for the error.

    Raises:
        TriternError: a model's name or folder, its class, or another type.
    """
    if isinstance(model, nn.Module):
        return
    allowed = f"{name} must be a torch.nn.Module or a SentenceTransformer"
    if isinstance(model, (str, PathLike)):
        called = repr(str(model))
        raise TriternError(
            f"{allowed}; received the name {called}: load it first, with SentenceTransformer({called}), or "
            f"tritern.load({called}) if it is ternary"
        )
    if isinstance(model, type):
        raise TriternError(f"{allowed}; received the class {model.__name__}: make a model of it first")
    raise TriternError(f"{allowed}; received {type(model).__name__}")


def whole_number(value: Any, name: str, least: int, most: int | None = None) -> int:
    """``value`` as an int.

    Args:
        value: an int or an equivalent, such as a NumPy integer.
        name: of the argument, for the error.
        least, most: the range allowed, both ends included.

    Raises:
        TriternError: a bool, a float, a string or another type; a number outside the range.
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


def number(value: Any, name: str) -> float:
    """``value`` as a float.

    Raises:
        TriternError: a bool, a string or another type; NaN or infinity.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TriternError(f"{name} must be a number; received {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise TriternError(f"{name} must be finite; received {value!r}")
    return float(value)


def true_or_false(value: Any, name: str) -> bool:
    """``value`` as a bool.

    Args:
        value: a bool, or NumPy's.
        name: of the argument, for the error.

    Raises:
        TriternError: another type. (As a condition, even the string "False" would be true.)
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TriternError(f"{name} must be True or False; received {value!r} ({type(value).__name__})")
    return bool(value)


def check_vectors(vectors: Any, name: str, count: int, first: int = 0, *, zeros: bool = False) -> None:
    """Refuse an array that does not hold ``count`` vectors with a direction each.

    Args:
        vectors: it should be a NumPy array of floats or integers [count, width].
        name: of the argument, for the error.
        count: required number of vectors.
        first: number of the first vector, for the error.
        zeros: accept vectors of zeros, though they have no direction.

    Raises:
        TriternError: another type, dtype or shape; a vector that is not finite in float32, or all zeros. The
            error names its number.
    """
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind not in "fiu":
        kind = f"an array of {vectors.dtype}" if isinstance(vectors, np.ndarray) else type(vectors).__name__
        raise TriternError(f"{name} must be a NumPy array of numbers; received {kind}")
    if vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
        raise TriternError(
            f"{name} must have shape [{count}, width], one row per text; received {list(vectors.shape)}"
        )
    with np.errstate(over="ignore"):
        vectors = vectors.astype(np.float32, copy=False)
    for wrong, what in (
        (~np.isfinite(vectors).all(1), "holds NaN or infinity (in float32)"),
        (~vectors.any(1) & (not zeros), "is all zeros: it has no direction"),
    ):
        if wrong.any():
            raise TriternError(f"{name}: the vector number {first + int(wrong.argmax())} {what}")


def check_folder(folder: Any, name: str) -> Path:
    """Refuse a folder that cannot be made or written, before the work starts. Nothing is made.

    Raises:
        TriternError: not a path; the path is a file or a dead link; the folder cannot be written.
    """
    if not isinstance(folder, (str, PathLike)) or not str(folder):
        raise TriternError(f"{name} must be the name of a folder; received {folder!r}")
    path = Path(folder)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # a name too long, a null character
        why = getattr(error, "strerror", None) or error
        raise TriternError(f"{name} must be the name of a folder; received {folder!r}: {why}") from None
    there = next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), Path("/"))
    if there.is_symlink() and not there.exists():
        raise TriternError(f"{name} must be a folder; {there} is a link to nothing: name another")
    if not there.is_dir():
        raise TriternError(f"{name} must be a folder; {there} is a file: name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TriternError(f"{name}: no permission to write {path} in {there}: name another, or allow it")
    try:
        with TemporaryFile(dir=there):  # a permission is not enough, for example in /proc
            pass
    except OSError as error:
        raise TriternError(
            f"{name}: cannot write in {there} ({error.strerror}): name another folder than {path}"
        ) from error
    return path


def check_file(file: Any, name: str) -> Path:
    """Refuse a file that cannot be made or written, before the work starts. Nothing is made.

    Raises:
        TriternError: not a path; the path is a folder; its folder is missing or cannot be written.
    """
    if not isinstance(file, (str, PathLike)) or not str(file):
        raise TriternError(f"{name} must be the name of a file; received {file!r}")
    path = Path(file)
    if path.is_dir():
        raise TriternError(f"{name} must be a file; {path} is a folder: name a file in it")
    if not path.parent.exists():
        raise TriternError(f"{name}: the folder {path.parent} does not exist: make it, or name another")
    check_folder(path.parent, f"the folder of {name}")
    return path


def near(name: str, known: Iterable[str]) -> list[str]:
    """At most four known names that a user may have meant: first those that contain it, then similar ones."""
    known = list(known)
    holding = sorted((k for k in known if name in k), key=len)
    return list(dict.fromkeys([*holding, *difflib.get_close_matches(name, known, 3)]))[:4]


def named(name: str, known: Iterable[str]) -> str:
    """An unknown name with the known names it may stand for, for an error."""
    meant = near(name, known)
    return f"{name} (did you mean {' or '.join(meant)}?)" if meant else name
