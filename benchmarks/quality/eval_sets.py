"""Labelled sets with their measures, and the vectors of a model, each computed once.

A folder of sets is laid out as

    sts/{stsb,sickr,sts12,sts14,sts15}/test.jsonl.gz              sentence1, sentence2, score
    retrieval/{scifact,cranfield,perspectrum,medquad}/
        corpus.jsonl.gz                                           _id, title, text
        queries.jsonl.gz                                          _id, text
        qrels_test.jsonl.gz                                       query-id, corpus-id, score
    classification/{banking77,trec}/{train,test}.jsonl.gz         text, label
    classification/stackoverflow20/test.jsonl.gz                  text, label

with one JSON object a line. Sets may be absent, and further fields are ignored. Where models are chosen,
DEVELOPMENT names the splits to choose by, in files beside those of test.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SETS = {
    "STS-B": ("sts", "sts/stsb"),
    "SICK-R": ("sts", "sts/sickr"),
    "STS12": ("sts", "sts/sts12"),
    "STS14": ("sts", "sts/sts14"),
    "STS15": ("sts", "sts/sts15"),
    "scifact": ("retrieval", "retrieval/scifact"),
    "cranfield": ("retrieval", "retrieval/cranfield"),
    "perspectrum": ("retrieval", "retrieval/perspectrum"),
    "medquad": ("retrieval", "retrieval/medquad"),
    "banking77": ("classification", "classification/banking77"),
    "trec": ("classification", "classification/trec"),
    "stackoverflow20": ("clustering", "classification/stackoverflow20"),
}
"""Task and folder of every set."""

DEVELOPMENT = {"STS-B": "dev", "SICK-R": "train", "scifact": "train", "perspectrum": "dev"}
"""The split of a set that is there to choose by."""

CLUSTERING_SEEDS = 3


@dataclass(frozen=True)
class Items:
    """How a model did on the items of a set, so that it can be scored on any draw of them.

    Attributes:
        count: of sentence pairs, queries or labelled texts; 0 where only the total is known.
        score: the task's measure (1.0 is perfect) on the items of these numbers [n].
    """

    count: int
    score: Callable[[np.ndarray], float]

    def total(self) -> float:
        """The measure on the whole set."""
        return self.score(np.arange(self.count))


@dataclass(frozen=True)
class EvalSet:
    """A set: ``measure`` takes an Encoder and returns how its model did."""

    name: str
    task: str
    texts: list[str]
    measure: Callable[[Any], Items]

    def score(self, encoder: Any) -> float:
        """The task's measure."""
        return self.measure(encoder).total()


def read(file: Path, *fields: str) -> list[tuple[Any, ...]]:
    """These fields of every line.

    Raises:
        ValueError: unreadable or empty file, or a line without the fields.
    """
    rows = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    rows.append(tuple(row[f] for f in fields))
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise ValueError(
                        f"{file}, line {number}: every line must be a JSON object with {', '.join(fields)}; "
                        f"received {line[:80]!r}"
                    ) from None
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} is no readable gzip file ({error}); copy it again") from None
    if not rows:
        raise ValueError(f"{file} is empty; it needs one JSON object with {', '.join(fields)} a line")
    return rows


def _sts(name: str, folder: Path, split: str) -> EvalSet:
    from scipy.stats import spearmanr
    from sentence_transformers.util import pairwise_cos_sim

    rows = read(folder / f"{split}.jsonl.gz", "sentence1", "sentence2", "score")
    first, second = ([row[i] for row in rows] for i in (0, 1))
    gold = np.array([row[2] for row in rows], dtype=np.float64)

    def measure(encoder: Any) -> Items:
        vectors = encoder.encode(first + second)
        cosines = pairwise_cos_sim(vectors[: len(first)], vectors[len(first) :]).numpy()
        return Items(len(gold), lambda i: float(spearmanr(cosines[i], gold[i]).statistic))  # pyright: ignore

    return EvalSet(name, "sts", first + second, measure)


def _retrieval(name: str, folder: Path, split: str) -> EvalSet:
    """nDCG@10 with the grades as gains, as trec_eval has it. Documents of equal score share their ranks."""
    from sentence_transformers.util import cos_sim
    from sklearn.metrics import ndcg_score

    rows = read(folder / "corpus.jsonl.gz", "_id", "title", "text")
    documents = {i: f"{title} {text}".strip() for i, title, text in rows}
    qrels_file = folder / f"qrels_{split}.jsonl.gz"
    qrels = read(qrels_file, "query-id", "corpus-id", "score")
    judged = dict.fromkeys(query for query, _, _ in qrels)
    queries = {i: text for i, text in read(folder / "queries.jsonl.gz", "_id", "text") if i in judged}
    row_of, column_of = ({i: n for n, i in enumerate(ids)} for ids in (queries, documents))
    grades = np.zeros((len(queries), len(documents)), dtype=np.float32)
    for query, document, grade in qrels:
        if query not in row_of or document not in column_of:
            raise ValueError(
                f"{qrels_file} names query {query!r} with document {document!r}; "
                "both must be in queries.jsonl.gz and corpus.jsonl.gz: use files of one release"
            )
        grades[row_of[query], column_of[document]] = grade

    def measure(encoder: Any) -> Items:
        asked = encoder.encode(list(queries.values()), "query")
        scores = cos_sim(asked, encoder.encode(list(documents.values()), "document")).numpy()
        each = np.array([ndcg_score(grades[i, None], scores[i, None], k=10) for i in range(len(scores))])
        return Items(len(each), lambda i: float(each[i].mean()))

    return EvalSet(name, "retrieval", [*queries.values(), *documents.values()], measure)


