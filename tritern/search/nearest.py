"""Nearest rows by stored vectors, among all rows or an index's candidates."""

from __future__ import annotations

import numpy as np

from .kinds import import_faiss
from .reading import BLOCK

CANDIDATE_BYTES = 2**27
"""Bytes of candidates' vectors in memory at a time."""


def exact(vectors: np.ndarray, queries: np.ndarray, k: int, similarity: str) -> tuple[np.ndarray, np.ndarray]:
    """Compare all vectors: scores, float32, and rows, int64, each [queries, k], best first.

    Args:
        vectors: [rows, width], float32, at least k rows; may be mapped from a file larger than memory.
        queries: [queries, width], float32.
        similarity: "cosine" (of vectors of length 1), "dot" or "euclidean".
    """
    faiss = import_faiss()
    far = similarity == "euclidean"
    metric = faiss.METRIC_L2 if far else faiss.METRIC_INNER_PRODUCT
    heap = faiss.ResultHeap(len(queries), k, keep_max=not far)
    for first in range(0, len(vectors), BLOCK):
        block = vectors[first : first + BLOCK]
        values, rows = faiss.knn(queries, block, min(k, len(block)), metric)
        heap.add_result(values, rows + first)
    heap.finalize()
    return (-np.sqrt(np.maximum(heap.D, 0)) if far else heap.D), heap.I


def rescored(
    vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray, k: int, similarity: str
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of each query's candidates, by their vectors; shapes as in ``exact``.

    Args:
        rows: [queries, candidates], int64; -1 stands for none and scores -inf.
        vectors, queries, k, similarity: as in ``exact``.
    """
    k = min(k, rows.shape[1])
    scores, best = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    step = max(1, CANDIDATE_BYTES // (4 * rows.shape[1] * vectors.shape[1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        candidates, asked = vectors[rows[part]], queries[part, None]
        if similarity == "euclidean":
            found = -np.linalg.norm(candidates - asked, axis=2)
        else:
            found = np.matmul(asked, candidates.transpose(0, 2, 1))[:, 0]
        found[rows[part] < 0] = -np.inf
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        scores[part] = np.take_along_axis(found, order, 1)
        best[part] = np.take_along_axis(rows[part], order, 1)
    return scores, best
