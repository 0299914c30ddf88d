"""Some of many texts, chosen by chance: files are often sorted by source, and their heads hold one source."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

POOL = 100_000
"""Texts of a file that a sample is drawn from: it says enough, and data sets may have no end."""


def drawn(texts: Sequence[str], count: int, seed: int = 0) -> list[int]:
    """Numbers of ``count`` different texts, or of all there are, in ascending order.

    Each text has a lot that follows from it and the seed, and the lowest lots win. So the order of the texts
    does not matter, and what is drawn from a part of them is not drawn by chance anew: a text that is drawn
    from all is also drawn from any part that holds it.

    Args:
        texts: any strings that UTF-8 can encode. Of equal ones, the first counts.
        count: how many.
        seed: of the lots.
    """
    first = {text: len(texts) - 1 - i for i, text in enumerate(reversed(texts))}

    def lot(number: int) -> bytes:
        return hashlib.blake2b(f"{seed} {texts[number]}".encode(), digest_size=16).digest()

    return sorted(heapq.nsmallest(count, first.values(), key=lot))
