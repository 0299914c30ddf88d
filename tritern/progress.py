"""How far long work has come, on standard error: a bar on a terminal or in a notebook, lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm
from tqdm.std import tqdm as tqdm_std

SECONDS = 15.0
"""Between two lines. Work that takes less prints none."""


def bar(*args: Any, **settings: Any) -> tqdm_std:
    """A ``tqdm`` for long work.

    On a terminal and in a notebook it draws its bar. Elsewhere, as in logs, it prints a line about every
    ``SECONDS`` with the share done and the time left.

    Args:
        *args, **settings: as of ``tqdm``; ``desc`` and ``unit`` say what is counted.
    """
    if sys.stderr is None:  # a program without a console
        settings["disable"] = True
    return (tqdm if can_redraw() else Lines)(*args, **settings)


def can_redraw() -> bool:
    """Whether a bar can be drawn anew where it stands."""
    return tqdm is not tqdm_asyncio or (sys.stderr is not None and sys.stderr.isatty())


class Lines(tqdm_std):
    """A ``tqdm`` that prints whole lines: one about every ``SECONDS``, and a last one after others."""

    monitor_interval = 0  # no thread: each step looks at the clock

    def __init__(self, *args: Any, **settings: Any) -> None:
        pace = {"mininterval": SECONDS, "delay": SECONDS, "miniters": 0, "leave": False}
        super().__init__(*args, **{**settings, **pace})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line; tqdm calls this, with an empty ``msg`` at the end."""
        self.fp.write(f"{self._line(ended=msg == '')}\n")
        self.fp.flush()
        return False  # nothing to clear

    def _line(self, ended: bool) -> str:
        seconds, done = self.format_dict["elapsed"], self.n - self.initial
        count = f"{self.n:,}" if self.total is None else f"{self.n:,} of {self.total:,}"
        share = f" ({self.n / self.total:.0%})" if self.total else ""
        unit = f"{self.unit.strip().removesuffix('s')}s"
        name = f"{self.desc}: " if self.desc else ""
        line = f"{name}{count} {unit}{share}, {self.format_interval(seconds)} passed"
        if self.total and done and not ended:
            left = seconds / done * (self.total - self.n)
            line += f", about {self.format_interval(left)} left"
        return line
