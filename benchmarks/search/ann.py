"""Approximate search with a full-precision and a ternary embedder: the experiment of arXiv 2411.15438.

    python benchmarks/search/ann.py --data DIR --ternary distilled=FOLDER --json ann.json --plot ann.png

For every embedder and index: precision@10, nDCG@10, and the time of one query. The settings are the same for
all embedders, those of the paper's published code (github.com/dataparameters/Ternary-Embedding-Models,
Embedding-ANN/ANN_eval.py): squared distance, ten results, batches of 128 queries, else faiss' defaults:

    Flat        exact                           IVF-Flat    100 lists, of which one is looked at (nprobe = 1)
    LSH         128 random projections          HNSW        32 links a node, efSearch = 16

Different are the sets, the models, and that vectors have length 1. precision@10 is, as there, the share of
the ten results that are judged relevant; a query with one relevant document reaches 0.1, which the column
"best" shows. same@10 is the share of the exact ten, of the same vectors, that the index finds. The time of a
query is that of embedding and searching all in batches, divided; indexes are built before. Arms take turns,
--repeat times, and each searches in all its indexes for the queries embedded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
import report
from search import inputs
from search.inputs import SearchSet

INDEXES = {"Flat": "Flat", "IVF-Flat": "IVF{lists},Flat", "LSH": "LSH128r", "HNSW": "HNSW32"}
"""faiss factory strings of the paper's settings; 100 lists, or one a document where there are fewer."""
BATCH = 128


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs.add_arguments(parser)
    parser.add_argument("--indexes", nargs="+", choices=INDEXES, default=list(INDEXES), help="default: all")
    parser.add_argument("--nprobe", type=int, default=1, help="lists that IVF-Flat looks at (default: 1)")
    parser.add_argument("--ef-search", type=int, default=16, help="HNSW's candidates (default: 16)")
    return parser


def make_index(factory: str, vectors: np.ndarray, options: argparse.Namespace) -> tuple[Any, bool]:
    """A faiss index of the vectors [n, width], and whether it is on the GPU: where faiss has such a kind."""
    import faiss

    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2)
    if factory.startswith("IVF"):
        clustering = faiss.extract_index_ivf(index).cp
        clustering.seed, clustering.min_points_per_centroid = options.seed, 1  # 1: no warnings on small sets
    index.train(vectors)
    index.add(vectors)
    parameter = {"I": f"nprobe={options.nprobe}", "H": f"efSearch={options.ef_search}"}.get(factory[0])
    if parameter:
        faiss.ParameterSpace().set_index_parameters(index, parameter)
    if faiss.get_num_gpus():
        try:
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), True
        except RuntimeError:  # HNSW and LSH have no form for GPUs
            pass
    return index, False


def embed_queries(model: Any, queries: list[str]) -> tuple[list[np.ndarray], float]:
    """Vectors in batches, and the seconds that took."""
    from tritern.search import embed

    start = time.perf_counter()
    batches = [queries[first : first + BATCH] for first in range(0, len(queries), BATCH)]
    vectors = [embed(model, batch, task="query").cpu().numpy() for batch in batches]
    return vectors, time.perf_counter() - start


