"""Text to vector, as ``encode.py`` measures it on a GPU: models, texts and arms, in this process one by one.

A row is a model, a kind of texts and one of ``arms.ALL``. ``sentences_per_second`` is the median of three
passes with the best batch size, texts and vectors on the CPU. ``stages`` are the seconds of an engine's
steps one after the other: in ``encode`` they overlap. The vectors of an arm must agree with those of
sentence-transformers' ``encode``, by the fp32 original for its arms and by the same model for an engine's;
``smallest_cosine`` is the smallest of 64 texts. Engines run without cuDNN's attention, which plans for each
new shape; the other arms have torch's own choice.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
import torch
from models import arms, encode, encode_gpu, tokens
from timing import reason_of

FEW = 64
PASSES = 3
LEAST_COSINE = {"ternary": 0.98}
"""Of vectors of one model in two ways; 0.999 where there is no int8 rounding."""


def own_vectors(model: Any, texts: list[str]) -> torch.Tensor:
    """What sentence-transformers' ``encode`` gives, whatever the model's class has instead."""
    from sentence_transformers import SentenceTransformer

    kept: Any = SentenceTransformer.encode(model, texts, convert_to_tensor=True, show_progress_bar=False)
    return kept.float().cpu()


def rate(model: Any, texts: list[str], batch: int) -> float:
    """Texts a second of one pass, vectors on the CPU."""
    start = time.perf_counter()
    model.encode(texts, batch_size=batch, show_progress_bar=False)
    return len(texts) / (time.perf_counter() - start)


def measure(model: Any, arm: str, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Rate, latency and memory of an arm that has passed its check.

    A small sample says how many texts a pass of --seconds has; a larger one, which batch size is best.
    """
    texts = (texts * (options.sentences // len(texts) + 1))[: options.sentences]
    for _ in range(3 if "compiled" in arm else 1):
        model.encode(texts[:FEW], show_progress_bar=False)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    least = min(FEW, len(texts))
    sample = texts[: max(least, int(rate(model, texts[: 4 * FEW], 32) * options.seconds / 4))]
    sizes = options.batch_size if arm.startswith("encode") else [32]
    rates = {batch: rate(model, sample, batch) for batch in sizes if batch <= len(sample)} or {32: 0.0}
    best = max(rates, key=lambda batch: rates[batch])
    measured = texts[: max(len(sample), int(rates[best] * options.seconds))]
    rate(model, measured, best)  # all shapes have come once
    row: dict[str, Any] = {"texts_measured": len(measured), "batch_size": best, "sampled": rates}
    row["passes"] = [rate(model, measured, best) for _ in range(PASSES)]
    row["sentences_per_second"] = statistics.median(row["passes"])
    encode.latencies(model, texts[:5])
    row |= encode.latencies(model, texts[: options.queries])
    if options.device == "cuda":
        row["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return row | ({"stages": stages(model, measured)} if arm.startswith("engine") else {})


@torch.inference_mode()
def stages(model: Any, texts: list[str]) -> dict[str, float]:
    """Seconds of tokens, packing (or padding), model, and copy back, of all texts one after the other."""
    from tritern.engine.path import way_of

    way: Any = way_of(model)
    if isinstance(way, str):
        return {}
    tokenize, taken = way.tokenizer, 0.0

    def timed(batch: Sequence[str]) -> Any:
        nonlocal taken
        start = time.perf_counter()
        found = tokenize(batch)
        taken += time.perf_counter() - start
        return found

    way.tokenizer = timed
    sync = torch.cuda.synchronize if model.device.type == "cuda" else (lambda: None)
    marks: list[float] = []
    for _ in range(2):  # the first warms up
        taken, marks = 0.0, [time.perf_counter()]
        batches = [batch for _, batch in way.batches(texts)]
        marks.append(time.perf_counter())
        found = [way.vectors(batch) for batch in batches]
        sync()
        marks.append(time.perf_counter())
        for vectors in found:
            vectors.cpu()
        marks.append(time.perf_counter())
    made, ran, copied = (b - a for a, b in zip(marks, marks[1:]))
    return {"tokens": taken, "packing": made - taken, "model": ran, "copy back": copied}


class Table:
    """Rows by model, texts and arm; they go to the JSON file as they come.

    Rows with figures are taken from a file of the same device, torch and commit.
    """

    def __init__(self, facts: dict[str, Any], path: Path | None) -> None:
        self.facts, self.path, self.rows = facts, path, []
        if path and path.exists():
            before = json.loads(path.read_text())
            names = ("device", "torch", "commit", "texts")
            same = all(before["environment"].get(name) == facts[name] for name in names)
            self.rows = [r for r in before["rows"] if "reason" not in r] if same else []

    def has(self, **names: str) -> bool:
        """Whether there is a row of these."""
        return any(all(row[k] == v for k, v in names.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, and print it."""
        self.rows.append(row)
        with_speeds(self.rows)
        if self.path:
            report.write_json(self.path, {"environment": self.facts, "rows": self.rows})
        print(line(row), flush=True)


def with_speeds(rows: list[dict[str, Any]]) -> None:
    """Each row's speed over ``encode`` in fp16, or where there is none in fp32, and a ternary one's over fp16
    (or fp32) through the same engine.
    """
    found = {(r["model"], r["texts"], r["arm"]): r for r in rows if "reason" not in r}
    for (model, texts, arm), row in found.items():
        for name, how in (("speed", "encode"), ("speed_of_engine", "engine")):
            of = (found.get((model, texts, f"{how} {kind}")) for kind in ("fp16", "fp32"))
            base = next((r for r in of if r), None)
            if base and (how == "encode" or arm == "engine ternary"):
                row[name] = row["sentences_per_second"] / base["sentences_per_second"]
                row[name.replace("speed", "query_speed")] = base["query_p50_ms"] / row["query_p50_ms"]


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['model'][-20:]:11s} {row['texts']:6s} {row['arm']:21s}"
    if "reason" in row:
        return f"{head} not measured: {row['reason']}"
    speed = f"{row['speed']:.2f}x" if "speed" in row else ""
    query = f"{row['query_p50_ms']:7.2f} ms, p99 {row['query_p99_ms']:7.2f} ms"
    of_engine = f" ({row['speed_of_engine']:.2f}x of it unpatched)" if "speed_of_engine" in row else ""
    steps = ", ".join(f"{k} {row['texts_measured'] / v:,.0f}" for k, v in row.get("stages", {}).items() if v)
    return (
        f"{head} {row['sentences_per_second']:10,.0f} texts/s {speed:>7s}{of_engine}, batches of "
        f"{row['batch_size']}; one query {query}{f'; texts/s of {steps}' if steps else ''}"
    )


def prepared(name: str, arm: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The model of an arm, ready to run, and the seconds that took."""
    import tritern
    from tritern.engine.path import path_of

    start = time.perf_counter()
    model = arms.load(name, arm, device)
    facts: dict[str, Any] = {"load_s": time.perf_counter() - start}
    if arm.startswith("engine"):
        start = time.perf_counter()
        tritern.warmup(model)
        facts |= {"warmup_s": time.perf_counter() - start, "path": str(path_of(model))}
    return model, facts


def check(model: Any, arm: str, few: list[str], theirs: torch.Tensor) -> dict[str, float]:
    """The smallest cosine of an arm's vectors of a few texts to those that they should be.

    Raises:
        ArithmeticError: it is too small.
    """
    ours = model.encode(few, convert_to_tensor=True, show_progress_bar=False).cpu()
    found = torch.nn.functional.cosine_similarity(ours.double(), theirs.double()).min().item()
    least = LEAST_COSINE.get(arm.split()[1], 0.999)
    if not found >= least:
        raise ArithmeticError(f"failed its check: smallest cosine {found:.4f}, accepted {least}")
    return {"smallest_cosine": found}


def rows_of(
    name: str,
    arm: str,
    kinds: dict[str, list[str]],
    options: argparse.Namespace,
    reference: Callable[[str], dict[str, torch.Tensor]],
) -> Iterator[dict[str, Any]]:
    """A row for each kind of texts; what goes wrong becomes its reason."""
    ours = arm.startswith("engine")
    with encode_gpu.without_cudnn_attention() if ours else nullcontext():
        model, facts = None, {}
        for kind, texts in kinds.items():
            row: dict[str, Any] = {"model": name, "texts": kind, "arm": arm}
            try:
                if model is None:
                    model, facts = prepared(name, arm, options.device)
                few = texts[:FEW]
                row |= check(model, arm, few, own_vectors(model, few) if ours else reference(name)[kind])
                row |= facts | measure(model, arm, texts, options)
            except Exception as error:  # third-party code may raise anything
                row["reason"] = reason_of(error)
            yield row


def turns(names: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Models and arms; what is compiled comes last, for it takes longest."""
    for compiled in (False, True):
        yield from ((n, a) for n in names for a in wanted if ("compiled" in a) == compiled)


def facts_of(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What the rows are measured with."""
    texts = str(options.texts or ("labelled sets" if options.data else "Python's language reference"))
    return encode.environment(options.device) | {
        "random_weights": [n for n in names if n in arms.RANDOM],
        "texts": texts,
        "longest": arms.LONGEST,
        **{n: getattr(options, n) for n in ("sentences", "batch_size", "queries", "seconds")},
    }


def measure_models(options: argparse.Namespace) -> None:
    """Measure what is wanted and not yet in the file; print and write each row.

    Raises:
        ValueError: an arm that there is not, or a file of texts that cannot be read.
    """
    wanted = options.arms or (arms.ON_GPU if options.device == "cuda" else arms.ON_CPU)
    if wrong := [arm for arm in wanted if arm not in arms.ALL]:
        raise ValueError(f"--arms must be of {', '.join(arms.ALL)}; received {wrong[0]!r}")
    kinds = tokens.real_texts(options.data)
    if options.texts:
        kinds = {"texts": encode.texts_for(options, options.sentences)}
    kinds = {kind: texts[: options.sentences] for kind, texts in kinds.items()}
    names = options.models or arms.MODELS
    table = Table(facts_of(options, names), options.json)
    end = time.perf_counter() + 60 * options.minutes

    @cache
    def reference(name: str) -> dict[str, torch.Tensor]:
        """The fp32 original's vectors of a few texts."""
        model = arms.original(name, torch.float32, options.device)
        return {kind: own_vectors(model, texts[:FEW]) for kind, texts in kinds.items()}

    for name, arm in turns(names, wanted):
        missing = {k: t for k, t in kinds.items() if not table.has(model=name, texts=k, arm=arm)}
        if time.perf_counter() > end:
            late = {"model": name, "arm": arm, "reason": f"the {options.minutes:g} minutes were over"}
            for kind in missing:
                table.add(late | {"texts": kind})
            continue
        for row in rows_of(name, arm, missing, options, reference):
            table.add(row)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if "compiled" in arm:
            torch._dynamo.reset()
