"""Arguments of ``SearchIndex``, checked and completed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TriternError
from ..inputs import true_or_false, whole_number
from . import kinds

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def length_of(texts: Iterable[str]) -> int | None:
    """The number of texts, if known."""
    return len(texts) if isinstance(texts, Sized) else None


def folder_path(folder: str | Path) -> Path:
    """The folder of an index as a Path."""
    if not isinstance(folder, (str, Path)):
        raise TriternError(f"folder must be a string or a Path; received {type(folder).__name__}")
    if not str(folder):
        raise TriternError("folder must be the name of a folder; received '': name '.' for the working one")
    return Path(folder)


def progress_shown(show_progress_bar: bool | None) -> bool:
    """Whether to show a bar: by default, whenever ``encode`` shows one."""
    if show_progress_bar is not None:
        return true_or_false(show_progress_bar, "show_progress_bar")
    from sentence_transformers import SentenceTransformer

    of_encode = logging.getLogger(SentenceTransformer.__module__)
    return of_encode.getEffectiveLevel() in (logging.INFO, logging.DEBUG)


def gpu_count(gpus: int | None, kind: str, model: SentenceTransformer) -> int:
    """The number of GPUs to use: the wanted number, or all if the model is on one."""
    faiss, on_gpu = kinds.import_faiss(), kinds.kind_of(kind, None).on_gpu
    found = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if gpus is None:  # faiss may have no GPU form of a factory string's index
        return found if model.device.type == "cuda" and on_gpu and kind in kinds.KINDS else 0
    gpus = whole_number(gpus, "gpus", 0)
    if gpus > found:
        raise TriternError(f"gpus must be 0 to {found}, all that faiss sees; received {gpus}")
    if gpus and not on_gpu:
        names = ", ".join(name for name, other in kinds.KINDS.items() if other.on_gpu)
        raise TriternError(f"gpus must be 0 for kind {kind!r}: faiss has {names} only; received {gpus}")
    return gpus
