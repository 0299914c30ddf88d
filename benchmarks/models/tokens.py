"""Texts to token ids: texts a second of tritern's tokenizer part against sentence-transformers' preprocess.

    python benchmarks/models/tokens.py --data DIR --json tokens.json
    python benchmarks/models/tokens.py --model BAAI/bge-base-en-v1.5 --short 2000 --long 500

``fast`` is what ``encode`` of tritern calls (``tritern.engine.tokens``): ids end to end, 4,096 texts at a
time. ``preprocess N`` is ``model.preprocess`` of batches of N texts, which pads and makes tensors; longest
texts first, as ``encode`` of sentence-transformers sorts them. Short texts are claims (perspectrum), long
ones abstracts (scifact) of the labelled sets in --data; without it sentences and paragraphs of Python's own
language reference. Arms take turns. A rate is of the median of the rounds, and the speed is the median of
the ratios within a round, to the batch size that is fastest. Before, the ids of all texts are compared,
with and without a prompt: there is no speed where they differ.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
from models import encode
from quality import eval_sets

BATCHES = (32, 256, 4096)
CHUNK = 4096
PROMPT = "query: "


def real_texts(data: Path | None) -> dict[str, list[str]]:
    """Short and long texts. In a folder of labelled sets: perspectrum's documents, of a sentence each, and
    scifact's, abstracts; else sentences of Python's language reference, and paragraphs of it in sixes.
    """
    if data is None:
        paragraphs = encode.texts_for(argparse.Namespace(texts=None), 2400)
        sentences = [s for p in paragraphs for s in re.split(r"(?<=[.:]) (?=[A-Z])", p) if len(s) >= 30]
        joined = [" ".join(paragraphs[i : i + 6]) for i in range(0, len(paragraphs), 6)]
        return {"short": list(dict.fromkeys(sentences)), "long": list(dict.fromkeys(joined))}
    found = {}
    for kind, name in (("short", "perspectrum"), ("long", "scifact")):
        rows = eval_sets.read(data / eval_sets.SETS[name][1] / "corpus.jsonl.gz", "title", "text")
        found[kind] = [text for row in rows if (text := " ".join(row).strip())]
    return found


def differences(model: Any, fast: Any, texts: list[str]) -> int:
    """Texts whose ids differ from preprocess's, with or without a prompt."""
    different: set[int] = set()
    for prompt in ("", PROMPT):
        ids, lengths = fast([prompt + text for text in texts])
        begin = 0
        for i, length in enumerate(lengths.tolist()):
            if i % 256 == 0:
                theirs = model.preprocess(texts[i : i + 256], prompt=prompt)
            kept = theirs["input_ids"][i % 256][theirs["attention_mask"][i % 256].bool()]
            if kept.tolist() != ids[begin : begin + length].tolist():
                different.add(i)
            begin += length
    return len(different)


def in_parts(call: Callable[[list[str]], Any], size: int, texts: list[str]) -> None:
    for i in range(0, len(texts), size):
        call(texts[i : i + size])


def measure(model: Any, fast: Any, texts: list[str], rounds: int) -> dict[str, Any]:
    """The row of some texts; after a round to warm up."""
    by_length = sorted(texts, key=len, reverse=True)
    arms = {f"preprocess {n}": partial(in_parts, model.preprocess, n, by_length) for n in BATCHES}
    arms["fast"] = partial(in_parts, fast, CHUNK, texts)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds + 1):
        for arm, call in arms.items():
            start = time.perf_counter()
            call()
            seconds[arm].append(time.perf_counter() - start)
    seconds = {arm: found[1:] for arm, found in seconds.items()}
    *others, ours = arms
    best = min(others, key=lambda arm: statistics.median(seconds[arm]))
    return {
        "texts_per_second": {arm: len(texts) / statistics.median(s) for arm, s in seconds.items()},
        "best": best,
        "speed": statistics.median(a / b for a, b in zip(seconds[best], seconds[ours])),
        "seconds": seconds,
    }


def measure_kinds(model: Any, texts: dict[str, list[str]], rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of text, printed as it comes."""
    from tritern.engine.tokens import fast_tokenizer

    rows = []
    for kind, sample in texts.items():
        fast = fast_tokenizer(model[0])
        characters = statistics.median(map(len, sample))
        row: dict[str, Any] = {"kind": kind, "texts": len(sample), "median_characters": characters}
        rows.append(row)
        if isinstance(fast, str):
            row["reason"] = f"only its own preprocess: {fast}"
        elif count := differences(model, fast, sample):
            row["reason"] = f"the ids of {count} of {len(sample)} texts differ from preprocess's"
        else:
            row |= {"tokens_per_text": float(fast(sample).lengths.mean())}
            row |= measure(model, fast, sample, rounds)
        if "reason" in row:
            print(f"{kind:6s} not measured: {row['reason']}")
            continue
        rates = ", ".join(f"{arm} {rate:,.0f}" for arm, rate in row["texts_per_second"].items())
        facts = f"{len(sample)} texts of {row['tokens_per_text']:.0f} tokens"
        print(f"{kind:6s} {facts}, texts/s: {rates}; {row['speed']:.2f}x of {row['best']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="minilm-l6-ternary", help="folder or hub name (default: minilm-l6-ternary)")
    add("--data", type=Path, default=os.environ.get("TRITERN_DATA") or None, metavar="DIR",
        help="labelled sets (layout: benchmarks/quality/eval_sets.py); default: TRITERN_DATA")  # fmt: skip
    add("--short", type=int, default=8192, help="most short texts (default: 8192)")
    add("--long", type=int, default=2048, help="most long texts (default: 2048)")
    add("--rounds", type=int, default=5, help="(default: 5)")
    add("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    from tritern.pretrained import resolve

    try:
        texts = real_texts(options.data)
        model = SentenceTransformer(resolve(options.model), device="cpu")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    texts = {kind: found[: getattr(options, kind)] for kind, found in texts.items()}
    rows = measure_kinds(model, texts, options.rounds)
    if options.json:
        facts = encode.environment("cpu") | {"model": options.model, "rounds": options.rounds}
        facts |= {"data": "labelled sets" if options.data else "Python's language reference"}
        report.write_json(options.json, {"environment": facts, "rows": rows})
    if any("reason" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
