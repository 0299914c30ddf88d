"""The library's exception types."""

from __future__ import annotations


class TriternError(ValueError):
    """Something about the model, an argument or the environment does not allow what was asked for."""


class CheckpointError(TriternError):
    """A saved ternary model is truncated, altered or of an unknown format."""
