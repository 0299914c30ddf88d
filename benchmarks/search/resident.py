"""The memory of this process while it works."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psutil

SCALE_ROWS = 100
"""Measurements of the resident size that are kept of a build."""


class Resident(threading.Thread):
    """The resident size of this process while texts are taken, read five times a second.

    Attributes:
        rows: (texts taken, MB resident, MB of them that are pages of files).
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.taken, self.rows, self._done = 0, [], threading.Event()

    def count(self, texts: Iterator[str]) -> Iterator[str]:
        """The texts, counted as they are taken."""
        for text in texts:
            self.taken += 1
            yield text

    def run(self) -> None:
        """Measure until ``stop``, and once more then."""
        process = psutil.Process()
        done = False
        while not done:
            done = self._done.wait(0.2)
            memory = process.memory_info()
            self.rows.append((self.taken, memory.rss / 1e6, getattr(memory, "shared", 0) / 1e6))

    def stop(self) -> dict[str, Any]:
        """Highest size, and at most ``SCALE_ROWS`` of the measurements."""
        self._done.set()
        self.join()
        kept = self.rows[:: len(self.rows) // SCALE_ROWS + 1]
        return {"peak_mb": max(r[1] for r in self.rows), "samples": kept}