def _classification(name: str, folder: Path, split: str) -> EvalSet:
    from sklearn.linear_model import LogisticRegression

    (texts, labels), (test_texts, test_labels) = (
        [list(column) for column in zip(*read(folder / f"{part}.jsonl.gz", "text", "label"))]
        for part in ("train", split)
    )

    def measure(encoder: Any) -> Items:
        classifier = LogisticRegression(max_iter=1000).fit(encoder.encode(texts), labels)
        right = classifier.predict(encoder.encode(test_texts)) == np.array(test_labels)
        return Items(len(right), lambda i: float(right[i].mean()))

    return EvalSet(name, "classification", texts + test_texts, measure)


def _clustering(name: str, folder: Path, split: str) -> EvalSet:
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    texts, labels = (list(column) for column in zip(*read(folder / f"{split}.jsonl.gz", "text", "label")))

    classes = np.unique(labels, return_inverse=True)[1]

    def measure(encoder: Any) -> Items:
        vectors = encoder.encode(texts)
        found = [
            # 10 runs, of which the best; the stub knows only n_init="auto"
            KMeans(len(set(labels)), n_init=10, random_state=seed).fit_predict(vectors)  # pyright: ignore
            for seed in range(CLUSTERING_SEEDS)
        ]
        return Items(
            len(texts), lambda i: float(np.mean([v_measure_score(classes[i], one[i]) for one in found]))
        )

    return EvalSet(name, "clustering", texts, measure)


_LOADERS = {
    "sts": (_sts, ("{split}",)),
    "retrieval": (_retrieval, ("corpus", "queries", "qrels_{split}")),
    "classification": (_classification, ("train", "{split}")),
    "clustering": (_clustering, ("{split}",)),
}
TASKS = tuple(_LOADERS)


def load(folder: Path, names: Sequence[str], development: bool = False) -> tuple[list[EvalSet], list[str]]:
    """The sets of these names, and the first missing file of each that is absent. For development: their
    splits to choose by, of those that have one.

    Raises:
        ValueError: a file that is there cannot be used.
    """
    found, absent = [], []
    for name in [n for n in names if n in DEVELOPMENT] if development else names:
        task, path = SETS[name]
        loader, files = _LOADERS[task]
        split = DEVELOPMENT[name] if development else "test"
        needed = [folder / path / f"{file.format(split=split)}.jsonl.gz" for file in files]
        missing = next((file for file in needed if not file.is_file()), None)
        if missing:
            absent.append(f"{name} ({missing.relative_to(folder)})")
        else:
            found.append(loader(name, folder / path, split))
    return found, absent


def mteb_tasks(names: Sequence[str], batch_size: int) -> list[EvalSet]:
    """Tasks of the mteb package by name, in English; their texts are not exposed.

    Raises:
        ModuleNotFoundError: mteb is not installed.
        ValueError: mteb does not know a name.
    """
    try:
        import mteb  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        message = f"--mteb needs the mteb package ({error}): pip install mteb"
        raise ModuleNotFoundError(message, name=error.name) from None
    try:
        tasks = [mteb.get_task(name, languages=["eng"]) for name in names]
    except (KeyError, ValueError) as error:
        raise ValueError(f"--mteb takes names of English tasks that mteb knows: {error}") from None

    def measured_by(task: Any) -> Callable[[Any], Items]:
        def measure(encoder: Any) -> Items:
            bar = sys.stderr.isatty()
            result = mteb.evaluate(
                encoder.model,
                task,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": bar},
                cache=None,  # a patched model still carries its original's name
                show_progress_bar=bar,
            )
            total = float(result.task_results[0].get_score())
            return Items(0, lambda _: total)

        return measure

    return [EvalSet(t.metadata.name, t.metadata.type.lower(), [], measured_by(t)) for t in tasks]


def sample(sets: Sequence[EvalSet], count: int) -> list[str]:
    """``count`` different texts of the sets, or all when there are fewer; always the same ones."""
    texts = sorted({text for one in sets for text in one.texts})
    return random.Random(0).sample(texts, min(count, len(texts)))
