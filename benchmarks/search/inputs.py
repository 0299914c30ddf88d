"""What the search benchmarks share: sets, models, measures of results, times, a corpus of any size."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
from models import encode
from quality import eval_sets
from quality.options import labelled

RETRIEVAL = tuple(name for name, (task, _) in eval_sets.SETS.items() if task == "retrieval")
TEACHER = "fp32"
PYTHON_DOCS = "python-docs"
"""The set without labels that is used without --data."""
TEMPLATES = (
    "{text} (copy {n})",
    "Chapter {n}: {text}",
    "Reader {n} wrote: {text}",
    "{text} As of revision {n}.",
    "In answer to question {n}: {text}",
)


@dataclass(frozen=True)
class SearchSet:
    """Queries, documents and, on a labelled set, judgements.

    Attributes:
        grades: [queries, documents], float32, 0 where not relevant or not judged; None without labels.
        ideal: DCG@10 of the best order of all judged documents, for each query.
    """

    name: str
    queries: list[str]
    documents: list[str]
    grades: np.ndarray | None = None
    ideal: np.ndarray | None = None


def load_set(folder: Path, name: str) -> SearchSet:
    """A retrieval set of ``eval_sets``; documents without text are left out, but count in ``ideal``."""
    path = folder / eval_sets.SETS[name][1]
    rows = eval_sets.read(path / "corpus.jsonl.gz", "_id", "title", "text")
    texts = {i: f"{title} {text}".strip() for i, title, text in rows}
    judged: dict[Any, dict[Any, float]] = {}
    for query, document, grade in eval_sets.read(
        path / "qrels_test.jsonl.gz", "query-id", "corpus-id", "score"
    ):
        judged.setdefault(query, {})[document] = grade
    queries = {i: t for i, t in eval_sets.read(path / "queries.jsonl.gz", "_id", "text") if i in judged}
    documents = {i: t for i, t in texts.items() if t}
    column_of = {i: n for n, i in enumerate(documents)}
    grades = np.zeros((len(queries), len(documents)), dtype=np.float32)
    ideal = np.zeros(len(queries))
    for row, query in enumerate(queries):
        ideal[row] = dcg(np.array(sorted(judged[query].values(), reverse=True)[:10], dtype=float))
        for document, grade in judged[query].items():
            if document in column_of:
                grades[row, column_of[document]] = grade
    return SearchSet(name, list(queries.values()), list(documents.values()), grades, ideal)


def load_sets(options: argparse.Namespace) -> list[SearchSet]:
    """The sets of the command line.

    Raises:
        ValueError: --data holds none of them, or a file of it cannot be used.
    """
    if options.data is None:
        return [shortened(sentences(), options.limit)]
    names = options.sets or RETRIEVAL
    found, absent = eval_sets.load(options.data, names)  # which checks the files
    if not found:
        raise ValueError(
            f"{options.data} holds none of the sets {', '.join(names)}; see benchmarks/quality/eval_sets.py"
        )
    if absent:
        print(f"left out, not in {options.data}: {', '.join(absent)}")
    return [shortened(load_set(options.data, one.name), options.limit) for one in found]


def sentences() -> SearchSet:
    """Sentences of Python's language reference; every tenth is a query, nothing is judged."""
    paragraphs = encode.texts_for(argparse.Namespace(texts=None), 5000)  # some of them twice
    found = [s for p in paragraphs for s in re.split(r"(?<=[.:]) (?=[A-Z])", p) if len(s) >= 30]
    found = list(dict.fromkeys(found))
    return SearchSet(PYTHON_DOCS, found[::10], [s for i, s in enumerate(found) if i % 10])


def shortened(one: SearchSet, limit: int | None) -> SearchSet:
    """At most ``limit`` documents, those judged for the first queries before others: to try things out."""
    if limit is None or limit >= len(one.documents):
        return one
    if one.grades is None or one.ideal is None:
        return SearchSet(one.name, one.queries[:limit], one.documents[:limit])
    columns = list(dict.fromkeys([*np.argwhere(one.grades)[:, 1], *range(len(one.documents))]))[:limit]
    grades = one.grades[:, columns]
    rows = np.flatnonzero(grades.any(1))
    return SearchSet(
        one.name,
        [one.queries[i] for i in rows],
        [one.documents[i] for i in columns],
        grades[rows],
        one.ideal[rows],
    )


def dcg(gains: np.ndarray) -> np.ndarray:
    """Sum over the last axis of gains / log2(rank + 1): linear gains, as trec_eval has it."""
    return (gains / np.log2(np.arange(2, gains.shape[-1] + 2))).sum(-1)


