"""Kinds of faiss index by name: make them, put them on GPUs, save them."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TriternError
from ..inputs import whole_number

MIN_ROWS = 1024
"""With fewer rows, trained kinds search exactly: there are too few to train on, and no need."""
GPU_K = 2048
"""Most results per query of faiss on GPUs."""
MOST_RESCORE = 1_000_000
TRAIN_ROWS = 100_000
ROWS_A_LIST = 64
"""Most vectors to train on, in all or per inverted list; faiss wants 39 per list and uses up to 256."""


@dataclass(frozen=True)
class Kind:
    """A faiss index and how it is used.

    Attributes:
        factory: (rows, width) -> string for ``faiss.index_factory``; None: no index; the vectors themselves
            are compared.
        rescore: number of candidates from the index per hit; their stored vectors are compared.
        on_gpu: whether faiss has it for GPUs.
    """

    factory: Callable[[int, int], str | None]
    rescore: int
    on_gpu: bool


def _lists(rows: int) -> int:
    """Number of inverted lists: about 4 sqrt(rows), a power of two, with at least 39 vectors per list."""
    return 2 ** max(0, int(math.log2(max(1.0, min(4 * math.sqrt(rows), rows / 39)))))


def _pieces(width: int) -> int:
    """Number of pieces in product quantization: one byte per piece of 8 dimensions or more; faiss has these
    numbers on GPUs.
    """
    known = (96, 64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1)
    return next(m for m in known if m <= max(1, width // 8) and width % m == 0)


KINDS = {
    "flat": Kind(lambda rows, width: None, rescore=1, on_gpu=True),
    "ivf-flat": Kind(lambda rows, width: f"IVF{_lists(rows)},Flat", rescore=1, on_gpu=True),
    "ivf-pq": Kind(lambda rows, width: f"IVF{_lists(rows)},PQ{_pieces(width)}", rescore=8, on_gpu=True),
    "hnsw": Kind(lambda rows, width: "HNSW32", rescore=1, on_gpu=False),
    "int8": Kind(lambda rows, width: "SQ8", rescore=2, on_gpu=False),
    "binary": Kind(lambda rows, width: "LSH", rescore=16, on_gpu=False),
}
"""Kinds of index by name: all vectors compared; inverted lists; inverted lists of product-quantized vectors;
a graph; one byte per dimension; one bit per dimension (its sign)."""


def kind_of(name: str, rescore: int | None) -> Kind:
    """A kind by its name or by a string for ``faiss.index_factory``.

    Raises:
        TriternError: ``name`` is neither, or ``rescore`` is not a whole number from 1 to ``MOST_RESCORE``.
    """
    if not (isinstance(name, str) and name.isascii() and name.isprintable() and name.strip()):
        raise TriternError(
            f"kind must be one of {', '.join(KINDS)} or a string for faiss.index_factory; received {name!r}"
        )
    kind = KINDS.get(name) or Kind(lambda rows, width: name, rescore=4, on_gpu=True)
    return kind if rescore is None else replace(kind, rescore=rescore_of(rescore))


def rescore_of(rescore: int | None) -> int | None:
    """``rescore`` as an int; None: that of the kind.

    Raises:
        TriternError: not a whole number from 1 to ``MOST_RESCORE``.
    """
    return None if rescore is None else whole_number(rescore, "rescore", 1, MOST_RESCORE)


def check(name: str, rescore: int | None, width: int | None, similarity: str) -> None:
    """Refuse a kind that cannot be made, before any work."""
    kind = kind_of(name, rescore)
    factory = kind.factory(MIN_ROWS, width or 64)
    if width and factory:
        new_index(factory, width, similarity)
    else:
        import_faiss()


def import_faiss() -> Any:
    """The faiss module, or an error that says what to install."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise TriternError(
            "faiss is missing: pip install 'tritern[search]', or 'tritern[gpu-search]' to search on CUDA GPUs"
        ) from None
    return faiss


def new_index(factory: str, width: int, similarity: str) -> Any:
    """An index of faiss, untrained and empty.

    Raises:
        TriternError: faiss does not know the factory string or cannot make it for this width.
    """
    faiss = import_faiss()
    metrics = [faiss.METRIC_L2] if similarity == "euclidean" else [faiss.METRIC_INNER_PRODUCT]
    if similarity == "cosine":
        metrics.append(faiss.METRIC_L2)  # same order on vectors of length 1; LSH has only this metric
    errors = []
    for metric in metrics:
        try:
            index = faiss.index_factory(width, factory, metric)
            break
        except RuntimeError as error:
            errors.append(error)
    else:
        reason = _reason(errors[0])
        raise TriternError(
            f"kind must be one of {', '.join(KINDS)} or a string for faiss.index_factory; received "
            f"{factory!r} for vectors of width {width} compared by {similarity}: {reason}"
        )
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexNSG)):
        raise TriternError(
            f"kind must not be {factory!r}: faiss cannot add vectors to it step by step; for a graph take "
            "'hnsw'"
        )
    parts: list[Any] = [index, ivf(index), getattr(index, "pq", None)]
    for part in parts:
        if getattr(part, "cp", None) is not None:
            part.cp.min_points_per_centroid = 1  # no warning of few vectors: there are no more
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False  # slow and not used here
    set_parameters(index, default_parameters(index))
    return index


