"""What a search benchmark has time for, by the pace of a small sample."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
from search import inputs
from search.inputs import SearchSet

FEWEST = 500
"""Documents of a set that is shortened to end in time; none if there is no time for so many."""


class Limit:
    """The time that a run has; ``math.inf`` minutes are no limit."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes

    def left(self, share: float = 1.0) -> float:
        """Seconds of it, or of a share of what is left."""
        return share * max(0.0, self.end - time.perf_counter())

    def affords(self, texts: Sequence[str], seconds_a_character: float, share: float) -> int:
        """How many of the texts, from the first one on, fit into a share of what is left."""
        ends = seconds_a_character * np.cumsum([len(text) for text in texts])
        return int(np.searchsorted(ends, self.left(share), side="right"))


class Pace(NamedTuple):
    """Seconds a character of a small sample: by hand with its best batch size, and by tritern.search."""

    by_hand: float
    tritern: float
    batch: int


def in_time(sets: list[SearchSet], limit: Limit, pace: float, left_out: list[str]) -> Iterator[SearchSet]:
    """Sets, smallest first where time is limited, each with as many documents as there is time for.

    Args:
        sets: all of them.
        limit: of the run.
        pace: seconds that all arms take for a character; after a set it is what that one took.
        left_out: gets the names of those that there is no time for.
    """
    if math.isinf(limit.left()):
        yield from sets
        return
    for one in sorted(sets, key=lambda one: sum(map(len, one.documents))):
        count = limit.affords(one.documents, 1.2 * pace, 1.0)
        if count < min(FEWEST, len(one.documents)):
            print(f"left out, no time: {one.name}")
            left_out.append(one.name)
            continue
        short, start = inputs.shortened(one, count), limit.left()
        yield short
        pace = (start - limit.left()) / sum(map(len, short.documents))
