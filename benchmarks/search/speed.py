"""Speeds of embed and search: whole and by stage, against the pipeline written by hand, at any scale."""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
import psutil
from search import inputs
from search.inputs import TEACHER, SearchSet, spread
from search.resident import Resident
from search.time_limit import Limit, Pace


def seconds(start: float) -> float:
    """Since ``start``, all work of a GPU included."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_hand(model: Any, texts: list[str], batch: int = 32) -> tuple[np.ndarray, dict[str, float]]:
    """encode_document and an exact faiss index, on GPUs if faiss has any; vectors and stages' seconds."""
    import faiss

    start = time.perf_counter()
    vectors = model.encode_document(texts, batch_size=batch, show_progress_bar=False)
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


def paces(models: Mapping[str, Any], texts: list[str], batches: Sequence[int]) -> dict[str, Pace]:
    """The pace of every model, on a part of the texts."""
    found = {}
    for label, model in models.items():
        hand = {n: _pace(lambda part, n=n, m=model: by_hand(m, part, n), texts) for n in batches}
        batch = min(hand, key=lambda n: hand[n])
        found[label] = Pace(hand[batch], _pace(lambda part, m=model: with_tritern(m, part), texts), batch)
    return found


def _pace(pipeline: Callable[[list[str]], tuple[Any, dict[str, float]]], texts: list[str]) -> float:
    """Seconds a character: of 4 texts, and of four times as many while that takes less than half a second;
    each time after a run to warm up.
    """
    count = 4
    while True:
        part = texts[:count]
        seconds_of_it = [pipeline(part)[1]["total"] for _ in range(2)][-1]
        if seconds_of_it > 0.5 or count >= len(texts):
            return seconds_of_it / sum(map(len, part))
        count *= 4


def pace_of(models: Mapping[str, Any], texts: list[str], device: str, limit: Limit) -> dict[str, Pace]:
    """Of a sample, where time is limited or the best batch size is looked for."""
    if device == "cuda":
        return paces(models, texts[:2048], (32, 128, 512))
    if math.isinf(limit.left()):
        return {label: Pace(0.0, 0.0, 32) for label in models}
    return paces(models, texts[:256], (32,))


def mixed(sets: Sequence[SearchSet], seed: int) -> list[str]:
    """The documents of all sets, shuffled."""
    texts = [t for one in sets for t in one.documents]
    random.Random(seed).shuffle(texts)
    return texts


def throughput(
    models: Mapping[str, Any],
    texts: list[str],
    options: argparse.Namespace,
    pace: Mapping[str, Pace],
    limit: Limit,
) -> Iterator[list[dict[str, Any]]]:
    """Texts per second of embed + add: after each round but the first the rows of all rounds so far, one for
    every arm. Arms and pipelines take turns. Half of what is left is for it, or two rounds.
    """
    end = time.perf_counter() + limit.left(0.5)
    times: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    vectors: dict[tuple[str, str], np.ndarray] = {}
    baseline = next(label for label in ("fp16", TEACHER, *models) if label in models)
    for turn in range(options.repeat + 1):
        for label, model in models.items():
            made = by_hand(model, texts, pace[label].batch), with_tritern(model, texts)
            for name, (vectors[label, name], found) in zip(("by hand", "tritern"), made):
                if turn:
                    times[label, name].append(found)
        if turn:
            yield [_row(label, times, vectors, len(texts), baseline, pace[label].batch) for label in models]
            if time.perf_counter() > end:
                return


def _row(
    label: str,
    times: Mapping[tuple[str, str], list[dict[str, float]]],
    vectors: Mapping[tuple[str, str], np.ndarray],
    texts: int,
    baseline: str,
    batch: int,
) -> dict[str, Any]:
    ours, hand, base = times[label, "tritern"], times[label, "by hand"], times[baseline, "by hand"]
    return {
        "arm": label,
        "texts": texts,
        "rounds": len(ours),
        "texts_per_second": spread([texts / t["total"] for t in ours]),
        "embed_only": spread([texts / t["embed"] for t in ours]),
        "by_hand": spread([texts / t["total"] for t in hand]),
        "by_hand_embed_only": spread([texts / t["embed"] for t in hand]),
        "by_hand_batch_size": batch,
        "ratio": spread([a["total"] / b["total"] for a, b in zip(hand, ours)]),
        "baseline": f"{baseline} by hand",
        "over_baseline": spread([a["total"] / b["total"] for a, b in zip(base, ours)]),
        **agreement(vectors[label, "tritern"], vectors[label, "by hand"]),
    }


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How equal vectors [n, width] of the same texts are, and the ten nearest texts of a text."""
    theirs = theirs / np.maximum(np.linalg.norm(theirs, axis=1, keepdims=True), 1e-12)
    nearest = [np.argsort(-(v[:500] @ v.T), axis=1, kind="stable") for v in (ours, theirs)]
    return {
        "largest_difference": float(np.abs(ours - theirs).max()),
        "smallest_cosine": float((ours * theirs).sum(1).min()),
        "same_top10": inputs.overlap(nearest[0], nearest[1], 10),
    }


def latency(
    indexes: Mapping[tuple[str, str], Any],
    models: Mapping[str, Any],
    queries: list[str],
    options: argparse.Namespace,
    limit: Limit,
) -> Iterator[dict[str, Any]]:
    """Queries per second and percentiles of embed + search at every batch size, and of the stages apart.

    Args:
        indexes: SearchIndex by (arm, kind).
        models: sentence-transformer by arm.
        queries: repeated in order when there are too few.
        options: batches, repeat, seed.
        limit: a batch size gets its part of a third of what is left, or one call.
    """
    generator = random.Random(options.seed)
    for number, batch in enumerate(options.batches):
        end = time.perf_counter() + limit.left(1 / 3) / (len(options.batches) - number)
        calls = max(options.repeat, min(20 * options.repeat, 512 // batch))
        times: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
        for call in range(-1, calls):
            if call >= 1 and time.perf_counter() > end:
                break
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
                "calls": len(stages["total"]),
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


def scale(
    models: Mapping[str, Any],
    one: SearchSet,
    options: argparse.Namespace,
    folder: Path,
    limit: Limit,
    pace: Mapping[str, Pace],
) -> Iterator[dict[str, Any]]:
    """Build and search ``options.scale`` rows of real texts varied by templates: speed and memory alone. As
    many rows as all arms can build in two thirds of what is left, at least those of the set.
    """
    from tritern.search import SearchIndex

    each = sum(pace[label].tritern for label in models) * np.mean([len(text) for text in one.documents])
    affordable = limit.left(2 / 3) / max(float(each) * len(options.kinds), 1e-9)
    count = int(min(options.scale, max(len(one.documents), affordable)))
    for label, model in models.items():
        for kind in options.kinds:
            resident = Resident()
            before = psutil.Process().memory_info().rss / 1e6
            texts = resident.count(inputs.varied(one.documents, count))
            resident.start()
            start = time.perf_counter()
            try:
                index = SearchIndex.build(folder / f"{label} {kind}", model, texts, kind=kind)
            finally:
                memory = resident.stop()
            building = time.perf_counter() - start
            with index:
                latencies = list(latency({(label, kind): index}, models, one.queries, options, limit))
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