def gains_of(found: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """Grades [queries, k] of the documents found [queries, k]; 0 where none was found (-1)."""
    return np.where(found >= 0, np.take_along_axis(grades, np.maximum(found, 0), 1), 0)


def ndcg(found: np.ndarray, one: SearchSet) -> float:
    """Mean nDCG@10 of the documents found [queries, k >= 10], best first; NaN without labels."""
    if one.grades is None or one.ideal is None:
        return float("nan")
    reached = dcg(gains_of(found[:, :10], one.grades))
    return float(np.divide(reached, one.ideal, out=np.zeros_like(reached), where=one.ideal > 0).mean())


def precision(found: np.ndarray, one: SearchSet) -> float:
    """Mean share of the first ten documents found that are judged relevant; NaN without labels."""
    if one.grades is None:
        return float("nan")
    return float((gains_of(found[:, :10], one.grades) > 0).mean())


def best_precision(one: SearchSet) -> float:
    """The precision@10 of a perfect order; NaN without labels."""
    if one.grades is None:
        return float("nan")
    return float(np.minimum((one.grades > 0).sum(1), 10).mean() / 10)


def overlap(found: np.ndarray, wanted: np.ndarray, k: int) -> float:
    """Mean share of the first k ``wanted`` [queries, >= k] that are among the first k ``found``."""
    shares = []
    for ours, theirs in zip(found[:, :k].tolist(), wanted[:, :k].tolist()):
        valid = set(theirs) - {-1}
        shares.append(len(valid.intersection(ours)) / max(1, len(valid)))
    return float(np.mean(shares))


def spread(values: Sequence[float] | np.ndarray, *further: float) -> dict[str, float]:
    """Median and 20th and 80th percentile, and the percentiles asked for (as "p99")."""
    names = {"median": 50.0, "p20": 20.0, "p80": 80.0} | {f"p{p:g}": p for p in further}
    return dict(zip(names, map(float, np.percentile(values, list(names.values())))))


def varied(texts: Sequence[str], count: int) -> Iterator[str]:
    """``count`` different texts, one at a time: the given ones, then each again in numbered templates."""
    for i in range(count):
        n, text = i // len(texts), texts[i % len(texts)]
        yield TEMPLATES[n % len(TEMPLATES)].format(text=text, n=n) if n else text


@dataclass(frozen=True)
class Arm:
    """A model of the comparison: ``kind`` is one of encode's arms, ``folder`` its saved ternary model."""

    label: str
    kind: str
    folder: str = ""


KINDS_OF_ARMS = ("fp32", "fp16", "ternary 16-bit", "ternary int8")


def wanted_arms(options: argparse.Namespace, patched: Path) -> list[Arm]:
    """The teacher and the arms wanted; without --ternary the model is patched and saved to ``patched``."""
    kinds = options.arms or [k for k in KINDS_OF_ARMS if options.device == "cuda" or k != "fp16"]
    arms = [Arm(TEACHER, TEACHER)] + [Arm(k, k) for k in kinds if k == "fp16"]
    ternary = [k for k in KINDS_OF_ARMS if k in kinds and k.startswith("ternary")]
    if ternary and not options.ternary:
        from sentence_transformers import SentenceTransformer

        import tritern

        tritern.patch(SentenceTransformer(options.model, device="cpu")).save_pretrained(str(patched))
    for name, folder in options.ternary or [("patched", str(patched))]:
        arms += [Arm(f"{name} {kind.removeprefix('ternary ')}", kind, folder) for kind in ternary]
    if len({arm.label for arm in arms}) < len(arms):
        raise ValueError("two --ternary models have the same NAME: give each its own")
    return arms


def load_arms(options: argparse.Namespace, patched: Path) -> dict[str, Any]:
    """Label and sentence-transformer of every arm, the teacher first."""
    arms = wanted_arms(options, patched)
    return {a.label: encode.load(a.kind, options.model, a.folder, options.device) for a in arms}


def flat_index(folder: Path, label: str, model: Any, one: SearchSet) -> Any:
    """An exact SearchIndex of the set's documents in the folder; what is there is not embedded again."""
    from tritern.search import SearchIndex

    path = folder / f"{one.name} {len(one.documents)} {label}"
    return SearchIndex.build(path, model, one.documents, show_progress_bar=sys.stderr.isatty())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every search benchmark."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of labelled sets (benchmarks/"
        "eval_sets.py has the layout); without it sentences of Python's language reference, no labels",
    )
    parser.add_argument("--sets", nargs="+", choices=RETRIEVAL, help="default: all of these that DIR holds")
    parser.add_argument("--model", help="hub name or path; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument(
        "--ternary",
        nargs="+",
        action="extend",
        default=[],
        type=labelled,
        metavar="NAME=FOLDER",
        help="saved ternary models; default: --model patched, not trained",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=KINDS_OF_ARMS,
        help="default: all, on a CPU without fp16, "
        "which CPUs are slow at; fp32 is the teacher and always there",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents per set; for trying things out")
    parser.add_argument("--repeat", type=int, default=5, help="times each speed is measured (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, help="write the results to this file, as they come")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep vectors here, and go on from them in later runs"
    )
    parser.add_argument("--quick", action="store_true", help="small: about a minute")


def settle(options: argparse.Namespace) -> dict[str, Any]:
    """Fill in the model and the device, seed the generators; what the figures are measured with.

    Raises:
        ModuleNotFoundError: faiss is missing, or matplotlib where --plot is given.
    """
    import report
    import torch

    try:
        import faiss
    except ModuleNotFoundError as error:
        message = f"search needs faiss ({error}): pip install faiss-cpu, or faiss-gpu for a CUDA GPU"
        raise ModuleNotFoundError(message, name=error.name) from None
    if options.plot:
        report.load_pyplot()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    name = options.model or "all-MiniLM-L6-v2"
    options.model = options.model or encode.packaged_model()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    package = packages_distributions().get("faiss", ["faiss"])[0]
    return encode.environment(options.device) | {
        "faiss": f"{package} {version(package)}",
        "faiss_gpus": faiss.get_num_gpus(),
        "model": name,
        "seed": options.seed,
    }


def markdown(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; floats get two decimals below 1,000 and none above, NaN and None become dashes."""

    def cell(value: Any) -> str:
        if value is None or value != value:
            return "-"
        if not isinstance(value, float):
            return str(value)
        return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"

    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
