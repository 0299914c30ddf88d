"""Extend an object's class at run time; copies and pickles keep the extension."""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from functools import cache
from typing import Any


class _Type(ABCMeta):  # sentence-transformers' classes have this metaclass
    """Metaclass of extended classes: they are pickled as the two classes that they consist of."""


class Extended:
    """Base of classes that ``extend`` adds to an object's class."""

    _tritern_base: type
    _tritern_unsaved: tuple[str, ...] = ()
    """Attributes that copies and pickles leave out."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: copies and pickles name its two parts
        reduced: Any = super().__reduce_ex__(protocol)
        state, *rest = reduced[2:]
        state = {name: value for name, value in state.items() if name not in self._tritern_unsaved}
        return _new, (type(self).__mro__[1], self._tritern_base), state, *rest


def _new(kind: type[Extended], base: type) -> Any:
    extended: Any = extended_class(kind, base)
    return extended.__new__(extended)


@cache
def extended_class(kind: type[Extended], base: type) -> type:
    """``base`` extended by ``kind``, under base's name."""
    names = {"__module__": base.__module__, "__doc__": base.__doc__, "_tritern_base": base}
    return _Type(base.__name__, (kind, base), names)


def _reduced(extended: Any) -> Any:
    return extended_class, (extended.__mro__[1], extended._tritern_base)


copyreg.pickle(_Type, _reduced)


def extend(obj: Any, kind: type[Extended]) -> None:
    """Extend an object's class by ``kind``, unless it is already."""
    if not isinstance(obj, kind):
        obj.__class__ = extended_class(kind, type(obj))
