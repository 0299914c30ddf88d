"""Embed and search, end to end: raw text in, neighbours out, by tritern.search; fp32 against ternary.

    cd benchmarks/search
    python embed_search.py --data DIR --ternary distilled=FOLDER --json found.json --plot found.png
    python embed_search.py --quick
    python embed_search.py --scale 1000000 --arms "ternary int8" --kinds ivf-pq --json scale.json

Arms: fp32 (the teacher, whose vectors the others are held against), fp16, and ternary models with 16-bit and
int8 activations, each with indexes of its own. Three parts, chosen by --parts:

throughput  Texts per second of embed + add by tritern.search, against encode_document and faiss written by
            hand: with the same model, and with fp16 (without it fp32). On a GPU fp32 is left out, and by hand
            it is the best of three batch sizes.
latency     Queries per second, p50 and p99 of embed + search at several batch sizes, whole and by stage. The
            stages are timed in a run of their own, so their sum is not exactly the whole.
quality     For every set, arm, kind of index and search parameter: recall@10 and recall@100 are shares of
            what exact search of the same vectors finds, fidelity@10 of what the teacher's exact search
            finds. Loss of nDCG@10 by the model: from the teacher's exact search to this arm's; by the
            index: from this arm's exact search to the index. Sizes, and searches per second with all
            queries at once, embedding not counted. On small sets kinds that are trained search exactly.

--scale N measures none of that, but build and search of N rows: real texts varied by templates, of which
speed and memory mean something and quality does not. Arms take turns at every speed, so that other work on
the machine meets all alike; tables show medians with the 20th and 80th percentile. Indexes that --keep holds
from an earlier run are used again, or gone on with.

With --minutes the pace of a small sample says for how many texts and documents there is time; sets come
smallest first in the quality, the last one shortened, and what is left out is named. faiss uses a GPU where
faiss-gpu is installed.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
import report
from search import inputs, report_tables, speed
from search.inputs import TEACHER, SearchSet, ndcg, overlap, spread
from search.report_tables import DEFAULTS
from search.time_limit import Limit, in_time

KINDS = ("flat", "ivf-flat", "ivf-pq", "hnsw", "int8", "binary")
PARTS = ("quality", "throughput", "latency")
NPROBE = [f"nprobe={2**i}" for i in range(8)]
SWEEPS = {"ivf-flat": NPROBE, "ivf-pq": NPROBE, "hnsw": [f"efSearch={2**i}" for i in range(4, 10)]}
"""Search parameters that are tried besides the defaults of a kind."""
FEWEST = 16
"""Texts of the throughput and rows of the latency, however little time there is."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs.add_arguments(parser)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--kinds", nargs="+", choices=KINDS, help="kinds of index; default: all, with --scale ivf-pq")
    add("--latency-kinds", nargs="+", choices=KINDS, default=["flat"], help="for the latency (default: flat)")
    add("--batches", nargs="+", type=positive, default=[1, 8, 32, 128, 512], help="default: 1 8 32 128 512")
    add("--texts", type=positive, help="most of a throughput measurement; default 512, on a GPU 65536")
    add("--minutes", type=float, help="end within this; default: no limit, on a GPU 4")
    add("--scale", type=positive, metavar="N", help="only build and search N rows of varied texts")
    return parser


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; received {text!r}")
    return int(text)


