"""``tritern bench``."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from . import loading, options, reporting
from .options import AsJson, BatchSize, Column, Device, Dtype, Model, Trust
from .reporting import Result

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tqdm import tqdm

Found = TypeVar("Found")

EXAMPLES = """**Examples**

    tritern bench minilm-ternary --against all-MiniLM-L6-v2
    tritern bench bge-ternary --against BAAI/bge-base-en-v1.5 --device cuda --dtype float16 --batch-size 256
    tritern bench minilm-ternary --texts corpus.txt --count 2000 --json

Each model runs in a process of its own. Models take turns, so other load slows both alike. Figures are
medians over the rounds. Measure on an idle machine and with your own texts: their length decides."""

SENTENCE = (
    "The committee postponed its decision on the new bridge until the budget for the coming year is known, "
    "because two of the three offers had turned out to be far above what the city had set aside for it."
)
"""The built-in text: 39 words."""

SAMPLE = 256
"""Default of --count: texts per round."""


def bench(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", callback=options.model_name, help="A second model, such as the original."
        ),
    ] = None,
    texts: Annotated[
        str | None, typer.Option(metavar="FILE", help=f"{options.TEXTS} Default: one sentence of 39 words.")
    ] = None,
    column: Column = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts per round: the first of FILE, repeated if FILE has fewer; default: "
            f"{SAMPLE} drawn from all.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 3,
    queries: Annotated[int, typer.Option(min=1, help="Single queries per round.")] = 20,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> Iterator[Result]:
    """Measure a model after a warm-up: texts per second, time of a single query, memory."""
    found = loading.sample(texts, SAMPLE, first=count, column=column) if texts else [SENTENCE]
    count = count or SAMPLE
    data = (found * (count // len(found) + 1))[:count]
    settings = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    names = [name for name in (model, against) if name]
    from tritern.progress import bar

    with contextlib.ExitStack() as stack:
        arms = [stack.enter_context(_process()) for _ in names]
        shown = stack.enter_context(
            bar(desc="Measuring", total=len(arms) * (rounds + 2), unit="step", leave=False)
        )
        loaded = [arm.submit(_load, name, data[0], settings) for arm, name in zip(arms, names)]
        results = [_wait(future, shown) for future in loaded]
        times: list[list[tuple[float, list[float]]]] = [[] for _ in arms]
        for arm in arms:  # warm-up
            _wait(arm.submit(_measure, data, batch_size, 1), shown)
        for _ in range(rounds):
            for arm, measured in zip(arms, times):  # in turn, never two at once
                measured.append(_wait(arm.submit(_measure, data, batch_size, queries), shown))
    for result, measured in zip(results, times):
        result |= _statistics(measured)
    words = statistics.mean(len(text.split()) for text in data)
    setting = {"texts": texts, "count": count, "mean_words": words, "batch_size": batch_size}
    setting |= {"rounds": rounds, "queries": queries * rounds, "environment": reporting.environment()}
    yield Result({"results": results, **setting}, _table(results, setting))


def _wait(future: Future[Found], shown: tqdm) -> Found:
    """Wait for the result of a step and keep showing the time."""
    while not wait([future], timeout=1).done:
        shown.update(0)
    shown.update()
    return future.result()


def _process() -> ProcessPoolExecutor:
    """A fresh process, to measure the memory of one model alone. Libraries are imported once."""
    kinds = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:
        context.set_forkserver_preload(["tritern_cli.bench", "sentence_transformers", "tritern"])
    return ProcessPoolExecutor(1, mp_context=context, initializer=_quiet)


def _quiet() -> None:
    """Keep standard output for the results, and leave Ctrl-C to the first process."""
    sys.stdout = sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_model: SentenceTransformer | None = None  # of this process


def _load(name: str, text: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Load the model of this process; return its facts and its memory after one query."""
    global _model
    import sentence_transformers  # noqa: F401  before memory is read
    import torch

    import tritern
    from tritern.nn.replace import is_ternary

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = _resident()
    _model = loading.load(name, **settings)
    _model.encode(text, show_progress_bar=False)
    held = torch.cuda.memory_allocated() if _model.device.type == "cuda" else _resident() - before
    return {
        "model": name,
        "device": str(_model.device),
        "dtype": str(_model.dtype).removeprefix("torch."),
        "ternary": is_ternary(_model),
        "weights_mb": tritern.summary(_model).model_bytes_after / 1e6,
        "held_mb": None if math.isnan(held) else held / 1e6,
    }


def _measure(texts: list[str], batch_size: int, queries: int) -> tuple[float, list[float]]:
    """Texts per second in batches, and milliseconds of single queries."""
    assert _model is not None
    start = time.perf_counter()
    _model.encode(texts, batch_size=batch_size, show_progress_bar=False)
    rate = len(texts) / (time.perf_counter() - start)
    latencies = []
    for i in range(queries):
        start = time.perf_counter()
        _model.encode(texts[i % len(texts)], show_progress_bar=False)
        latencies.append(1e3 * (time.perf_counter() - start))
    return rate, latencies


def _statistics(measured: list[tuple[float, list[float]]]) -> dict[str, Any]:
    rates = [rate for rate, _ in measured]
    latencies = sorted(ms for _, found in measured for ms in found)
    return {
        "texts_per_second": statistics.median(rates),
        "texts_per_second_rounds": rates,
        "query_p50_ms": statistics.median(latencies),
        "query_p99_ms": latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
    }


def _resident() -> float:
    """Bytes of physical memory of this process; NaN if the system is not Linux."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else math.nan


def _table(results: list[dict[str, Any]], setting: dict[str, Any]) -> str:
    first = results[-1]
    rows = [("", "texts/s", "", "query p50", "p99", "weights", "held")]
    for r in results:
        speed = f"{r['texts_per_second'] / first['texts_per_second']:.2f}x" if len(results) > 1 else ""
        name = f"{r['model']} ({'ternary, ' if r['ternary'] else ''}{r['dtype']}, {r['device']})"
        held = "not measured" if r["held_mb"] is None else f"{r['held_mb']:.1f} MB"
        times = f"{r['query_p50_ms']:.1f} ms", f"{r['query_p99_ms']:.1f} ms"
        rate, weights = f"{r['texts_per_second']:.1f}", f"{r['weights_mb']:.1f} MB"
        rows.append((name, rate, speed, *times, weights, held))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines.append(
        f"{setting['count']} texts of {setting['mean_words']:.0f} words in batches of "
        f"{setting['batch_size']}, median of {setting['rounds']} rounds; {setting['queries']} single queries"
    )
    lines.append(reporting.footer(setting["environment"]))
    return "\n".join(lines)
