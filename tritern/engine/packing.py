"""Texts laid end to end in runs; runs have few sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tritern_kernels.config import QUERY_ROWS

from .tokens import Tokens

SMALLEST, LARGEST = 16, 16384
"""Tokens of the smallest and the largest run. The largest keeps a GPU busy. A longer text gets a size."""
TOKENS_A_TEXT = 8
"""A run holds one text per this many tokens; shorter texts are rare."""


@dataclass(frozen=True)
class Size:
    """Most tokens and texts of a run. All arrays of a run are parts of one int32 array."""

    tokens: int
    texts: int

    @classmethod
    def holding(cls, tokens: int, texts: int) -> Size:
        """The smallest size for these numbers of tokens and texts."""
        least = max(tokens, TOKENS_A_TEXT * texts, SMALLEST)
        most = 1 << (least - 1).bit_length()
        return cls(most, most // TOKENS_A_TEXT)

    @property
    def tiles(self) -> int:
        """Number of blocks of query rows; each block belongs to one text."""
        return self.tokens // QUERY_ROWS + self.texts

    def places(self) -> tuple[slice, slice, slice, slice]:
        """The places of ids, positions, starts of texts and tiles; each starts at a multiple of 16 bytes."""
        ids, positions = slice(self.tokens), slice(self.tokens, 2 * self.tokens)
        starts = slice(2 * self.tokens, 2 * self.tokens + self.texts + 1)
        first = starts.stop + 3 & -4
        return ids, positions, starts, slice(first, first + 3 * self.tiles)

    @property
    def length(self) -> int:
        """Number of int32 values in all."""
        return self.places()[-1].stop


@dataclass(frozen=True)
class Positions:
    """The way a model numbers tokens: from ``first`` on. If ``padding`` is an id, tokens with that id do not
    count and have the position before the first (RoBERTa and its kin).
    """

    first: int = 0
    padding: int | None = None


def runs(lengths: np.ndarray, most: int = LARGEST) -> Iterator[slice]:
    """Divide texts, in their order, into runs of at most ``most`` tokens. A longer text gets its own run."""
    ends = np.cumsum(lengths)
    texts = max(1, most // TOKENS_A_TEXT)
    begin = 0
    while begin < len(lengths):
        before = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, before + most, side="right"))
        end = min(max(end, begin + 1), begin + texts)
        yield slice(begin, end)
        begin = end


def filled(tokens: Tokens, size: Size, positions: Positions, out: np.ndarray) -> None:
    """Write a run's arrays to ``out``, int32 [size.length].

    Positions count from the start of each text. Unused texts start at the end of the last one. Unused tokens
    have id 0 and belong to no text. A tile holds its first row and the start and end of its text.
    """
    ids, places, starts, tiles = (out[part] for part in size.places())
    lengths = tokens.lengths
    total, texts = len(tokens.ids), len(lengths)
    begins = np.zeros(texts + 1, np.int32)
    np.cumsum(lengths, out=begins[1:])
    ids[:total], ids[total:] = tokens.ids, 0
    starts[: texts + 1], starts[texts + 1 :] = begins, total
    places[:total], places[total:] = _positions(tokens, begins, positions), positions.first
    blocks = -(-lengths // QUERY_ROWS)
    count = int(blocks.sum())
    rows = tiles.reshape(-1, 3)
    rows[:count, 1] = np.repeat(begins[:-1], blocks)
    rows[:count, 2] = np.repeat(begins[1:], blocks)
    number = np.arange(count) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    rows[:count, 0] = rows[:count, 1] + QUERY_ROWS * number
    rows[count:] = 0


def _positions(tokens: Tokens, begins: np.ndarray, positions: Positions) -> np.ndarray:
    lengths = tokens.lengths
    if positions.padding is None:
        return np.arange(len(tokens.ids)) - np.repeat(begins[:-1], lengths) + positions.first
    counts = tokens.ids != positions.padding
    so_far = np.concatenate(([0], np.cumsum(counts)))
    own = so_far[1:] - np.repeat(so_far[begins[:-1]], lengths)
    return own * counts + positions.first - 1
