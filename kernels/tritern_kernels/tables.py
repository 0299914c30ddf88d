"""The choice of a configuration from tables of measured ones: the package's and the user's.

``configs/<gpu>.json`` comes with the package; ``tune`` writes ``<gpu>.json`` to ``user_folder()``. A GPU uses
entries from the tables of its own name and of its sisters. A sister has the same number of multiprocessors
and the same compute capability, such as an H100 and an H200. For one shape a GPU's own entry comes before a
sister's, and the user's before the package's.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, get_args

from .config import MOST_TOKENS, KernelConfig, Mode, bucket, formula

CONFIG_DIR = Path(__file__).parent / "configs"
CACHE_VARIABLE = "TRITERN_CACHE"
"""Environment variable that names the folder of tritern's cache."""


@dataclass(frozen=True)
class TableEntry:
    """A measured choice for one shape."""

    mode: Mode
    M: int
    N: int
    K: int
    config: KernelConfig

    @property
    def shape(self) -> tuple[Mode, int, int, int]:
        """The shape that the choice is for."""
        return self.mode, self.M, self.N, self.K


def user_folder() -> Path | None:
    """Folder of the user's tables: ``kernels`` in the first of $TRITERN_CACHE, $XDG_CACHE_HOME/tritern and
    ~/.cache/tritern that is set. None for a user without a home.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen) / "kernels"
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "tritern" / "kernels"
    except RuntimeError:
        return None


def user_table(gpu: str) -> Path:
    """The user's table for a GPU.

    Raises:
        ValueError: the user has no home folder.
    """
    folder = user_folder()
    if folder is None:
        raise ValueError(f"there is no home folder for tables: set {CACHE_VARIABLE} to a folder")
    return folder / f"{gpu_slug(gpu)}.json"


def gpu_slug(name: str) -> str:
    """File name of a GPU's table: 'NVIDIA H200' -> 'h200'."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().removeprefix("nvidia").strip())


def load_table(path: Path) -> tuple[TableEntry, ...]:
    """Read a table: ``{"gpu", "capability", "processors", "triton", "date", "entries": [{"mode", "M", "N",
    "K", "config": {...}}]}``.

    Raises:
        ValueError: the file is not a table, or an entry is invalid. OSError: the file cannot be read.
    """
    return _read(path)[1]


def check_table(path: Path) -> None:
    """Refuse a file that cannot take results, before hours of work.

    Raises:
        ValueError: the file is not a table. OSError: it cannot be written.
    """
    if path.exists():
        load_table(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=path.parent):
        pass


def _read(path: Path) -> tuple[tuple[int | None, int | None], tuple[TableEntry, ...]]:
    """A table's compute capability and number of multiprocessors, if named, and its entries."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(map(_entry, table["entries"]))
        return (table.get("capability"), table.get("processors")), entries
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of kernel configurations: {error!r}. Remove it to use the formula."
        ) from None


def _entry(e: dict[str, Any]) -> TableEntry:
    entry = TableEntry(e["mode"], e["M"], e["N"], e["K"], KernelConfig(**e["config"]))
    values = asdict(entry.config)
    kinds = all(type(values[f.name]) is (bool if f.type == "bool" else int) for f in fields(KernelConfig))
    sizes = all(type(size) is int and size > 0 for size in entry.shape[1:])
    if entry.mode not in get_args(Mode) or not kinds or not sizes:
        raise ValueError(f"an entry is {e}")
    return entry


@cache
def table(gpu: str, capability: int, processors: int) -> tuple[TableEntry, ...]:
    """All entries for a GPU, one per shape.

    Warns:
        UserWarning: a table is damaged or cannot be read. It is left out.
    """
    own = f"{gpu_slug(gpu)}.json"
    of_sister: dict[tuple, TableEntry] = {}
    of_gpu: dict[tuple, TableEntry] = {}
    for path in _files():
        try:
            kind, entries = _read(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"a table of kernel configurations is left out: {error}", stacklevel=2)
            continue
        if path.name == own or kind == (capability, processors):
            (of_gpu if path.name == own else of_sister).update((e.shape, e) for e in entries)
    return tuple((of_sister | of_gpu).values())


def _files() -> list[Path]:
    """All tables, the package's first."""
    folders = [folder for folder in (CONFIG_DIR, user_folder()) if folder and os.access(folder, os.R_OK)]
    return [path for folder in folders for path in sorted(folder.glob("*.json"))]


def nearest(
    entries: tuple[TableEntry, ...], mode: Mode, M: int, N: int, K: int, capability: int, weight_bits: int = 2
) -> KernelConfig | None:
    """The configuration of the closest shape (sum of distances in log2) that is valid for K and such weights.
    Entries were measured with 2-bit weights.
    """

    def distance(e: TableEntry) -> float:
        return abs(math.log2(e.M / M)) + abs(math.log2(e.N / N)) + abs(math.log2(e.K / K))

    usable = [
        e for e in entries if e.mode == mode and e.config.invalid(mode, K, capability, weight_bits) is None
    ]
    best = min(usable, key=distance, default=None)
    return best.config if best is not None and distance(best) <= 2.0 else None


@lru_cache(maxsize=4096)
def _choose(
    mode: Mode, M: int, N: int, K: int, gpu: str, capability: int, processors: int, weight_bits: int
) -> KernelConfig:
    found = nearest(table(gpu, capability, processors), mode, M, N, K, capability, weight_bits)
    found = found or formula(mode, M, N, K, capability, processors, weight_bits)
    return replace(found, split_k=1) if M == MOST_TOKENS else found  # tickets are for M tokens at most


def choose(
    mode: Mode, M: int, N: int, K: int, gpu: str, capability: int, processors: int, weight_bits: int = 2
) -> KernelConfig:
    """Configuration for M tokens. M is rounded up to a power of two from 16 to ``MOST_TOKENS``, so there are
    few kernels.
    """
    return _choose(mode, bucket(M), N, K, gpu, capability, processors, weight_bits)