def ivf(index: Any) -> Any:
    """The inverted lists inside an index, if any."""
    faiss = import_faiss()
    return faiss.try_extract_index_ivf(index)


def default_parameters(index: Any) -> str:
    """Set better defaults: faiss' own (nprobe=1, efSearch=16) find too little."""
    if lists := ivf(index):
        return f"nprobe={min(lists.nlist, round(4 * math.sqrt(lists.nlist)))}"
    return "efSearch=64" if hasattr(index, "hnsw") else ""


def set_parameters(index: Any, parameters: str) -> None:
    """Set ``nprobe=16``, ``efSearch=128`` or others of ``faiss.ParameterSpace``, separated by commas."""
    for name, value in (part.strip().split("=", 1) for part in parameters.split(",") if "=" in part):
        # faiss accepts 0 and less, but then finds other rows
        if name.endswith(("nprobe", "efSearch")) and not re.fullmatch("0*[1-9][0-9]*", value):
            raise TriternError(f"{name} must be a whole number, at least 1; received {value!r}")
    faiss = import_faiss()
    space = faiss.GpuParameterSpace() if hasattr(faiss, "GpuParameterSpace") else faiss.ParameterSpace()
    try:
        if parameters:
            space.set_index_parameters(index, parameters)
    except RuntimeError as error:
        raise TriternError(
            f"this index has no parameters {parameters!r} ({_reason(error)}): inverted lists have nprobe=N, "
            "graphs efSearch=N"
        ) from None


def sample(index: Any, rows: int, removed: np.ndarray) -> np.ndarray:
    """Numbers of the rows to train on. The seed is fixed, so the same rows give the same numbers."""
    kept, lists = np.setdiff1d(np.arange(rows), removed, assume_unique=True), ivf(index)
    most = max(TRAIN_ROWS, ROWS_A_LIST * lists.nlist if lists else 0)
    if len(kept) > most:
        kept = np.sort(np.random.default_rng(0).choice(kept, most, replace=False))
    return kept


def train(index: Any, vectors: np.ndarray) -> None:
    """Train on [rows, width], float32.

    Raises:
        TriternError: too few vectors for this kind.
    """
    try:
        index.train(np.ascontiguousarray(vectors, np.float32))
    except RuntimeError as error:
        raise TriternError(
            f"the index cannot be trained on {len(vectors):,} vectors ({_reason(error)}). They are stored: "
            f"reindex them as another kind, such as {', '.join(map(repr, KINDS))}, or with fewer lists"
        ) from None


def add(index: Any, vectors: Any) -> None:
    """Add [rows, width], float32, to a trained index.

    Raises:
        TriternError: faiss cannot add them.
    """
    try:
        index.add(vectors)
    except RuntimeError as error:
        raise TriternError(
            f"faiss cannot add vectors to this index ({_reason(error)}). They are stored: reindex them as "
            f"another kind, such as {', '.join(map(repr, KINDS))}"
        ) from None


def to_gpus(index: Any, gpus: int) -> Any:
    """Clone the index to one GPU, or in shards to several, with faiss; with cuVS if faiss has it."""
    faiss = import_faiss()
    importlib.import_module("faiss.contrib.torch_utils")  # lets faiss use GPU tensors without a copy
    options = faiss.GpuMultipleClonerOptions()
    options.shard = gpus > 1
    if "CUVS" in faiss.get_compile_options():
        options.use_cuvs = True
    options.useFloat16 = hasattr(index, "pq")  # then look-up tables of 96 pieces fit into shared memory
    try:
        return faiss.index_cpu_to_gpus_list(index, co=options, gpus=list(range(gpus)))
    except RuntimeError as error:
        raise TriternError(f"faiss cannot put this index on GPUs ({_reason(error)}): pass gpus=0") from error


def save(index: Any, file: Path, on_gpu: bool) -> None:
    """Replace the file by the index, completely or not at all."""
    faiss = import_faiss()
    index = faiss.index_gpu_to_cpu(index) if on_gpu else index
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        faiss.write_index(index, str(temporary))
        with open(temporary, "r+b") as written:  # Windows flushes only writable files
            os.fsync(written.fileno())
        temporary.replace(file)
    except (OSError, RuntimeError) as error:
        raise TriternError(
            f"{file} cannot be written ({_reason(error)}): free some space and open the "
            "index again. Texts and vectors are kept; this file is made from them"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """faiss' message without the place in its source."""
    return re.sub(r"^.* at \S+:\d+: (Error: )?", "", str(error).strip().splitlines()[-1])
