"""A random sample of texts. Files are often sorted by source, so their first lines come from one source."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

POOL = 100_000
"""A sample is drawn from this many texts of a file. That is enough, and data sets may have no end."""


def drawn(texts: Sequence[str], count: int, seed: int = 0) -> list[int]:
    """Numbers of ``count`` different texts, or of all if there are fewer, in ascending order.

    Each text has a lot that depends on the text and the seed; the lowest lots win. So the order of the texts
    does not matter. A text that is drawn from all texts is also drawn from any part of them that holds it.

    Args:
        texts: any strings that UTF-8 can encode. The first of equal texts counts.
        count: number of texts to draw.
        seed: of the lots.
    """
    first = {text: len(texts) - 1 - i for i, text in enumerate(reversed(texts))}

    def lot(number: int) -> bytes:
        return hashlib.blake2b(f"{seed} {texts[number]}".encode(), digest_size=16).digest()

    return sorted(heapq.nsmallest(count, first.values(), key=lot))