def measure(
    one: SearchSet, models: Mapping[str, Any], options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """A row for every arm and index of this set."""
    indexes: dict[tuple[str, str], tuple[Any, bool]] = {}
    for label, model in models.items():
        with inputs.flat_index(folder, label, model, one) as flat:
            vectors = np.array(flat.vectors)
        for name in dict.fromkeys(["Flat", *options.indexes]):  # same@10 needs Flat
            factory = INDEXES[name].format(lists=min(100, len(vectors)))
            indexes[label, name] = make_index(factory, vectors, options)
    found: dict[tuple[str, str], np.ndarray] = {}
    embedding, searching = defaultdict(list), defaultdict(list)
    for _ in range(options.repeat + 1):  # the first warms up
        for label, model in models.items():
            batches, seconds = embed_queries(model, one.queries)
            embedding[label].append(seconds)
            for key in (key for key in indexes if key[0] == label):
                start = time.perf_counter()
                found[key] = np.concatenate([indexes[key][0].search(batch, 10)[1] for batch in batches])
                searching[key].append(time.perf_counter() - start)
    rows = []
    for label, name in indexes:
        if name not in options.indexes:
            continue
        stages = np.array([embedding[label][1:], searching[label, name][1:]]) * 1e3 / len(one.queries)
        rows.append(
            {
                "set": one.name,
                "documents": len(one.documents),
                "queries": len(one.queries),
                "arm": label,
                "index": name,
                "factory": INDEXES[name].format(lists=min(100, len(one.documents))),
                "on_gpu": indexes[label, name][1],
                "precision10": 100 * inputs.precision(found[label, name], one),
                "precision10_best": 100 * inputs.best_precision(one),
                "ndcg10": 100 * inputs.ndcg(found[label, name], one),
                "same10": 100 * inputs.overlap(found[label, name], found[label, "Flat"], 10),
                "ms_per_query": inputs.spread(stages.sum(0)),
                "ms_embedding": inputs.spread(stages[0]),
                "ms_searching": inputs.spread(stages[1]),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, precision, nDCG and same x 100."""
    titles = "set, arm, index, precision@10, best, nDCG@10, same@10, ms a query, [p20 p80], embed, search us"
    cells = []
    for r in rows:
        total = r["ms_per_query"]
        figures = (r[k] for k in ("precision10", "precision10_best", "ndcg10", "same10"))
        cells.append(
            [
                r["set"],
                r["arm"],
                r["index"],
                *figures,
                total["median"],
                f"[{total['p20']:.2f} {total['p80']:.2f}]",
            ]
            + [r["ms_embedding"]["median"], 1e3 * r["ms_searching"]["median"]]
        )
    return inputs.markdown(titles.split(", "), cells)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """nDCG@10 (without labels same@10) against the time of a query: colours are arms, markers indexes."""
    pyplot = report.load_pyplot()
    names = list(dict.fromkeys(r["set"] for r in rows))
    labelled = all(isfinite(r["ndcg10"]) for r in rows)
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names) + 2, 4), squeeze=False)
    for panel, name in zip(axes[0], names):
        for r in (r for r in rows if r["set"] == name):
            panel.plot(
                r["ms_per_query"]["median"],
                r["ndcg10"] if labelled else r["same10"],
                "osD^"[list(INDEXES).index(r["index"])],
                color=f"C{arms.index(r['arm'])}",
                label=f"{r['arm']}, {r['index']}",
                markersize=8,
                alpha=0.8,
            )
        panel.set(title=name, xlabel="ms a query, embedding and search")
        panel.set_ylabel("nDCG@10 x 100" if labelled else "same@10 x 100")
        panel.grid(True, alpha=0.3)
    axes[0, -1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    options = arguments().parse_args()
    if options.quick:
        options.repeat, options.limit = 1, options.limit or 300
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tritern-ann-") as folder:
        try:
            info = inputs.settle(options) | {
                "batch": BATCH,
                "repeat": options.repeat,
                "limit": options.limit,
            }
            info |= {"nprobe": options.nprobe, "ef_search": options.ef_search}
            sets = inputs.load_sets(options)
            models = inputs.load_arms(options, Path(folder) / "patched")
        except (ValueError, OSError, ModuleNotFoundError) as error:
            sys.exit(str(error))
        print(", ".join(f"{k} {v}" for k, v in info.items() if v is not None), flush=True)
        for one in sets:
            rows += measure(one, models, options, options.keep or Path(folder))
            if options.json:
                report.write_json(options.json, {"environment": info, "rows": rows})
            print(
                f"{one.name}: {len(one.documents):,} documents, {len(one.queries):,} queries", file=sys.stderr
            )
    print(table(rows))
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
