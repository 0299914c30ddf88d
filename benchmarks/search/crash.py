"""Builds an index in a process that is killed at random moments, and looks for what is lost.

    python benchmarks/search/crash.py --texts sentences.txt --rows 1000000 --kills 10 --json crash.json

The texts are those of --texts (by default sentences of Python's documentation), then the same again in
numbered templates: what they say is not measured here. After each kill the same call goes on. The result is
compared with an index built without interruption: ids, texts and vectors must be equal, and the faiss index's
bytes too (not of hnsw, a graph whose making is random). The resident size of the building process is sampled:
texts and vectors go to disk as they come, and it is to stay flat while texts are embedded. --layers N takes
the first N layers of the model only, to be done sooner.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import psutil
import report
from models.encode import packaged_model
from search.inputs import varied

CHILD = "--build-into"
"""The option by which the script starts itself to be killed."""
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""How many shapes' kernels are kept on a CPU; with torch's 1,024 freed memory is split up among them."""


def arguments() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", help="hub name or path of a full-precision model; default: the packaged all-MiniLM-L6-v2")
    add("--layers", type=int, metavar="N", help="keep the first N layers only (default: all)")
    add("--texts", metavar="FILE", help="one text a line; .zst and .gz too (default: Python's documentation)")
    add("--rows", type=int, default=1_000_000, help="default: 1,000,000")
    add("--kind", default="ivf-pq", help="kind of index (default: ivf-pq)")
    add("--kills", type=int, default=10, help="0: the memory alone (default: 10)")
    add("--seed", type=int, default=0, help="of the moments of killing")
    add("--folder", type=Path, help="where to build; default: a temporary folder, deleted afterwards")
    add("--json", type=Path, help="write the results here")
    add(CHILD, type=Path, help=argparse.SUPPRESS)
    return parser


def corpus(options: argparse.Namespace) -> Iterator[str]:
    if options.texts:
        from tritern.distillation import read_texts

        texts = [t for t in read_texts(options.texts, limit=100_000) if t.strip()]
    else:
        from search.inputs import sentences

        texts = sentences().documents
    return varied(texts, options.rows)


def build(options: argparse.Namespace) -> None:
    """What the killed process does: one call, the same each time."""
    from sentence_transformers import SentenceTransformer

    import tritern
    from tritern.search import SearchIndex

    model = SentenceTransformer(options.model or packaged_model(), device="cpu")
    if options.layers:
        inner: Any = model[0]
        inner.auto_model.encoder.layer = inner.auto_model.encoder.layer[: options.layers]
    SearchIndex.build(
        options.build_into, tritern.patch(model), corpus(options), kind=options.kind, show_progress_bar=False
    ).close()


def build_in_a_process(options: argparse.Namespace, folder: Path, kill_after: float | None) -> dict[str, Any]:
    """Build in a process, for so many seconds or to the end; rows written and MB resident over time."""
    command = [sys.executable, __file__, *sys.argv[1:], CHILD, str(folder)]
    start, sizes, first_rows, all_rows = time.monotonic(), [], None, None
    process = subprocess.Popen(command)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory, rows = watched.memory_full_info(), rows_in(folder)
            sizes.append((rows, memory.rss / 1e6, memory.uss / 1e6))
        except psutil.Error:
            break
        now = round(time.monotonic() - start, 1)
        first_rows = now if rows and first_rows is None else first_rows
        all_rows = now if rows == options.rows and all_rows is None else all_rows
        if kill_after is not None and time.monotonic() - start > kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.2)
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the building process ended with {code}")
    return {
        "killed": code != 0,
        "seconds": round(time.monotonic() - start, 1),
        "rows_after": rows_in(folder),
        "seconds_to_first_rows": first_rows,
        "seconds_to_all_rows": all_rows,
        "rows, resident MB, private MB": [list(map(round, size)) for size in sizes[:: len(sizes) // 40 + 1]],
        "peak_resident_mb": round(max(rss for _, rss, _ in sizes)),
        "peak_private_mb": peaks(sizes, options.rows),
    }


def peaks(sizes: Sequence[tuple[int, float, float]], rows: int) -> dict[str, int]:
    """Highest private MB in each tenth of the rows, and after the last of them."""
    found: dict[str, int] = {}
    for written, _, private in sizes:
        tenth = 10 * written // rows
        name = "index" if tenth == 10 else f"{tenth}0 %"
        found[name] = max(found.get(name, 0), round(private))
    return found


def rows_in(folder: Path) -> int:
    """Rows written, asked without disturbing the process that writes."""
    try:
        with closing(
            sqlite3.connect(f"file:{folder / 'rows.sqlite'}?mode=ro", uri=True, timeout=5)
        ) as database:
            return int(database.execute("SELECT value FROM settings WHERE name = 'rows'").fetchone()[0])
    except sqlite3.Error:  # not there yet
        return 0


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def content(folder: Path) -> dict[str, str]:
    """Checksums of the ids and texts in their order, the vectors, and the faiss index."""
    from tritern.search.store import Store

    store, rows = Store(folder), hashlib.sha256()
    store.verify()
    for item in store.items():
        rows.update(repr(item).encode())
    files = {"vectors": store.vectors_file, "faiss index": folder / f"index-{store.version}.faiss"}
    sums = {name: sha256(file) if file.exists() else "none" for name, file in files.items()}
    return {"rows": str(store.rows), "ids and texts": rows.hexdigest(), **sums}


def interrupted(options: argparse.Namespace, folder: Path, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs that are killed at random moments while they embed, then one to the end."""
    draw, runs = random.Random(options.seed), []
    starting, embedded = whole["seconds_to_first_rows"] or 1.0, whole["seconds_to_all_rows"] or 1.0
    while len(runs) < options.kills:
        share = (embedded - starting) * (1 - rows_in(folder) / options.rows) / (options.kills - len(runs) + 1)
        runs.append(build_in_a_process(options, folder, draw.uniform(0.5, starting + 2 * share)))
        end = "killed" if runs[-1]["killed"] else "at the end before it was killed"
        print(f"after {runs[-1]['seconds']} s {runs[-1]['rows_after']:,} rows are written; {end}", flush=True)
    return [*runs, build_in_a_process(options, folder, None)]


def main() -> None:
    options = arguments().parse_args()
    os.environ.setdefault(CACHE, "64")
    if options.build_into:
        return build(options)
    environment = report.environment()
    runs, equal = [], {}
    with tempfile.TemporaryDirectory(prefix="tritern-crash-") as temporary:
        folder = options.folder or Path(temporary)
        whole = build_in_a_process(options, folder / "whole", None)
        print(
            f"without interruption: {whole['seconds']} s, private MB {whole['peak_private_mb']}", flush=True
        )
        if options.kills:
            runs = interrupted(options, folder / "killed", whole)
            wanted, found = content(folder / "whole"), content(folder / "killed")
            equal = {name: found[name] == wanted[name] for name in wanted}
            print(f"killed {sum(r['killed'] for r in runs)} times, then finished: equal {equal}")
    result = environment | {
        "rows": options.rows,
        "kind": options.kind,
        "layers": options.layers,
        CACHE: os.environ[CACHE],
        "what": "speed, memory and safety only: the texts are varied by templates",
        "uninterrupted": whole,
        "interrupted": runs,
        "equal": equal,
    }
    if options.json:
        report.write_json(options.json, result)
    excused = {"faiss index"} if options.kind == "hnsw" else set()
    lost = [name for name, same in equal.items() if not same and name not in excused]
    if lost:
        raise SystemExit(f"not equal to the index built without interruption: {', '.join(lost)}")


if __name__ == "__main__":
    main()
