"""The quickstart's comparison of two models: speed, answers, sizes and what their vectors have in common."""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from tritern import Fidelity, Summary

K = 10  # neighbours compared
SHOWN = 3  # hits printed per query
BATCH = {"cpu": 32, "cuda": 256}
console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 110)
say = console.print


def embed(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """Normalized float32 vectors [len(texts), width]."""
    vectors = np.asarray(model.encode(texts, batch_size=BATCH[model.device.type]), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def embed_timed(
    models: Sequence[SentenceTransformer], texts: list[str], most_seconds: float
) -> tuple[list[np.ndarray], list[float]]:
    """Vectors and sentences a second of each; they take turns, so that other load slows all alike."""
    step = 4 * BATCH[models[0].device.type]
    chunks = [texts[i : i + step] for i in range(0, len(texts), step)]
    vectors, seconds = [[] for _ in models], [0.0 for _ in models]
    for model in models:
        embed(model, chunks[0])  # warm-up
    for chunk in track(chunks, "Embedding", console=console, transient=True, disable=not console.is_terminal):
        for i, model in enumerate(models):
            begin = time.perf_counter()
            vectors[i].append(embed(model, chunk))
            seconds[i] += time.perf_counter() - begin
        if sum(seconds) > most_seconds:
            break
    joined = [np.concatenate(v) for v in vectors]
    return joined, [len(v) / s for v, s in zip(joined, seconds)]


def search(vectors: np.ndarray, queries: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and numbers [len(queries), k] of the k nearest; exact."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)  # pyright: ignore[reportCallIssue]
    return index.search(queries, k)  # pyright: ignore[reportCallIssue]


def sibling_recall(origins: Sequence[str], vectors: np.ndarray) -> float:
    """Of the passages with others from the same docstring, the share that has one among its K nearest."""
    group = np.unique(origins, return_inverse=True)[1]
    nearest = search(vectors, vectors, K + 1)[1]  # the passage itself and K others
    siblings = (group[nearest] == group[:, None]) & (nearest != np.arange(len(group))[:, None])
    return float(siblings.any(axis=1)[np.bincount(group)[group] > 1].mean())


def answers(queries: list[str], texts: list[str], origins: list[str], hits: Sequence[Any]) -> Table:
    """The best hits, (cosines, numbers), of the original and of the ternary model side by side."""
    columns = Column("query", ratio=2), Column("original", ratio=5), Column("ternary", ratio=5)
    table = Table(*columns, show_lines=True, expand=True, caption=f"* also among the original's best {K}")
    for q, query in enumerate(queries):
        cells = [Text(no_wrap=True, overflow="ellipsis") for _ in hits]
        for cell, (scores, ids) in zip(cells, hits):
            for score, i in list(zip(scores[q], ids[q]))[:SHOWN]:
                mark = "*" if cell is cells[1] and i in hits[0][1][q] else " "
                cell.append("\n" if cell else "").append(mark, "bold green").append(f"{score:.2f} ")
                cell.append(origins[i], "cyan").append(f"\n      {texts[i]}", "dim")
        table.add_row(query, *cells)
    return table


def disk_bytes(model: SentenceTransformer) -> int:
    with tempfile.TemporaryDirectory(prefix="tritern-") as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def sizes(models: Sequence[SentenceTransformer], size: Summary) -> dict[str, tuple[int, int]]:
    """Bytes of the original and of the ternary model."""
    rows = {"weights of the ternary layers": (size.linear_bytes_before, size.linear_bytes_after)}
    rows[f"model in memory ({size.dtype})"] = size.model_bytes_before, size.model_bytes_after
    if size.unpacked_bytes:
        besides = size.model_bytes_after + size.unpacked_bytes
        rows["  and codes unpacked for the CPU"] = size.model_bytes_before, besides
    rows["model on disk"] = disk_bytes(models[0]), disk_bytes(models[1])
    halves = [copy.deepcopy(model).half() for model in models]
    rows["model on disk, cast to float16"] = disk_bytes(halves[0]), disk_bytes(halves[1])
    return rows


def compared(
    models: Sequence[SentenceTransformer],
    texts: list[str],
    origins: list[str],
    queries: list[str],
    fidelity: Fidelity,
    before: Fidelity | None,
    most_seconds: float,
) -> tuple[Table, Table]:
    """Original and ternary model search the passages: their answers, and everything in numbers, closeness
    before a distillation among it.
    """
    import tritern

    summary = tritern.summary(models[1])
    vectors, rates = embed_timed(models, texts, most_seconds)
    say(f"{len(vectors[0]):,} passages: original {rates[0]:.0f} a second, ternary {rates[1]:.0f} a second")
    texts, origins = texts[: len(vectors[0])], origins[: len(vectors[0])]
    hits = [search(v, embed(model, queries)) for v, model in zip(vectors, models)]
    common = np.mean([np.isin(a, b).mean() for a, b in zip(hits[1][1], hits[0][1])])
    table = Table("", *(Column(name, justify="right") for name in ("original", "ternary", "ratio")))
    for what, (full, small) in sizes(models, summary).items():
        table.add_row(what, f"{full / 1e6:.1f} MB", f"{small / 1e6:.1f} MB", f"{small / full:.2f}")
    table.add_row("sentences a second", f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.2f}")
    table.add_row("cosine to the original's vectors", "1", f"{fidelity.cosine:.3f}")
    if before:
        table.add_row("  before distillation", "", f"{before.cosine:.3f}")
    table.add_row(f"nearest {K} passages shared", "100.0%", f"{fidelity.overlap:.1%}")
    if before:
        table.add_row("  before distillation", "", f"{before.overlap:.1%}")
    table.add_row(f"top-{K} hits shared, queries: {len(queries)}", "100.0%", f"{common:.1%}")
    if not origins[0].startswith("line "):
        table.caption = "docstring found: the passage finds another one of its own docstring, if there is one"
        table.add_row(f"docstring found in top {K}", *(f"{sibling_recall(origins, v):.1%}" for v in vectors))
    return answers(queries, texts, origins, hits), table
