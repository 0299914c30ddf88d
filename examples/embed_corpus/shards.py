"""The folder of shards: which files they hold, and the index that is built from them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

BEGUN, DONE = "_embedding.json", "_embedded.json"
"""These files lie beside the parts. The first says how the parts are being made, the second
how they were made.

Parquet readers skip names that start with _.
"""
FILES = "_files.json"
"""This file lies in a part. It lists the part's files and their sizes."""


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Keep how the parts are made; refuse to go on in another way once there are some."""
    file = folder / BEGUN
    if not any(folder.glob("part-*")):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan, indent=1))
    before = json.loads(file.read_text())
    if other := [name for name in plan if plan[name] != before.get(name)]:
        raise SystemExit(
            f"--output {folder} was begun with other {', '.join(other)}: name a new folder, or delete it"
        )


def embedded(folder: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Files in the parts that are there, with their sizes; refuses files that are not the same any more."""
    there: dict[str, int] = {}
    for part in folder.glob("part-*"):
        there |= json.loads((part / FILES).read_text())
    if changed := [file for file in there if sizes.get(file) != there[file]]:
        what = "has another size now" if changed[0] in sizes else "is not among the texts now"
        raise SystemExit(f"{changed[0]} is embedded in {folder}, and {what}: name a new folder")
    return there


def parts_of(sizes: dict[str, int], size: float) -> list[list[str]]:
    """Files in their order, so many together that they have ``size`` bytes or, but for one alone, less."""
    parts: list[list[str]] = []
    room = 0.0
    for file in sizes:
        if not parts or sizes[file] > room:
            parts.append([])
            room = size
        parts[-1].append(file)
        room -= sizes[file]
    return parts


def shards_of(folder: Path) -> list[Path]:
    """The shards of complete parts, in the order of the corpus."""
    return sorted(folder.glob("part-*/*.parquet"))


def count(folder: Path) -> int:
    """Rows of the shards."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in shards_of(folder))


def index_shards(model: SentenceTransformer, args: argparse.Namespace) -> None:
    """Build the index from the shards; the model is needed for its fingerprint and for queries."""
    from tritern import TriternError
    from tritern.search import SearchIndex

    try:
        batches = rows(Path(args.output))
        ids, texts, vectors = next(batches, ([], [], None))
        if vectors is None:
            raise SystemExit(f"--output {args.output} holds no texts: there is nothing to index")
        # an index is never empty, so the first text is embedded again; kinds are trained on all, at the end
        with SearchIndex.build(args.index, model, texts[:1], ids[:1]) as index:
            index.add(texts[1:], ids[1:], vectors=vectors[1:])
            for ids, texts, vectors in batches:
                index.add(texts, ids, vectors=vectors)
                print(f"\r{len(index):,} texts", end="", flush=True)
            if args.kind != index.kind:
                index.reindex(args.kind)
            print(f"\r{len(index):,} texts in {args.index} ({index.factory})")
    except TriternError as error:
        raise SystemExit(f"error: {error}") from None


def rows(folder: Path) -> Iterator[tuple[list[str], list[str], np.ndarray]]:
    """Ids, texts and vectors of the shards, so many at a time as a shard has at least."""
    import pyarrow.parquet as pq

    for file in shards_of(folder):
        for batch in pq.ParquetFile(file).iter_batches(100_000):
            vectors = batch.column("vector").flatten().to_numpy().reshape(batch.num_rows, -1)
            yield batch.column("id").to_pylist(), batch.column("text").to_pylist(), vectors