class Results:
    """Rows by part; they go to the JSON file as they come, each with what it was measured with."""

    def __init__(self, info: dict[str, Any], path: Path | None) -> None:
        self.info, self.path = info, path
        self.parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        where = ("faiss", "device", "torch", "commit", "date")
        self.where = {name: info[name] for name in where}

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Append a row to a part."""
        self.put(part, [*self.parts[part], row])

    def put(self, part: str, rows: list[dict[str, Any]]) -> None:
        """The rows of a part so far."""
        self.parts[part] = [row | self.where for row in rows]
        if self.path:
            report.write_json(self.path, {"environment": self.info, **self.parts})


def parameters(index: Any) -> list[str]:
    """The defaults and the sweep of an index, without more lists than it has."""
    if index.factory == "Flat":  # as small sets are searched, whatever the kind
        return [DEFAULTS]
    lists = re.search(r"IVF(\d+)", index.factory)
    most = int(lists.group(1)) if lists else 2**31
    sweep = SWEEPS.get(index.kind, [])
    return [DEFAULTS, *(p for p in sweep if not p.startswith("nprobe") or int(p.split("=")[1]) <= most)]


def build_kinds(
    folder: Path, label: str, model: Any, one: SearchSet, kinds: Sequence[str], opened: ExitStack
) -> dict[str, Any]:
    """Indexes by kind, flat among them, closed by ``opened``. Texts are embedded once, for the flat index in
    the folder; the others are made of copies of it.
    """
    from tritern.search import SearchIndex

    flat = opened.enter_context(inputs.flat_index(folder, label, model, one))
    indexes = {"flat": flat}
    for kind in kinds:
        if kind != "flat":
            copy = opened.enter_context(tempfile.TemporaryDirectory(prefix="tritern-search-"))
            shutil.copytree(flat.folder, copy, dirs_exist_ok=True)
            indexes[kind] = opened.enter_context(SearchIndex.open(copy, model))
            indexes[kind].reindex(kind)
    return indexes


def quality(
    one: SearchSet, models: Mapping[str, Any], options: argparse.Namespace, folder: Path, results: Results
) -> None:
    """Rows of every arm, kind and search parameter on a set."""
    from tritern.search import embed

    with ExitStack() as opened:
        indexes, queries, exact = {}, {}, {}
        for label, model in models.items():
            queries[label] = embed(model, one.queries, task="query")
            found = build_kinds(folder, label, model, one, options.kinds, opened)
            exact[label] = found["flat"].search_vectors(queries[label], 100, exact=True)[1]
            indexes |= {(label, kind): found[kind] for kind in options.kinds}
        settings = {key: parameters(index) for key, index in indexes.items()}
        for step in range(max(map(len, settings.values()))):
            now = {key: names[step] for key, names in settings.items() if step < len(names)}
            for (label, kind), setting in now.items():
                if setting != DEFAULTS:
                    indexes[label, kind].set_search_parameters(setting)
            seconds = search_times({key: (indexes[key], queries[key[0]]) for key in now}, options.repeat)
            for (label, kind), setting in now.items():
                index = indexes[label, kind]
                near, far = (index.search_vectors(queries[label], k)[1] for k in (10, 100))
                row = {"set": one.name, "documents": len(index), "queries": len(one.queries), "arm": label}
                row |= {"kind": kind, "factory": index.factory, "parameters": setting, "gpus": index.gpus}
                rates = spread([len(one.queries) / s for s in seconds[label, kind]])
                row |= {"queries_per_second": rates, "bytes": index.bytes}
                results.add("quality", row | measures(near, far, exact[label], exact[TEACHER], one))


def search_times(
    searches: Mapping[tuple[str, str], tuple[Any, Any]], repeat: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of searching for all queries at once, taking turns, after a round to warm up."""
    seconds = defaultdict(list)
    for _ in range(repeat + 1):
        for key, (index, queries) in searches.items():
            start = time.perf_counter()
            index.search_vectors(queries, 10)
            seconds[key].append(speed.seconds(start))
    return {key: found[1:] for key, found in seconds.items()}


def measures(
    near: np.ndarray, far: np.ndarray, exact: np.ndarray, teacher: np.ndarray, one: SearchSet
) -> dict[str, float]:
    """Recall, fidelity and nDCG@10, x 100, of the rows found at k = 10 (near) and 100 (far).

    Args:
        near, far: [queries, 10 or 100], by the index.
        exact, teacher: [queries, 100], by exact search of the arm's and of the teacher's vectors.
        one: the set.
    """
    reached, own, best = (100 * ndcg(rows, one) for rows in (near, exact, teacher))
    return {
        "recall10": 100 * overlap(near, exact, 10),
        "recall100": 100 * overlap(far, exact, 100),
        "fidelity10": 100 * overlap(near, teacher, 10),
        "ndcg10": reached,
        "loss_by_model": best - own,
        "loss_by_index": own - reached,
    }


