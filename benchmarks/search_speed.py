"""Speeds of embed and search: whole and by stage, against the pipeline written by hand, at any scale."""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import search_sets
from search_sets import SearchSet, spread

SCALE_ROWS = 100
"""Measurements of the resident size that are kept of a build."""


def seconds(start: float) -> float:
    """Since ``start``, all work of a GPU included."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_hand(model: Any, texts: list[str]) -> tuple[np.ndarray, dict[str, float]]:
    """encode_document with its defaults and an exact faiss index; the vectors and the stages' seconds."""
    import faiss

    start = time.perf_counter()
    vectors = model.encode_document(texts, show_progress_bar=False)
    encoding = seconds(start)
    index = faiss.IndexFlatIP(vectors.shape[1])
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(vectors)
    return vectors, {"embed": encoding, "total": seconds(start)}


def with_tritern(model: Any, texts: list[str]) -> tuple[np.ndarray, dict[str, float]]:
    """The same with tritern.search, which also keeps texts, ids and vectors on disk."""
    from tritern.search import SearchIndex, embed

    start = time.perf_counter()
    embed(model, texts, task="document")
    embedding = seconds(start)
    start = time.perf_counter()
    with SearchIndex.build(None, model, texts, show_progress_bar=False) as index:
        total = seconds(start)
        return np.array(index.vectors), {"embed": embedding, "total": total}


PIPELINES = {"by hand": by_hand, "tritern": with_tritern}


def throughput(
    models: Mapping[str, Any], sets: Sequence[SearchSet], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Texts per second of embed + add: a row for every arm. Arms and pipelines take turns."""
    texts = [t for one in sets for t in one.documents]
    random.Random(options.seed).shuffle(texts)
    texts = texts[: options.texts]
    times: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    vectors: dict[tuple[str, str], np.ndarray] = {}
    for _ in range(options.repeat + 1):
        for label, model in models.items():
            for name, pipeline in PIPELINES.items():
                vectors[label, name], found = pipeline(model, texts)
                times[label, name].append(found)
    for label in models:
        rates = {
            (name, stage): spread([len(texts) / t[stage] for t in times[label, name][1:]])
            for name in PIPELINES
            for stage in ("total", "embed")
        }
        ratios = [
            hand["total"] / ours["total"]
            for hand, ours in zip(times[label, "by hand"][1:], times[label, "tritern"][1:])
        ]
        yield {
            "arm": label,
            "texts": len(texts),
            "texts_per_second": rates["tritern", "total"],
            "embed_only": rates["tritern", "embed"],
            "by_hand": rates["by hand", "total"],
            "by_hand_embed_only": rates["by hand", "embed"],
            "ratio": spread(ratios),
            **agreement(vectors[label, "tritern"], vectors[label, "by hand"]),
        }


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How equal vectors [n, width] of the same texts are, and the ten nearest texts of a text."""
    theirs = theirs / np.maximum(np.linalg.norm(theirs, axis=1, keepdims=True), 1e-12)
    nearest = [np.argsort(-(v[:500] @ v.T), axis=1, kind="stable") for v in (ours, theirs)]
    return {
        "largest_difference": float(np.abs(ours - theirs).max()),
        "smallest_cosine": float((ours * theirs).sum(1).min()),
        "same_top10": search_sets.overlap(nearest[0], nearest[1], 10),
    }


def latency(
    indexes: Mapping[tuple[str, str], Any],
    models: Mapping[str, Any],
    queries: list[str],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Queries per second and percentiles of embed + search at every batch size, and of the stages apart.

    Args:
        indexes: SearchIndex by (arm, kind).
        models: sentence-transformer by arm.
        queries: repeated in order when there are too few.
        options: batches, repeat, seed.
    """
    generator = random.Random(options.seed)
    for batch in options.batches:
        calls = max(options.repeat, min(20 * options.repeat, 512 // batch))
        times: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
        for call in range(-1, calls):
            texts = generator.choices(queries, k=batch)
            for (label, kind), index in indexes.items():
                found = one_search(index, models[label], texts)
                if call >= 0:  # the one before warms up
                    times[label, kind].append(found)
        for (label, kind), index in indexes.items():
            stages = {name: [1e3 * t[name] for t in times[label, kind]] for name in times[label, kind][0]}
            yield {
                "arm": label,
                "kind": kind,
                "rows": len(index),
                "batch": batch,
                "calls": calls,
                "queries_per_second": batch * 1e3 / float(np.median(stages["total"])),
                "ms": {name: spread(values, 50, 99) for name, values in stages.items()},
            }


def one_search(index: Any, model: Any, texts: list[str]) -> dict[str, float]:
    """Seconds of a search from texts to hits with texts, and of its stages done one by one."""
    from tritern.search import embed

    start = time.perf_counter()
    index.search(texts, 10)
    total = seconds(start)
    start = time.perf_counter()
    vectors = embed(model, texts, task="query")
    embedding = seconds(start)
    start = time.perf_counter()
    scores, rows = index.search_vectors(vectors, 10)
    searching = seconds(start)
    start = time.perf_counter()
    index.hits(scores, rows)
    return {"total": total, "embed": embedding, "search": searching, "lookup": seconds(start)}


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


def scale(
    models: Mapping[str, Any], one: SearchSet, options: argparse.Namespace, folder: Path
) -> Iterator[dict[str, Any]]:
    """Build and search ``options.scale`` rows of real texts varied by templates: speed and memory alone."""
    from tritern.search import SearchIndex

    for label, model in models.items():
        for kind in options.kinds:
            resident = Resident()
            before = psutil.Process().memory_info().rss / 1e6
            texts = resident.count(search_sets.varied(one.documents, options.scale))
            resident.start()
            start = time.perf_counter()
            try:
                index = SearchIndex.build(folder / f"{label} {kind}", model, texts, kind=kind)
            finally:
                memory = resident.stop()
            building = time.perf_counter() - start
            with index:
                latencies = list(latency({(label, kind): index}, models, one.queries, options))
                yield {
                    "arm": label,
                    "kind": kind,
                    "factory": index.factory,
                    "rows": len(index),
                    "texts": f"{len(one.documents):,} real texts of {one.name}, the rest varied by templates",
                    "seconds": building,
                    "texts_per_second": len(index) / building,
                    "resident_before_mb": before,
                    "resident": memory,
                    "bytes": index.bytes,
                    "gpus": index.gpus,
                    "latency": latencies,
                }