def measure(
    options: argparse.Namespace,
    sets: list[SearchSet],
    models: Mapping[str, Any],
    folder: Path,
    results: Results,
    limit: Limit,
) -> None:
    """All parts wanted; each table is printed when its part is done."""
    texts = speed.mixed(sets, options.seed)
    pace = speed.pace_of(models, texts, options.device, limit)
    each = sum(one.tritern for one in pace.values())
    results.info["pace"] = {label: one._asdict() for label, one in pace.items()}
    if options.scale:
        with tempfile.TemporaryDirectory(dir=options.keep) as fresh:
            for row in speed.scale(models, sets[0], options, Path(fresh), limit, pace):
                results.add("scale", row)
        print("\n" + report_tables.scale_table(results.parts["scale"]))
        return
    if "throughput" in options.parts:
        timed = {k: m for k, m in models.items() if options.device != "cuda" or k != TEACHER} or models
        a_round = sum(pace[label].by_hand + pace[label].tritern for label in timed)
        count = max(FEWEST, limit.affords(texts, (options.repeat + 1) * a_round, 0.4))
        texts = texts[: min(options.texts, count)]
        for rows in speed.throughput(timed, texts, options, pace, limit):
            results.put("throughput", rows)
        print("\nEmbed + add\n\n" + report_tables.throughput_table(results.parts["throughput"]), flush=True)
    if "latency" in options.parts:
        one = inputs.shortened(sets[0], max(FEWEST, limit.affords(sets[0].documents, each, 0.4)))
        with ExitStack() as opened:
            indexes = {}
            for label, model in models.items():
                built = build_kinds(folder, label, model, one, options.latency_kinds, opened)
                indexes |= {(label, kind): built[kind] for kind in options.latency_kinds}
            for row in speed.latency(indexes, models, one.queries, options, limit):
                results.add("latency", row | {"set": one.name})
        print("\nEmbed + search, ms\n\n" + report_tables.latency_table(results.parts["latency"]), flush=True)
    if "quality" in options.parts:
        left_out: list[str] = results.info.setdefault("left_out", [])
        for one in in_time(sets, limit, each, left_out):
            quality(one, models, options, folder, results)
        print("\nIndexes\n\n" + report_tables.quality_table(results.parts["quality"]), flush=True)
        if options.plot and results.parts["quality"]:
            report_tables.draw(results.parts["quality"], options.plot)


def settle(options: argparse.Namespace) -> dict[str, Any]:
    """Fill in what depends on the device and on --quick; what the figures are measured with."""
    info = inputs.settle(options)
    options.texts = options.texts or (65536 if options.device == "cuda" else 512)
    if options.minutes is None:
        options.minutes = 4.0 if options.device == "cuda" else math.inf
    options.kinds = options.kinds or (["ivf-pq"] if options.scale else list(KINDS))
    if options.quick:
        options.repeat, options.limit, options.texts = 1, options.limit or 1100, min(options.texts, 64)
        options.batches = [b for b in options.batches if b <= 32] or options.batches[:1]
        options.sets = options.sets or ["perspectrum"]
    named = ("repeat", "limit", "texts", "quick", "scale", "minutes")
    return info | {name: getattr(options, name) for name in named}


def main() -> None:
    options = arguments().parse_args()
    with tempfile.TemporaryDirectory(prefix="tritern-search-") as folder:
        try:
            info = settle(options)
            limit = Limit(options.minutes)
            sets = inputs.load_sets(options)
            models = inputs.load_arms(options, Path(folder) / "patched")
            print(", ".join(f"{k} {v}" for k, v in info.items() if v is not None), flush=True)
            where = options.keep or Path(folder)
            measure(options, sets, models, where, Results(info, options.json), limit)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
